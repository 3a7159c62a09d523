"""The pattern of one head, and MInference's file of them.

The file is a list with one mapping per layer, from the number of a query head to ``[kind, first,
second, score]``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from gossamer.core import GossamerError, unknown
from gossamer.models.store import write_json

__all__ = ["DEFAULT", "Head", "Kind", "read_heads", "write_heads"]

Kind = Literal["a_shape", "vertical_slash", "block_sparse", "dense"]

_NAMES: dict[str, Kind] = {
    "stream_llm": "a_shape",
    "vertical_and_slash": "vertical_slash",
    "block_sparse": "block_sparse",
}

_BLOCK = 64
"""Tokens of a block in the file's counts."""


class Head(NamedTuple):
    """What one head reads of a prompt.

    Parameters
    ----------
    kind : ``a_shape``: the first ``first`` keys and the latest ``second``. ``vertical_slash``:
        ``first`` columns and ``second`` diagonals. ``block_sparse``: ``first`` blocks of keys for
        every block of queries. ``dense``: everything.
    score : attention mass kept when it was chosen, 0 to 1.
    """

    kind: Kind
    first: int
    second: int
    score: float = 1.0


DEFAULT = Head("vertical_slash", 1000, 6096)
"""Of a head that a file does not name."""


def read_heads(path: str | Path, heads: int, block_size: int = _BLOCK) -> list[list[Head]]:
    """The heads of every layer from a file in MInference's format.

    Parameters
    ----------
    heads : query heads of a layer; those the file leaves out get 1000 columns, 6096 diagonals.
    block_size : tokens of a block here; the file counts blocks of 64.

    Raises
    ------
    GossamerError
        If the file cannot be read, names an unknown kind, or a head the model does not have.
    """
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GossamerError(f"{path} is no readable file of head patterns: {error}") from None
    if not isinstance(layers, list) or not all(isinstance(x, dict) for x in cast(Any, layers)):
        raise GossamerError(f"{path} is no list with one mapping of heads per layer")
    return [_layer(path, cast(dict[str, Any], layer), heads, block_size) for layer in layers]


def _layer(path: str | Path, layer: dict[str, Any], heads: int, block_size: int) -> list[Head]:
    found = [DEFAULT] * heads
    for name, entry in layer.items():
        if not name.isdigit() or int(name) >= heads:
            raise GossamerError(f"{path} names head {name!r}; the model has heads 0 to {heads - 1}")
        if not isinstance(entry, list) or len(cast(list[Any], entry)) < 3:
            raise GossamerError(
                f"{path} gives head {name} as {entry!r}; not [kind, number, number]"
            )
        kind, first, second, *score = cast(list[Any], entry)
        if kind not in _NAMES:
            raise unknown("head pattern", kind, tuple(_NAMES))
        if kind == "block_sparse":
            first = -(-int(first) * _BLOCK // block_size)
        found[int(name)] = Head(_NAMES[kind], int(first), int(second), float(*score or (1.0,)))
    return found


def write_heads(
    path: str | Path, layers: Sequence[Sequence[Head]], heads: int, block_size: int = _BLOCK
) -> None:
    """Write patterns in MInference's format; heads that share keys get the same entry.

    Parameters
    ----------
    layers : patterns of every layer, one per query head or per key-value head.
    heads : query heads of a layer. block_size : tokens of a block in the patterns.

    Raises
    ------
    GossamerError
        If a head is dense, for which the format has no name.
    """
    names = {kind: name for name, kind in _NAMES.items()}
    plain: list[dict[str, list[Any]]] = []
    for layer in layers:
        share = heads // len(layer)
        entries: dict[str, list[Any]] = {}
        for head in range(heads):
            own = layer[head // share]
            if own.kind not in names:
                raise GossamerError(f"the file has no name for a {own.kind} head; known: {names}")
            blocks = own.kind == "block_sparse"
            first = -(-own.first * block_size // _BLOCK) if blocks else own.first
            entries[str(head)] = [names[own.kind], first, own.second, round(own.score, 4)]
        plain.append(entries)
    write_json(Path(path), plain)
