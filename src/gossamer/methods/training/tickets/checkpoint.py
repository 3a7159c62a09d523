"""Rounds of training in a file: nested plain values as JSON, the tensors among them beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.models.checkpoint import replacing

__all__ = ["ROUNDS_FILE", "read_rounds", "write_rounds"]

ROUNDS_FILE = "gossamer_rounds.safetensors"


def write_rounds(values: Mapping[str, Any], path: str | Path) -> None:
    """Write nested dicts, lists and tuples of plain values and tensors.

    Readers see the old file or the new one.

    Raises
    ------
    GossamerError
        If something in it is neither, or the file cannot be written.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(dict(values), "state", tensors))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(tensors, part, metadata={"rounds": text})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GossamerError(f"cannot write to {path.parent}: {reason}") from None


def read_rounds(path: str | Path) -> dict[str, Any]:
    """What :func:`write_rounds` wrote.

    Raises
    ------
    GossamerError
        If the file is none of ours.
    """
    try:
        with safe_open(str(path), "pt") as file:
            text = json.loads((file.metadata() or {})["rounds"])
            return _unpacked(text, {name: file.get_tensor(name) for name in file.keys()})
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
        raise GossamerError(
            f"{path} holds no rounds of training; remove it, or give another folder"
        ) from None


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """As JSON has it; keys keep their type, and tensors leave their name behind."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous()
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {"dict": [[k, _packed(v, f"{place}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        inner = [_packed(v, f"{place}/{i}", tensors) for i, v in enumerate(value)]
        return {type(value).__name__: inner}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise GossamerError(
        f"{place} is a {type(value).__name__}, which cannot be written to a file; "
        "leave out folder, or use an optimizer and a schedule whose state is plain"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _unpacked(v, tensors) for key, v in inner}
    found = [_unpacked(v, tensors) for v in inner]
    return tuple(found) if kind == "tuple" else found
