"""A model trained under an attention pattern: the pattern stays, undoing gives back the weights."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gossamer.methods.attention.applied import SparseAttention
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.selector import Selector
from gossamer.models import Inputs, Progress, Tokens
from gossamer.models.fit import FitPlan, fit, in_float32

__all__ = ["TrainedAttention"]

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
    ) -> None:
        self._give_back: Undo | None = None
        self.losses: tuple[float, ...] = ()
        super().__init__(method, model, selector, length)

    def train(
        self, samples: Tokens | Inputs, plan: FitPlan, progress: Progress | None = None
    ) -> None:
        """Train the model with the pattern in place; on any failure the method is undone.

        Half-precision weights are held in float32 meanwhile.
        """
        if not plan.steps:
            return
        self._give_back = _remember(self.model.parameters())
        try:
            with in_float32(self.model):
                what = f"training under {self.method.key()}"
                self.losses = fit(self.model, samples, plan, progress=progress, what=what)
        except BaseException:
            self.restore()
            raise
        # Training is no use of the trained model.
        self.ran.clear()
        self.guarded = 0
        self.simulated = self.selector.simulated(self.method.backend, self.length)

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


def _remember(parameters: Iterable[Tensor]) -> Undo:
    """Keep a copy of values; calling what is returned writes them back."""
    kept = [(tensor, tensor.detach().clone()) for tensor in parameters]

    @torch.no_grad()
    def back() -> None:
        for tensor, value in kept:
            tensor.copy_(value)

    return back
