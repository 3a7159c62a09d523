"""What the command line shows: one console for people, JSON for programs."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gossamer.models import Progress as Callback

__all__ = ["bar", "console", "print_json", "table", "warn"]

console = Console()
_errors = Console(stderr=True)


def print_json(value: Any) -> None:
    """Plain JSON on standard output, nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def warn(text: str) -> None:
    """One line for the user on standard error."""
    _errors.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str, quiet: bool = False) -> Iterator[Callback]:
    """A progress bar on standard error; yields ``progress(done, total, what)``.

    Nothing is drawn when standard error is no terminal.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    live = Progress(
        *columns, console=_errors, transient=True, disable=quiet or not _errors.is_terminal
    )
    with live:
        task = live.add_task(title, total=None)
        yield lambda done, total, what: live.update(
            task, completed=done, total=total, description=f"{title}: {what}"
        )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> Table:
    """A table; columns from ``right`` on are numbers, aligned right."""
    out = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(head):
        number = index >= right > 0
        whole = number or name not in ("paper", "needs", "when")
        out.add_column(
            name,
            justify="right" if number else "left",
            no_wrap=whole,
            overflow="fold",
            min_width=len(name),
        )
    for row in rows:
        out.add_row(*map(escape, row))
    return out
