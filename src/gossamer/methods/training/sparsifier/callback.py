"""Sparse training inside transformers' Trainer, as a callback."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gossamer.core import GossamerError
from gossamer.methods.training.base import SparseTraining
from gossamer.methods.training.nm.distillation import frozen_copy
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.checkpoint import (
    STATE_FILE,
    TEACHER_FILE,
    read_state,
    take_teacher,
    write_state,
    write_teacher,
)
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier
from gossamer.methods.training.sparsifier.trained import SparselyTrained
from gossamer.methods.training.tickets.rewinding import Rewinding
from gossamer.models import load_model

__all__ = ["SparsifierCallback"]


class SparsifierCallback(TrainerCallback):
    """Attach a method when training begins, step it after every update, finish it at the end.

    The schedule lasts as long as the Trainer's; the method's ``steps`` are not read. The state is
    written into every checkpoint and taken up again when training resumes from one in the
    Trainer's ``output_dir``.

    Parameters
    ----------
    method : a method of sparse training. undo : see its ``attach``.
    teacher : the dense model, for methods that distil from it: a module, or a folder or name to
        load it from. By default a copy of the model as training begins, which then lies once in
        ``output_dir`` beside the checkpoints, so that a resumed training finds it.
    loss : function of the model to the loss of a batch or a few, for methods that score the
        network before it trains. data : batches, for methods that search on them.

    Raises
    ------
    GossamerError
        If the method does not fit into one run of a Trainer, or lacks what it starts from.

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

    def __init__(
        self,
        method: SparseTraining,
        *,
        undo: bool = False,
        teacher: nn.Module | str | Path | None = None,
        loss: StartLoss | None = None,
        data: Iterable[Any] | None = None,
    ) -> None:
        _check(method, teacher, {"loss": loss, "data": data})
        self.loss = loss
        self.data = data
        self.method = method
        self.undo = undo
        self.teacher = teacher
        self._unwritten: nn.Module | None = None
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
        more: dict[str, Any] = {"loss": self.loss}
        if self.data is not None:
            more["data"] = self.data
        if getattr(method, "distilled_share", 0.0):
            more["teacher"] = self._teacher(model, Path(args.output_dir or "."), saved is not None)
        self.sparsifier = method.attach(model, optimizer, undo=self.undo, state=saved, **more)

    def _teacher(self, model: nn.Module, folder: Path, resumed: bool) -> nn.Module:
        """The dense model: given, loaded, copied, or found where a training before left it."""
        if isinstance(self.teacher, nn.Module):
            return self.teacher
        first = next(model.parameters())
        if self.teacher is not None:
            given: dict[str, Any] = {"dtype": first.dtype, "device": first.device, "kind": "any"}
            return load_model(self.teacher, **given).model
        copy = frozen_copy(model, self.method.key())
        if resumed:
            take_teacher(copy, folder / TEACHER_FILE)
        else:
            self._unwritten = copy
        return copy

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
        if self.sparsifier is None:
            return
        folder = Path(args.output_dir or ".")
        if state.is_world_process_zero or self.sparsifier.sharded:
            saved = self.sparsifier.state_dict()
            write_state(saved, folder / f"checkpoint-{state.global_step}" / STATE_FILE)
        if state.is_world_process_zero and self._unwritten is not None:
            write_teacher(self._unwritten, folder / TEACHER_FILE)
        self._unwritten = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the hooks off; :attr:`applied` then stands for the sparse model."""
        assert self.sparsifier is not None
        self.applied = self.sparsifier.finish()
        self.sparsifier = self._unwritten = None

    def end(self) -> None:
        """Take the hooks off after a training that was interrupted."""
        if self.sparsifier is not None:
            self.sparsifier.remove()
            self.sparsifier = self._unwritten = None


def _check(method: object, teacher: object, start: dict[str, Any]) -> None:
    """Refuse what cannot become one run of a Trainer."""
    if not isinstance(method, SparseTraining):
        got = (
            f"the class {method.__name__}"
            if isinstance(method, type)
            else repr(method).split("(")[0]
        )
        raise GossamerError(
            "SparsifierCallback takes a method of sparse training that attaches, such as "
            f"RigL(sparsity=0.9); got {got}"
        )
    key, needs = method.key(), method.starts_from
    if issubclass(method.keeper, Rewinding):
        raise GossamerError(
            f"{key} trains several times and rewinds, which one run of a Trainer does not; call "
            "find_ticket of gossamer.methods.training.tickets.rounds, or apply(model, data)"
        )
    if teacher is not None and not getattr(method, "distilled_share", 0.0):
        raise GossamerError(f"{key} as given does not distil; leave teacher out")
    if start["data"] is not None and needs != "data":
        raise GossamerError(f"{key} searches on no data; leave data out")
    if needs is not None and all(value is None for value in start.values()):
        what = "a function of the model to a loss" if needs == "loss" else "batches to search on"
        raise GossamerError(
            f"{key} looks at the network before it trains; give {needs}=, {what}: "
            f"SparsifierCallback(method, {needs}=...)"
        )
