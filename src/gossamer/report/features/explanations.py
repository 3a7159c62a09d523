"""Explanations: what features mean, in words, from the files people keep them in."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gossamer.core import GossamerError

__all__ = ["read_explanations", "read_values"]

_TEXTS = ("description", "explanation", "text", "label")
_NUMBERS = ("index", "feature_index", "feature", "latent")


def read_values(path: Path) -> list[Any]:
    """The values of a JSON file, or of the lines of a JSONL one; ``.gz`` is unpacked.

    Raises
    ------
    GossamerError
        If the file cannot be read or is not JSON.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        if ".jsonl" in path.suffixes:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return [json.loads(text)]
    except (OSError, EOFError, ValueError, RecursionError) as error:
        line = str(error).strip().split("\n")[0]
        raise GossamerError(f"{path} holds no readable JSON ({line}); write it again") from None


def read_explanations(path: str | Path) -> dict[int, str]:
    """Words by latent, from a JSON or JSONL file.

    Parameters
    ----------
    path : an object ``{"12": "closing brackets"}``, or objects with ``index`` and
        ``description``, as Neuronpedia writes them, in a list or line by line.

    Raises
    ------
    GossamerError
        If the file holds neither.
    """
    path = Path(path).expanduser()
    found: dict[int, str] = {}
    for value in read_values(path):
        rows = value if isinstance(value, list) else _rows(value)
        for row in rows:
            number, words = _entry(row)
            if number is None or not words:
                raise GossamerError(
                    f'{path} holds {str(row)[:60]!r}; give {{"12": "what it means"}}, or objects '
                    "with index and description"
                )
            found.setdefault(number, words)
    return found


def _rows(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping) and not any(name in value for name in _NUMBERS):
        return [
            {"index": k, **(v if isinstance(v, Mapping) else {"text": v})} for k, v in value.items()
        ]
    return [value]


def _entry(row: Any) -> tuple[int | None, str]:
    if not isinstance(row, Mapping):
        return None, ""
    number = next((row[name] for name in _NUMBERS if name in row), None)
    words = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), "")
    try:
        return int(str(number)), words.strip()
    except ValueError:
        return None, ""
