"""``gossamer methods``: what there is."""

import re
from typing import Annotated, Any, get_args

from cyclopts import Parameter

from gossamer import methods as registry
from gossamer.claims.runner import ledger, verdict_of
from gossamer.cli.show import console, print_json, table
from gossamer.core import GossamerError, systems, unknown
from gossamer.core.card import FAMILIES, Masks, Start, When

__all__ = ["method_rows", "methods"]


def _kind(name: str, given: str | None, kinds: Any) -> str | None:
    """The one of a card's words that begins as given: ``during`` is ``during training``."""
    if given is None:
        return None
    words: tuple[str, ...] = get_args(kinds)
    wanted = given.strip().lower()
    found = [w for w in words if w == wanted] or [
        w for w in words if wanted and w.startswith(wanted)
    ]
    if len(found) != 1:
        raise GossamerError(f"--{name} is {given!r}; give one of: {', '.join(words)}")
    return found[0]


def method_rows(
    family: str | None = None,
    *,
    when: str | None = None,
    start: str | None = None,
    masks: str | None = None,
    pattern: str | None = None,
) -> list[dict[str, Any]]:
    """One row per method that fits, from its card and the ledger of claims."""
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    wanted = {
        "when": _kind("when", when, When),
        "start": _kind("start", start, Start),
        "masks": _kind("masks", masks, Masks),
    }
    if pattern is not None and re.fullmatch(r"\d+:\d+", pattern.strip()):
        # Cards say N:M for all of them.
        pattern = "N:M"
    records = ledger()
    rows = []
    for key in registry.keys(family):
        cls = registry.get(key)
        card = cls.card
        if any(word not in (None, getattr(card, axis)) for axis, word in wanted.items()):
            continue
        if pattern is not None and pattern.lower() not in card.pattern.lower():
            continue
        rows.append(
            {
                "key": key,
                "family": card.family,
                "name": cls.__name__,
                "title": card.title,
                "system": card.system_id,
                "year": card.year,
                "arxiv": card.arxiv,
                "when": card.when,
                "start": card.start,
                "masks": card.masks,
                "pattern": card.pattern,
                "needs": sorted(stat.value for stat in cls.needs),
                "verdict": verdict_of(key, records),
                "card": card.to_dict(),
            }
        )
    return rows


def methods(
    *,
    family: Annotated[str | None, Parameter(alias="-f")] = None,
    when: str | None = None,
    start: str | None = None,
    masks: str | None = None,
    pattern: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """List the methods: what each does, where it comes from, and how its claim came out.

    Parameters
    ----------
    family
        Show one family only, such as weights, activations, attention or features.
    when
        Only methods used before training, during training, after training, or at inference; the
        first word is enough.
    start
        Only methods that go from dense to sparse, or from sparse to sparse, or stay dense.
    masks
        Only methods with static, dynamic or none (no masks).
    pattern
        Only methods whose pattern has this text in it, such as N:M (or 2:4), block or fan-in.
    json
        Print JSON, with every method's whole card.
    """
    rows = method_rows(family, when=when, start=start, masks=masks, pattern=pattern)
    if json:
        print_json(rows)
        return
    if not rows:
        raise GossamerError("no method fits all of these; leave one out")
    shown = [
        {
            "key": r["key"],
            "family": r["family"],
            "claim": r["verdict"] or "not run",
            "system": str(r["system"] or "-"),
            "year": str(r["year"] or "-"),
            "arXiv": r["arxiv"] or "-",
            "when": r["when"].removesuffix(" training"),
            "start": r["start"],
            "masks": r["masks"],
            "paper": r["title"],
        }
        for r in rows
    ]
    # A narrow terminal gets what fits; --json has everything.
    narrow = ("key", "family", "claim", "system", "when", "masks")
    wide = (*narrow[:4], "year", "arXiv", "when", "start", "masks", "paper")
    head = wide if console.width >= 140 else narrow
    console.print(table(f"{len(rows)} methods", head, [[r[name] for name in head] for r in shown]))
    done = sum(r["system"] is not None for r in rows)
    console.print(
        f"{done} of the {len(systems())} systems of the list, {len(rows) - done} baselines. "
        "A '-' under system marks a baseline. --json prints every card whole."
    )
