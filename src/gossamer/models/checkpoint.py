"""The state of a training in one file: tensors, and plain values as JSON beside them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["read_checkpoint", "write_checkpoint"]


def write_checkpoint(
    path: str | Path, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a state; readers see the old file or the new one."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, str(part), metadata={"state": json.dumps(dict(plain))})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_checkpoint` wrote.

    Parameters
    ----------
    what : what the file should hold, for the error.

    Raises
    ------
    GossamerError
        If the file is missing or none of ours.
    """
    try:
        with safe_open(str(path), "pt") as file:
            plain = json.loads((file.metadata() or {})["state"])
            return plain, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
        raise GossamerError(
            f"{path} holds no state of {what}; give a checkpoint written during one"
        ) from None
