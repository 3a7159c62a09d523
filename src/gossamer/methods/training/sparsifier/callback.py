"""Sparse training inside transformers' Trainer, as a callback."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.checkpoint import STATE_FILE, read_state, write_state
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier
from gossamer.methods.training.sparsifier.trained import SparselyTrained

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["SparsifierCallback"]


class SparsifierCallback(TrainerCallback):
    """Attach a method when training begins, step it after every update, finish it at the end.

    The schedule lasts as long as the Trainer's; the method's ``steps`` are not read. The state is
    written into every checkpoint and taken up again when training resumes from one in the
    Trainer's ``output_dir``.

    Parameters
    ----------
    method : a method of sparse training. undo : see its ``attach``.

    Attributes
    ----------
    sparsifier : while training. applied : after it, what reports, saves, restores.

    Examples
    --------
    ::

        callback = SparsifierCallback(RigL(sparsity=0.9))
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        callback.applied.save("sparse-model")
    """

    def __init__(self, method: "SparseTraining", *, undo: bool = False) -> None:
        self.method = method
        self.undo = undo
        self.sparsifier: Sparsifier | None = None
        self.applied: SparselyTrained | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Make the model sparse, or go on where the checkpoint was written."""
        assert model is not None
        self.end()
        saved = None
        if state.global_step:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            saved = read_state(folder / STATE_FILE)
            if self.undo:
                raise GossamerError(
                    "undo cannot restore what a training had before it was resumed; leave it out"
                )
        method = self.method.lasting(state.max_steps)
        self.sparsifier = method.attach(model, optimizer, undo=self.undo, state=saved)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Hold and change the masks."""
        assert self.sparsifier is not None
        self.sparsifier.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the masks into the checkpoint."""
        if self.sparsifier is not None and state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            write_state(self.sparsifier.state_dict(), folder / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the hooks off; :attr:`applied` then stands for the sparse model."""
        assert self.sparsifier is not None
        self.applied = self.sparsifier.finish()
        self.sparsifier = None

    def end(self) -> None:
        """Take the hooks off after a training that was interrupted."""
        if self.sparsifier is not None:
            self.sparsifier.remove()
            self.sparsifier = None
