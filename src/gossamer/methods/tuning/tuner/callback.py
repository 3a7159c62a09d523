"""A tuning inside transformers' Trainer, as a callback."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gossamer.core import GossamerError
from gossamer.methods.tuning.tuner.tuned import Tuned
from gossamer.methods.tuning.tuner.tuner import Tuner
from gossamer.models.checkpoint import read_checkpoint, write_checkpoint

__all__ = ["STATE_FILE", "TunerCallback", "read_state", "write_state"]

STATE_FILE = "gossamer_tuner.safetensors"


def write_state(state: Mapping[str, Any], path: str | Path) -> None:
    """Write what ``Tuner.state_dict`` gave."""
    plain = {name: value for name, value in state.items() if name != "tensors"}
    write_checkpoint(path, plain, state["tensors"])


def read_state(path: str | Path) -> dict[str, Any]:
    """What :func:`write_state` wrote, for ``attach(..., state=...)``.

    Raises
    ------
    GossamerError
        If the file is missing or none of ours.
    """
    plain, tensors = read_checkpoint(path, "a tuning")
    return {**plain, "tensors": tensors}


class TunerCallback(TrainerCallback):
    """Step a tuner after every update and finish it at the end.

    Attach before the Trainer is made, since it makes the optimizer from the model. The schedule
    lasts as long as the Trainer's. The state is written into every checkpoint and taken up again
    when training resumes from one in the Trainer's ``output_dir``.

    Parameters
    ----------
    tuner : of ``Method(...).attach(model)``. fold : see :meth:`Tuner.finish`.

    Raises
    ------
    GossamerError
        If it is none.

    Attributes
    ----------
    applied : after training, what reports, saves, restores.

    Examples
    --------
    ::

        callback = TunerCallback(PST(sparsity=0.8).attach(model))
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        callback.applied.save("sparse-model")
    """

    def __init__(self, tuner: Tuner, *, fold: bool = True) -> None:
        if not isinstance(tuner, Tuner):
            got = (
                f"the class {tuner.__name__}"
                if isinstance(tuner, type)
                else repr(tuner).split("(")[0]
            )
            raise GossamerError(
                f"TunerCallback takes a tuner at work, PST(...).attach(model); got {got}"
            )
        self.tuner = tuner
        self.fold = fold
        self.applied: Tuned | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take over the Trainer's length, or go on where the checkpoint was written."""
        if self.applied is not None:
            raise GossamerError("the tuner has finished; attach again and make a new callback")
        self.tuner.method = self.tuner.method.lasting(state.max_steps)
        if state.global_step:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            self.tuner.load_state_dict(read_state(folder / STATE_FILE))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Choose masks anew where it is time."""
        self.tuner.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write what trains and the masks into the checkpoint."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            write_state(self.tuner.state_dict(), folder / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Fold, or leave the adapters beside the weights."""
        self.applied = self.tuner.finish(fold=self.fold)
