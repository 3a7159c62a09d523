"""The documentation's table of methods: ``python -m gossamer.cli.tables FILE``."""

import sys
from pathlib import Path

from gossamer import methods
from gossamer.claims.runner import ledger, verdict_of
from gossamer.core import FAMILIES

__all__ = ["methods_page"]

_HEAD = """# Methods

Generated from the methods' cards and the ledger of claims by `make docs`; do not edit.
A *system* is a number of the list in `src/gossamer/core/systems.csv`; baselines have none.
"""


def methods_page() -> str:
    """The page as Markdown: a table per family, then every card's departures."""
    records = ledger()
    parts = [_HEAD]
    for family in FAMILIES:
        keys = methods.keys(family)
        if not keys:
            continue
        parts.append(f"## {family}\n")
        parts.append("| method | paper | system | score | pattern | when | claim |")
        parts.append("| --- | --- | --- | --- | --- | --- | --- |")
        for key in keys:
            card = methods.get(key).card
            source = card.title if card.arxiv is None else f"{card.title} (arXiv {card.arxiv})"
            cells = (
                f"`{key}`",
                source,
                str(card.system_id or "-"),
                card.score,
                card.pattern,
                card.when,
                verdict_of(key, records) or "not run",
            )
            parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        parts.append("")
        parts += [f"- `{k}` departs from the paper: {methods.get(k).card.departs}." for k in keys]
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(methods_page(), encoding="utf-8")
