"""``gossamer soup``: average copies of one sparse model."""

from typing import Annotated

from cyclopts import Parameter

from gossamer.cli.show import bar, console, print_json
from gossamer.core import GossamerError, check_count
from gossamer.models import Tokens, context_length, read_documents
from gossamer.models.store import require_new
from gossamer.recipes.recipe import load
from gossamer.recipes.soup import soup as average

__all__ = ["soup"]


def soup(
    *folders: str,
    out: str,
    greedy: Annotated[bool, Parameter(negative=())] = False,
    data: str | None = None,
    windows: int = 32,
    length: int = 512,
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Average model folders that were retrained under one mask, and save the result.

    Folders whose zeros lie in different places are refused: their average would be denser than
    each of them. Sums run in float32; the result has the first folder's dtype, tokenizer and
    stored masks.

    Parameters
    ----------
    folders
        Two or more model folders, plain or saved by gossamer.
    out
        Folder to save to; it must be new or empty.
    greedy
        Average only the copies that lower the loss on held-out text, the best first.
    data
        Held-out text to measure copies and soup on: a text, JSONL or parquet file. Greedy soups
        without it use the packaged text.
    windows
        Windows measured.
    length
        Tokens per window.
    allow_pickle
        Read models that have only .bin weights (as tensors only, no code).
    json
        Print the report as JSON.
    """
    check_count("windows", windows, 1)
    check_count("length", length, 2)
    if len(folders) < 2:
        raise GossamerError(f"{len(folders)} folder given; a soup needs at least two")
    require_new(out)
    tokens = None
    if greedy or data is not None:
        documents = read_documents(data, "heldout")
        first = load(folders[0], allow_pickle=allow_pickle)
        context = context_length(first.model)
        length = length if context is None else min(length, context)
        tokens = Tokens.from_documents(documents, first.tokenizer, length=length).slice(windows)
    with bar("averaging", quiet=json) as progress:
        report = average(
            folders,
            out,
            tokens=tokens,
            choose=greedy,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if json:
        print_json(report.to_dict())
        return
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
