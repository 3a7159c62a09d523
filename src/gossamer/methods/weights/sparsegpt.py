"""SparseGPT: remove weights in order, and let the weights still to come make up for each loss.

Second-order pruning (optimal brain surgeon) with one Hessian for all rows of a layer, that of
the squared error of the layer's outputs on calibration text. Survivors change.
"""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor

from gossamer.core import (
    NM,
    Budget,
    Card,
    GossamerError,
    Pattern,
    Selection,
    Stat,
    Unstructured,
)
from gossamer.core.scores import obs_saliency
from gossamer.methods.weights.base import LayerView, OneShot, Pruned
from gossamer.methods.weights.compensate import Factor, compensate, factorise

__all__ = ["SparseGPT"]


@dataclass(frozen=True, kw_only=True)
class SparseGPT(OneShot):
    """Prune linear layers with second-order compensation of the survivors.

    Columns (inputs) are taken in blocks. Unstructured, the weights of a block compete when the
    block's turn comes; N:M, each group of M columns decides when its turn comes. Every
    removal is spread over the columns still to come.

    Parameters
    ----------
    pattern : ``"layer"`` lets all rows of a block compete, so that rows differ in sparsity, as in
        the paper; ``"row"`` removes the same number from every row of a block; N:M; ``"model"``
        takes each layer's share from a competition of ``w² / [H⁻¹]_jj`` on the dense model.
    block_size : columns of a block; rounded down to whole groups of M.
    damping : added to the Hessian's diagonal, as a share of its mean, 0 < damping <= 1. Ten and a
        hundred times as much is tried where the Hessian is not positive definite, and if that
        fails the layer is pruned by its diagonal alone, without compensation; both are warned of.
    """

    card: ClassVar = Card(
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        year=2023,
        arxiv="2301.00774",
        family="weights",
        when="after training",
        site="linear weight",
        score="w² / [H⁻¹]_jj",
        pattern="unstructured per block of columns (row, layer, model), N:M",
        budget="sparsity; any allocation",
        update="the later columns of a row absorb each removed weight's error",
        departs="the factor of the inverse Hessian is not formed (same result, fewer operations); "
        "exactly round((1 - s) n) weights stay in a layer; an input that was never active keeps "
        "the weights its budget leaves it and has no part in the damping's mean, the official code "
        "zeroes them all; weights that are "
        "zero already stay zero; no joint quantisation",
    )
    needs: ClassVar = frozenset({Stat.HESSIAN})

    pattern: Pattern = Unstructured(per="layer")
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, Unstructured | NM):
            raise GossamerError(
                f"sparsegpt prunes by row, layer, model or N:M; got pattern {self.pattern}: "
                "choose one of these, or another method"
            )
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise GossamerError(
                f"block_size is {self.block_size!r}; give a number of columns, at least 1"
            )
        if not isfinite(self.damping) or not 0 < self.damping <= 1:
            raise GossamerError(
                f"damping is {self.damping!r}; it is a share of the mean curvature, "
                "0 < damping <= 1"
            )

    def prune(self, layer: LayerView, pattern: Pattern, budget: Budget) -> Pruned:
        factor = self._factor(layer)
        rows, columns = layer.weight.shape
        block = together = min(self.block_size, columns)
        if isinstance(pattern, NM):
            together = pattern.of
            block = max(1, block // together) * together
        per_row = pattern == Unstructured("row")
        total = budget.count(columns if per_row else rows * columns)

        def choose(start: int, score: Tensor) -> Tensor:
            if isinstance(pattern, NM):
                return pattern.select(score.T, budget).mask().T
            # Whole numbers that add up to the total whatever the blocks.
            end = start + len(score)
            share = Budget(keep=total * end // columns - total * start // columns)
            if per_row:
                return pattern.select(score.T, share).mask().T
            return pattern.select(score, share).mask()

        mask, weight = compensate(layer.weight, factor, block, together, choose)
        return Pruned(Selection.from_mask(mask), weight, factor.warnings)

    def score(self, layer: LayerView) -> Tensor:
        return obs_saliency(layer.weight, self._factor(layer).inverse_diagonal())

    def _factor(self, layer: LayerView) -> Factor:
        """The layer's factor; layers that read the same input, one after the other, share it."""
        hessian = layer.stat(Stat.HESSIAN)
        last = layer.memo.get("factor")
        if last is None or last[0] is not hessian:
            last = layer.memo["factor"] = (hessian, factorise(hessian, self.damping))
        return last[1]
