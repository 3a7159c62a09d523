"""The state of a training in one file: tensors, and plain values as JSON beside them."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["read_checkpoint", "replacing", "write_checkpoint"]


@contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """A name to write a file under, which takes the path's place once it is written."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield str(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_checkpoint(
    path: str | Path, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a state; readers see the old file or the new one."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        save_file(held, part, metadata={"state": json.dumps(dict(plain))})


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
