"""The state of a sparse training in a file: masks at one bit a weight, and plain values as JSON.

Where the state holds sharded values every process writes a file of its own beside rank 0's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layout import here, is_sharded, rank, world
from gossamer.models.checkpoint import read_checkpoint, replacing, write_checkpoint

__all__ = [
    "STATE_FILE",
    "TEACHER_FILE",
    "read_state",
    "take_teacher",
    "write_state",
    "write_teacher",
]

STATE_FILE = "gossamer_sparsifier.safetensors"
TEACHER_FILE = "gossamer_teacher.safetensors"
_WHAT = "a sparse training"


def write_state(state: Mapping[str, Any], path: str | Path) -> None:
    """Write what ``Sparsifier.state_dict`` gave; readers see the old file or the new one.

    Call it on every process: where nothing is sharded, all but rank 0 do nothing.
    """
    sharded = any(map(is_sharded, state["removed"].values()))
    if rank() and not sharded:
        return
    path = _own(Path(path), sharded)
    tensors = {f"mask.{name}": value for name, value in state["masks"].items()}
    tensors |= {f"removed.{name}": here(value) for name, value in state["removed"].items()}
    names = ("method", "updates", "world_size", "flops", "search")
    plain = {name: state[name] for name in names if name in state}
    plain["sharded"] = sharded
    write_checkpoint(path, plain, tensors)


def read_state(path: str | Path) -> dict[str, Any]:
    """What :func:`write_state` wrote, for ``attach(..., state=...)``, as this process needs it.

    Raises
    ------
    GossamerError
        If the file, or this process's part, is missing or none of ours.
    """
    plain, tensors = read_checkpoint(path, _WHAT)
    if plain.get("sharded") and rank() and plain["world_size"] == world():
        plain, tensors = read_checkpoint(_own(Path(path), sharded=True), _WHAT)
    groups: dict[str, dict[str, Any]] = {"mask": {}, "removed": {}}
    for name, tensor in tensors.items():
        kind, _, path_in_model = name.partition(".")
        groups[kind][path_in_model] = tensor
    return {**plain, "masks": groups["mask"], "removed": groups["removed"]}


def write_teacher(teacher: nn.Module, path: str | Path) -> None:
    """Write the dense model that a training learns from; weights that are tied once."""
    with replacing(path) as part:
        save_model(teacher, part)


def take_teacher(model: nn.Module, path: str | Path) -> None:
    """Load what :func:`write_teacher` wrote into a model of the same form.

    Raises
    ------
    GossamerError
        If the file is missing, damaged, or of another model.
    """
    try:
        load_model(model, str(path))
    except (OSError, SafetensorError, RuntimeError):
        raise GossamerError(
            f"{path} holds no teacher of this model, from which the training learned before it "
            "was resumed; give the dense model: SparsifierCallback(..., teacher=)"
        ) from None


def _own(path: Path, sharded: bool) -> Path:
    return path.with_suffix(f".rank{rank()}{path.suffix}") if sharded and rank() else path
