"""CHESS: a threshold per channel, so that every neuron is dropped at the same expected cost.

Dropping the gate value g_j costs about g_j² E[u_j²], where u = W_u x multiplies it. In attention
the inputs of q and o are gated; k and v, which the cache keeps for later tokens, stay dense.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from gossamer.core import Card, Site
from gossamer.methods.activations.base import Thresholded
from gossamer.methods.activations.gates import Tap
from gossamer.methods.activations.neurons import NEURONS
from gossamer.models import SiteMap

__all__ = ["CHESS"]


@dataclass(frozen=True, kw_only=True)
class CHESS(Thresholded):
    """Gate neurons by |g_j| rms(u_j), and the inputs of q and o by |x_j|.

    Parameters
    ----------
    attention : gate q and o too; without it only the neurons of the MLPs are gated.

    With u_j of unit size everywhere the neurons' gates are those of CATS, which is also what an
    MLP without a gate matrix gets. The score leaves |W_d[:, j]| out, so it changes when a scale
    moves between W_u and W_d; ``invariant`` is the score that does not.

    Source: arXiv 2409.01366.

    Departs from the paper: quantiles are of all calibration values together, not means over 16
    chunks; a fused query-key-value matrix stays dense, for k and v must; every token but a short
    prefix is masked.
    """

    card: ClassVar[Card] = Card(
        title="CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective "
        "Sparsification",
        system="chess",
        year=2024,
        arxiv="2409.01366",
        family="activations",
        when="inference",
        masks="dynamic",
        site="activated gate of the MLP; inputs of q and o",
        score="|g_j| sqrt(E[u_j^2]); |x_j| in attention",
        pattern="any channel, per token",
        budget="sparsity, as calibrated thresholds per channel",
        schedule="calibrated once",
        update="none",
        kernel="masked dense",
        departs="pooled quantiles; fused qkv stays dense; all tokens but a prefix masked",
    )
    roles: ClassVar[tuple[str, ...]] = ("attention.q", "attention.o", NEURONS)
    paper_dense: ClassVar[float | None] = 0.0
    up_weighted: ClassVar[bool] = True

    sparsity: float = 0.5
    attention: bool = True

    def _places(self, model: nn.Module, sites: SiteMap, block: int) -> tuple[Tap, ...]:
        places = super()._places(model, sites, block)
        return tuple(p for p in places if self.attention or not p.role.startswith("attention."))

    def channel_weight(self, site: Site, weight: Tensor) -> None:
        return None
