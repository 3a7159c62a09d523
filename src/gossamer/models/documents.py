"""Documents: texts from files a user names, or those packaged with nano."""

import json
import os
from pathlib import Path
from typing import Literal

from gossamer.core import GossamerError

__all__ = ["halves", "read_documents"]


def read_documents(
    path: str | Path | None, split: Literal["heldout", "calibration"] = "heldout"
) -> list[str]:
    """Read texts from a file, or the packaged ones.

    Parameters
    ----------
    path : ``.jsonl`` (one object per line with ``text``), ``.parquet`` (column ``text``), any
        other suffix as one UTF-8 text; None for the packaged Python source.
    split : which packaged text: unseen in training, or seen.

    Raises
    ------
    GossamerError
        If the file is missing, empty, not text, or lacks the field or column.
    """
    if path is None:
        from gossamer.models import nano

        chosen = nano.calibration_documents if split == "calibration" else nano.heldout_documents
        return chosen()
    if "\n" in str(path):
        raise GossamerError(
            "a string names a file; this one has several lines: give texts in a list, [text]"
        )
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):
        raise GossamerError(f"no file {path}; give a text, JSONL or parquet file")
    if not path.is_file():
        raise GossamerError(f"{path} is no file; give a text, JSONL or parquet file")
    try:
        if path.suffix == ".parquet":
            documents = _read_parquet(path)
        elif path.suffix in (".jsonl", ".ndjson"):
            documents = _read_jsonl(path)
        else:
            documents = [_read_text(path)]
    except OSError as error:
        raise GossamerError(f"cannot read {path}: {error.strerror or error}") from None
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise GossamerError(f"{path} holds no text; give a file with text in it")
    return documents


def halves(documents: list[str]) -> tuple[list[str], list[str]]:
    """Cut documents into two lists of equal text, inside a document where need be."""
    middle = sum(map(len, documents)) // 2
    first: list[str] = []
    for index, text in enumerate(documents):
        if len(text) >= middle:
            parts = ([text[:middle]] if middle else []), ([text[middle:]] if text[middle:] else [])
            return first + parts[0], parts[1] + documents[index + 1 :]
        first.append(text)
        middle -= len(text)
    return first, []


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GossamerError(
            f"{path} is not UTF-8 text (byte {error.start}); give a text, JSONL or parquet file"
        ) from None
    if "\0" in text:
        raise GossamerError(f"{path} is binary; give a text, JSONL or parquet file")
    return text


def _read_jsonl(path: Path) -> list[str]:
    documents: list[str] = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise GossamerError(f"{path}, line {number} is not JSON") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise GossamerError(f'{path}, line {number} has no string "text"')
        documents.append(text)
    return documents


def _read_parquet(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise GossamerError(
            "reading parquet needs pyarrow; pip install 'gossamer[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise GossamerError(f'{path} has no column "text"; it has {names}')
        column = file.read(columns=["text"]).column("text").to_pylist()
    except ArrowException as error:
        raise GossamerError(f"{path} is no readable parquet file: {_line(error)}") from None
    if not all(text is None or isinstance(text, str) for text in column):
        raise GossamerError(f'{path}: column "text" does not hold strings')
    return [text for text in column if text]


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
