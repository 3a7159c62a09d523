"""DSnoT: improve a finished mask by swapping weights, without training and without gradients.

Each row's expected output is brought back to the dense one: grow the removed weight that
cancels the error most, prune a kept one of the right sign that matters little. Values stay.
"""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gossamer.core import NM, Budget, Card, GossamerError, Pattern, Selection, Stat, Unstructured
from gossamer.core.scores import weight_times_input
from gossamer.methods.weights.base import LayerView, OneShot, Pruned
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.methods.weights.sparsegpt import SparseGPT
from gossamer.methods.weights.swap import Rows, swap_in_groups, swap_in_rows
from gossamer.methods.weights.wanda import Wanda

__all__ = ["DSnoT"]

_Base = Literal["wanda", "magnitude", "sparsegpt"]
_BASES: dict[str, OneShot] = {
    "wanda": Wanda(),
    "magnitude": Magnitude(),
    "sparsegpt": SparseGPT(),
}


@dataclass(frozen=True, kw_only=True)
class DSnoT(OneShot):
    """Refine the mask of another method by swaps inside every row.

    Parameters
    ----------
    pattern : of the first mask: ``"row"``, ``"layer"``, ``"model"`` or N:M. Swaps stay inside a
        row, and with N:M inside a group, so every row and group keeps its count.
    base : the method that makes the first mask. With ``sparsegpt`` the survivors carry its
        updated values, and weights that come back their original ones.
    max_cycles : swaps tried in a row at most, at least 1.
    threshold : a row rests when its expected error is no more than this share of what it was
        under the first mask, 0 <= threshold <= 1. Being relative it does not depend on how long
        the calibration sequences are or how inputs are scaled.
    power : exponent of the input's variance that a returning weight's effect is divided by;
        0 ignores the variance.
    same_sign : a row ends before a swap that would turn the sign of its expected error. The
        paper stops there; the official code by default does not, which loses more on the packaged
        model.
    """

    card: ClassVar = Card(
        title="Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
        year=2023,
        arxiv="2310.08915",
        system="dsnot",
        family="weights",
        when="after training",
        site="linear weight",
        score="grow: w · mean(x) / var(x); prune: |w| · ‖x‖₂ among one sign of w · mean(x)",
        pattern="unstructured by row, N:M",
        budget="that of the first mask; any allocation",
        update="none beyond the first mask's",
        departs="MLP layers are refined too, the official code skips them by default; the stop is "
        "relative to a row's first error, not 0.1 for a sequence's sum; means are taken over "
        "tokens (with a relative stop any constant factor drops out), the variance over all "
        "tokens, not inside sequences; a row without a candidate of the right sign ends; with N:M "
        "the weight pruned has the sign the rule asks for too, the official code takes the least "
        "of the group; same_sign is on, as in the paper, the official code leaves it off",
    )
    needs: ClassVar = frozenset({Stat.INPUT_L2, Stat.INPUT_MOMENTS})

    pattern: Pattern = Unstructured(per="row")
    base: _Base = "wanda"
    max_cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    same_sign: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, Unstructured | NM):
            raise GossamerError(
                f"dsnot refines masks by row, layer, model or N:M; got pattern {self.pattern}: "
                "choose one of these, or another method"
            )
        if self.base not in get_args(_Base):
            raise GossamerError(f"base is {self.base!r}; choose from {', '.join(get_args(_Base))}")
        if not isinstance(self.max_cycles, int) or self.max_cycles < 1:
            raise GossamerError(
                f"max_cycles is {self.max_cycles!r}; give a whole number, at least 1"
            )
        if not 0 <= self.threshold <= 1:
            raise GossamerError(
                f"threshold is {self.threshold!r}; it is a share of the first error, 0 to 1"
            )
        if not isfinite(self.power) or self.power < 0:
            raise GossamerError(f"power is {self.power!r}; give a number of at least 0")

    @property
    def measures(self) -> frozenset[Stat]:
        return self.needs | _BASES[self.base].measures

    def score(self, layer: LayerView) -> Tensor:
        return _BASES[self.base].score(layer)

    def prune(self, layer: LayerView, pattern: Pattern, budget: Budget) -> Pruned:
        first = _BASES[self.base].prune(layer, pattern, budget)
        dense, keep = layer.weight.float(), first.selection.mask()
        values = dense if first.weight is None else torch.where(keep, first.weight, dense)
        rows = self._rows(layer, dense, values, keep)
        mask = swap_in_groups(rows, pattern.of) if isinstance(pattern, NM) else swap_in_rows(rows)
        weight = None if first.weight is None else values.masked_fill(~mask, 0)
        return Pruned(Selection.from_mask(mask, first.selection.kept), weight, first.warnings)

    def _rows(self, layer: LayerView, dense: Tensor, values: Tensor, keep: Tensor) -> Rows:
        """What swapping looks at, from the layer's measured inputs."""
        mean, variance = layer.stat(Stat.INPUT_MOMENTS)
        part = values * mean
        # Only the order counts, so variances are taken relative to their mean; an input that
        # never varies would divide by zero, and is the first to come back.
        usual = variance.mean()
        spread = (variance / torch.where(usual > 0, usual, 1.0)).clamp_min(1e-6).pow(self.power)
        lost = torch.where(keep, dense * mean - part, part)
        error = lost.sum(1, dtype=torch.float64)
        return Rows(
            keep=keep,
            part=part,
            growth=part / spread,
            rank=weight_times_input(values, layer.stat(Stat.INPUT_L2)),
            error=error,
            stop=self.threshold * error.abs(),
            cycles=self.max_cycles,
            same_sign=self.same_sign,
        )
