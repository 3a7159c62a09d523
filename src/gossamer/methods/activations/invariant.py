"""The score of a neuron that does not depend on how the model is scaled.

Dropping the gate value g_j takes g_j u_j W_d[:, j] out of the MLP's output; |g_j| rms(u_j)
|W_d[:, j]| is the expected size of that, whatever scale moved between W_u and W_d.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core import Card, Site
from gossamer.methods.activations.base import Thresholded
from gossamer.methods.activations.levels import column_norms
from gossamer.methods.activations.neurons import NEURONS

__all__ = ["Invariant"]


@dataclass(frozen=True, kw_only=True)
class Invariant(Thresholded):
    """Gate the neurons of every MLP by |g_j| rms(u_j) |W_d[:, j]|.

    CATS leaves the last two factors out, CHESS the last. Multiplying row j of W_u and dividing
    column j of W_d by the same number leaves the model and this score unchanged. Nothing else is
    different from CATS: where it gates, what is skipped, how thresholds are calibrated.

    Source: no paper; the two scores completed.

    Departs from the paper: there is none.
    """

    card: ClassVar[Card] = Card(
        title="Rescaling-invariant neuron score",
        year=None,
        family="activations",
        when="inference",
        masks="dynamic",
        site="activated gate of the MLP",
        score="|g_j| rms(u_j) ||W_d[:, j]||",
        pattern="any neuron, per token",
        budget="sparsity of the neurons, as calibrated thresholds per channel",
        schedule="calibrated once",
        update="none",
        kernel="masked dense",
        departs="there is no paper",
    )
    roles: ClassVar[tuple[str, ...]] = (NEURONS,)
    up_weighted: ClassVar[bool] = True

    sparsity: float = 0.5

    def channel_weight(self, site: Site, weight: Tensor) -> Tensor:
        return column_norms(site, weight)
