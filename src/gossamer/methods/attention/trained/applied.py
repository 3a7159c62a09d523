"""A model trained under an attention pattern: the pattern stays, undoing gives back the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.attention.applied import SparseAttention
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.selector import Selector
from gossamer.models import Inputs, Progress, Tokens, as_tokens, context_length
from gossamer.models.fit import FitPlan, fit, in_float32

__all__ = ["TrainedAttention", "as_samples", "train_under"]

Undo = Callable[[], None]


class TrainedAttention(SparseAttention):
    """An attention pattern at work in a model that was trained under it.

    Attributes
    ----------
    losses : of every update, before it; empty after loading.
    """

    def __init__(
        self,
        method: AttentionMethod,
        model: nn.Module,
        selector: Selector,
        length: int,
        give_back: Undo | None = None,
    ) -> None:
        self._give_back = give_back
        self.losses: tuple[float, ...] = ()
        super().__init__(method, model, selector, length)

    @property
    def rewrites(self) -> bool:
        return self._give_back is not None

    def _undo(self) -> None:
        super()._undo()
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def _notes(self) -> tuple[str, ...]:
        if not self.losses:
            return super()._notes()
        tenth = max(1, len(self.losses) // 10)
        first, last = sum(self.losses[:tenth]) / tenth, sum(self.losses[-tenth:]) / tenth
        return (
            *super()._notes(),
            f"trained for {len(self.losses)} updates under the pattern; loss {first:.3f} over the "
            f"first {tenth}, {last:.3f} over the last",
        )


def as_samples(data: Any, model: nn.Module) -> Tokens | Inputs:
    """Training data: inputs with ``input_ids`` and ``labels`` as they are, all else as tokens.

    Raises
    ------
    GossamerError
        If ready-made inputs hold no token ids, or the samples are longer than the model's context.
    """
    if isinstance(data, Inputs) and "input_ids" not in data.values:
        raise GossamerError(
            f"the inputs hold {', '.join(data.values)}; give input_ids, and labels to score some "
            "of them only"
        )
    samples = data if isinstance(data, Inputs) else as_tokens(data, model)
    length, limit = sample_length(samples), context_length(model)
    if limit is not None and length > limit:
        raise GossamerError(
            f"samples of {length} tokens are over the model's limit of {limit}; cut them"
        )
    return samples


def sample_length(samples: Tokens | Inputs) -> int:
    """Tokens of a sample, padding included."""
    return samples.length if isinstance(samples, Tokens) else samples.values["input_ids"].shape[1]


def train_under(
    work: TrainedAttention,
    samples: Tokens | Inputs,
    plan: FitPlan,
    *,
    progress: Progress | None = None,
) -> TrainedAttention:
    """Train the model with the pattern in place; on any failure the model is as before.

    Half-precision weights are held in float32 meanwhile.

    Parameters
    ----------
    work : just applied. samples : see :func:`as_samples`. plan : 0 steps train nothing.
    """
    if not plan.steps:
        return work
    work._give_back = _remember(work.model.parameters())
    try:
        with in_float32(work.model):
            what = f"training under {work.method.key()}"
            work.losses = fit(work.model, samples, plan, progress=progress, what=what)
    except BaseException:
        work.restore()
        raise
    # Training is no use of the trained model.
    work.ran.clear()
    work.simulated = work.selector.simulated(work.method.backend, work.length)
    return work


def _remember(parameters: Iterable[Tensor]) -> Undo:
    """Keep a copy of values; calling what is returned writes them back."""
    kept = [(tensor, tensor.detach().clone()) for tensor in parameters]

    @torch.no_grad()
    def back() -> None:
        for tensor, value in kept:
            tensor.copy_(value)

    return back
