"""CETT: one error level for all layers decides how many neurons each may drop.

A layer whose small contributions cancel or hardly matter loses more neurons than one where they
add up; the level is the same everywhere.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from gossamer.core import Card, GossamerError, Stat
from gossamer.methods.activations.base import Gated
from gossamer.methods.activations.gates import Gate
from gossamer.methods.activations.levels import DOWN_ROLES, LevelGates, cett_curves, check_level
from gossamer.models import Inputs, Progress, SiteMap, Tokens

__all__ = ["CETT"]

_LEVEL = 0.2


@dataclass(frozen=True, kw_only=True)
class CETT(Gated):
    """Gate every neuron by the norm of what it adds, at one error level for all layers.

    The score |a_j| |W_d[:, j]| is that of an input gate on W_d weighted by column norms. Knowing a
    takes the gate and up products, so only columns of W_d go unread: a third of a gated MLP.

    Parameters
    ----------
    level : mean error of a layer's output, norm of the dropped sum over norm of the whole; None
        takes 0.2, or what ``sparsity`` asks for.
    sparsity : share of the columns of W_d removed in all, instead of a level; the report shows
        the level found.

    Source: arXiv 2402.03804, §3; thresholds as in the code of arXiv 2411.02335.

    Departs from the paper: thresholds are tried at 15 quantiles and bisected between them, on at
    most 1,024 tokens of a layer; experts of a layer share one threshold; a bias of the down
    projection counts on neither side; every token but a short prefix is masked.
    """

    card: ClassVar[Card] = Card(
        title="ReLU2 Wins: Discovering Efficient Activation Functions for Sparse LLMs",
        year=2024,
        arxiv="2402.03804",
        family="activations",
        when="inference",
        masks="dynamic",
        site="input of the down projection",
        score="|a_j| ||W_d[:, j]||",
        pattern="any neuron, per token",
        budget="one error level for all layers, bisected",
        schedule="calibrated once",
        update="none",
        kernel="masked dense",
        departs="thresholds bisected between quantiles, on 1,024 tokens; bias on neither side",
    )
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.INPUT_QUANTILES})
    roles: ClassVar[tuple[str, ...]] = DOWN_ROLES
    paper_dense: ClassVar[float | None] = 0.0

    level: float | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level is not None:
            check_level(self.level)
            if self.sparsity is not None:
                raise GossamerError(
                    f"level is {self.level!r} and sparsity {self.sparsity!r}; give one of them"
                )

    def _plan(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        batch_size: int,
        progress: Progress | None,
    ) -> list[Gate]:
        asked = _LEVEL if self.level is None else self.level
        levels = (asked,) if self.sparsity is None else ()
        curves = cett_curves(model, data, levels, batch_size=batch_size, progress=progress)
        level = asked if self.sparsity is None else curves.level_for(self.sparsity)
        # Exactly nothing asked for is nothing removed, exact zeros included.
        level = 0.0 if self.sparsity == 0.0 else level
        found = "asked for" if self.sparsity is None else f"found for sparsity {self.sparsity:g}"
        return LevelGates(curves.gates(level), f"error level of all layers, {found}: {level:.4f}")

    def _facts(self, gates: list[Gate]) -> tuple[str, ...]:
        return (gates.fact,) if isinstance(gates, LevelGates) else ()
