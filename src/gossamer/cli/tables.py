"""The documentation's tables of methods and claims: ``python -m gossamer.cli.tables FOLDER``."""

import sys
from pathlib import Path

from gossamer import methods
from gossamer.claims.runner import ledger, verdict_of
from gossamer.core import FAMILIES

__all__ = ["claims_page", "main", "methods_page"]

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


_CLAIMS = """# Claims

Generated from the records in `results/claims/` by `make docs`; do not edit. Each is a sentence of a
paper, scaled down to something a small machine can measure, with a verdict decided by a rule in
`src/gossamer/claims/`: *holds*, *weaker* (the direction holds, the margin does not), *fails*. A
claim that does not hold stays here. Repeat one by its command.
"""


def claims_page() -> str:
    """The page as Markdown: every record, the paper's figure beside ours."""
    parts = [_CLAIMS]
    for record in ledger():
        where = f"{record['device']}, seeds {', '.join(map(str, record['seeds']))}"
        parts += [
            f"## `{record['method']}`: {record['claim']} ({record['verdict']})\n",
            f"{record['sentence']}\n",
            f"- paper: {record['paper']}",
            f"- here: {record['ours']}",
            f"- measured: {record['experiment']}; {where}, {record['seconds']} s, "
            f"{record['date']}, commit {record['commit']}",
            f"- command: `{record['command']}`\n",
        ]
    return "\n".join(parts)


def main(words: list[str]) -> int:
    """Write the pages into the folder that is named; the exit status."""
    folder = Path(words[0]) if len(words) == 1 else None
    if folder is None or not folder.is_dir():
        asked = words in (["-h"], ["--help"])
        usage = "usage: python -m gossamer.cli.tables FOLDER   (an existing one, such as docs)"
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    for name, page in (("methods", methods_page), ("claims", claims_page)):
        (folder / f"{name}.md").write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
