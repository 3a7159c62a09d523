"""``gossamer methods``: what there is."""

from typing import Annotated, Any

from cyclopts import Parameter

from gossamer import methods as registry
from gossamer.claims.runner import ledger, verdict_of
from gossamer.cli.show import console, print_json, table
from gossamer.core import systems

__all__ = ["method_rows", "methods"]


def method_rows(family: str | None = None) -> list[dict[str, Any]]:
    """One row per method, from its card and the ledger of claims."""
    records = ledger()
    rows = []
    for key in registry.keys(family):
        cls = registry.get(key)
        card = cls.card
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
                "needs": sorted(stat.value for stat in cls.needs),
                "verdict": verdict_of(key, records),
                "card": card.to_dict(),
            }
        )
    return rows


def methods(
    *,
    family: Annotated[str | None, Parameter(alias="-f")] = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """List the methods: what each does, where it comes from, and how its claim came out.

    Parameters
    ----------
    family
        Show one family only, such as weights, activations, attention or features.
    json
        Print JSON, with every method's whole card.
    """
    rows = method_rows(family)
    if json:
        print_json(rows)
        return
    shown = [
        {
            "key": r["key"],
            "family": r["family"],
            "claim": r["verdict"] or "not run",
            "system": str(r["system"] or "-"),
            "year": str(r["year"] or "-"),
            "arXiv": r["arxiv"] or "-",
            "when": r["when"],
            "needs": ", ".join(r["needs"]) or "-",
            "paper": r["title"],
        }
        for r in rows
    ]
    # A narrow terminal gets what fits; --json has everything.
    narrow = ("key", "family", "claim", "system", "paper")
    head = tuple(shown[0]) if console.width >= 120 else narrow
    console.print(table(f"{len(rows)} methods", head, [[r[name] for name in head] for r in shown]))
    done = sum(r["system"] is not None for r in rows)
    console.print(
        f"{done} of the {len(systems())} systems of the list, {len(rows) - done} baselines. "
        "A '-' under system marks a baseline."
    )
