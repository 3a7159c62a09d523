"""Checkpoint: a training run in one file, taken up again to the bit.

Weights, moments, counters, the rule's running figures and the place in the stream of rows are
written together; the file is replaced in one move, so a kill leaves the last whole one.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.features.stream import Stream

__all__ = ["Checkpoint", "Resumable", "describe"]


class Resumable(Protocol):
    """Something whose state is tensors by name."""

    def state(self) -> dict[str, Tensor]:
        """Everything that matters from here on."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        ...


class Checkpoint:
    """Saves and loads the parts of a run.

    Parameters
    ----------
    path : of the file. parts : by name; names hold no ``/``.
    run : JSON-able facts that must be equal when the run is taken up, such as the recipe.
    """

    def __init__(
        self, path: str | Path, parts: Mapping[str, Resumable], run: Mapping[str, Any]
    ) -> None:
        self.path, self.parts = Path(path), dict(parts)
        self.run = json.loads(json.dumps(run, default=str))

    @classmethod
    def of(cls, path: str | Path, batches: Iterator[Tensor], trainer: Any) -> Self:
        """Of one trainer and its stream.

        Raises
        ------
        GossamerError
            If the stream cannot tell its place.
        """
        if not isinstance(batches, Stream):
            raise GossamerError(
                f"a checkpoint needs a stream that knows its place, not {type(batches).__name__}; "
                "use ActivationSource(...).batches(size)"
            )
        run = describe(batches, trainer)
        return cls(path, {"trainer": trainer, "stream": batches}, run)

    def save(self) -> None:
        """Write the file in one move.

        Raises
        ------
        GossamerError
            If it cannot be written; the one before stays.
        """
        tensors = {
            f"{part}/{name}": tensor.detach().cpu().contiguous().clone()
            for part, owner in self.parts.items()
            for name, tensor in owner.state().items()
        }
        name = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            os.close(handle)
            save_file(tensors, name, {"run": json.dumps(self.run)})
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except (OSError, SafetensorError) as error:
            raise GossamerError(
                f"the checkpoint {self.path} cannot be written ({error}); free space and run the "
                "same command again: it goes on from the last whole checkpoint"
            ) from None
        finally:
            if name and os.path.exists(name):
                os.unlink(name)

    def resume(self) -> bool:
        """Load the file if there is one; whether there was.

        Raises
        ------
        GossamerError
            If it is damaged or of another run.
        """
        if not self.path.exists():
            return False
        states: dict[str, dict[str, Tensor]] = {part: {} for part in self.parts}
        try:
            with safe_open(self.path, framework="pt") as file:
                run = json.loads((file.metadata() or {}).get("run", "null"))
                for key in file.keys():
                    part, _, name = key.partition("/")
                    states.setdefault(part, {})[name] = file.get_tensor(key)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise GossamerError(
                f"{self.path} is no checkpoint of a dictionary ({error}); remove it to start anew"
            ) from None
        if run != self.run or set(states) != set(self.parts):
            wrong = sorted(
                k for k in self.run if not isinstance(run, dict) or run.get(k) != self.run[k]
            )
            raise GossamerError(
                f"the checkpoint {self.path} is of another run: {', '.join(wrong) or 'its parts'} "
                "differ; remove it to start anew, or name another file"
            )
        for part, owner in self.parts.items():
            owner.load(states[part])
        return True

    def remove(self) -> None:
        """Delete the file of a run that is finished."""
        self.path.unlink(missing_ok=True)


def describe(stream: Stream, trainer: Any) -> dict[str, Any]:
    """What must be equal for a run to be taken up: recipe, rule, rows, batch and shape."""
    metadata = getattr(stream.rows, "metadata", None)
    rule = trainer.dictionary.rule
    fields = {k: v for k, v in vars(rule).items() if isinstance(v, int | float | str | tuple)}
    return _plain(
        {
            "recipe": trainer.recipe,
            "rule": {"name": type(rule).__name__, **fields},
            "source": {} if metadata is None else metadata(),
            "batch": stream.size,
            # A place in memory is no place in a buffer.
            "resident": stream.rows.resident() is not None,
            "shape": list(trainer.dictionary.W_dec.shape),
        }
    )


def _plain(value: Any) -> Any:
    """Dataclasses as mappings, dtypes and the like as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, torch.dtype) else value
