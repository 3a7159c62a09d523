"""Facts: what stands around the features of a page, and which of them one page can hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.core import GossamerError
from gossamer.report import numbers
from gossamer.report.features.book import Book
from gossamer.report.features.records import Feature

__all__ = ["choose", "imported_facts", "page_facts", "parse_numbers"]


def parse_numbers(text: str) -> list[int]:
    """Numbers such as ``3,17,40-50``, in that order, none twice.

    Raises
    ------
    GossamerError
        If it is anything else.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 24:
            raise GossamerError(f"features are {text!r}; give numbers such as 3,17,40-50")
        end = int(last) if dash else int(first)
        if not 0 <= end - int(first) < 1_000_000:
            raise GossamerError(f"features are {text!r}; a range rises, by less than a million")
        found.update(dict.fromkeys(range(int(first), end + 1)))
    return list(found)


def choose(book: Book, most: int, only: Sequence[int] | None = None) -> list[int]:
    """Latents for one page: those asked for, or all, or else the first that fire.

    Raises
    ------
    GossamerError
        If one asked for does not exist, or ``most`` is below 1.
    """
    if only is not None:
        wrong = [index for index in only if index >= len(book)]
        if wrong:
            raise GossamerError(f"feature {wrong[0]} does not exist; there are {len(book)}, from 0")
        return list(only)
    if most < 1:
        raise GossamerError(f"most is {most}; show at least 1 feature")
    if len(book) <= most:
        return list(range(len(book)))
    return book.firing.counts.nonzero()[:most, 0].tolist()


def page_facts(
    book: Book, name: str, *, model: str, hook: str, data: str, shown: int | None, command: str
) -> dict[str, Any]:
    """Head and foot of a page made from a dictionary.

    Parameters
    ----------
    name : of the dictionary. shown : features on the page; None where a server has all.
    """
    firing, made = book.firing, book.dictionary
    dead = int((firing.counts == 0).sum())
    kind = made.config()["architecture"]
    notes = []
    if shown is not None and shown < len(book):
        notes.append(
            f"This page holds {shown:,} of {len(book):,} features. The others are shown by the "
            "same command with --serve, or by naming them with --only."
        )
    if book.unembedding is None:
        notes.append("The model has no head of the dictionary's width, so no logits are shown.")
    if not len(firing.values):
        notes.append("No feature fired on this text.")
    table = [
        ("Command", command),
        ("Dictionary", name),
        ("Model", model),
        ("Reads", hook),
        ("Text", f"{data}, {len(firing.tokens)} windows of {firing.tokens.length} tokens"),
        ("Dead", f"none of {firing.rows:,} tokens fired it; rarer than 3 in so many is not seen"),
        ("Intervals", "equal widths between a feature's smallest and largest code, sampled"),
        ("Seed", str(book.seed)),
    ]
    if book.unembedding is not None:
        direct = "an atom through the last norm's gain and the head, up to the norm's scale"
        table.insert(-2, ("Logits", f"{direct}; later blocks are not counted"))
    return {
        "title": Path(name).name or name,
        "lede": f"{kind} dictionary of {hook} in {Path(model).name or model}, "
        f"on {firing.rows:,} tokens.",
        "figures": [
            ("Features", f"{len(book):,}"),
            ("Channels", f"{made.d_in:,}"),
            ("Active on a token", f"{book.l0:.3g}"),
            ("Dead", numbers.percent(dead / len(book))),
        ],
        "notes": notes,
        "table": table,
        "logits": book.unembedding is not None,
    }


def imported_facts(features: Sequence[Feature], name: str) -> dict[str, Any]:
    """Head of a page made from features that another tool measured."""
    told = sum(bool(feature.explanation) for feature in features)
    return {
        "title": Path(name).name or name,
        "lede": "Features as Neuronpedia's JSON describes them.",
        "figures": [("Features", f"{len(features):,}"), ("Explained", f"{told:,}")],
        "logits": any(feature.positive for feature in features),
    }
