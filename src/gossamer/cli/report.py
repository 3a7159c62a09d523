"""``gossamer report``: the page of a comparison."""

from typing import Annotated

from cyclopts import Parameter

from gossamer.cli.show import console, print_json
from gossamer.report import from_run

__all__ = ["report"]


def report(
    folder: str = "report", *, json: Annotated[bool, Parameter(negative=())] = False
) -> None:
    """Build index.html from a comparison's records, with the ledger of claims.

    Parameters
    ----------
    folder
        The --out folder of a comparison; an unfinished one gives a page of what is there.
    json
        Print the page's path as JSON.
    """
    page = from_run(folder)
    if json:
        print_json({"page": str(page)})
    else:
        console.print(f"report: {page}", markup=False, highlight=False)
