"""WINA: weigh each input by the norm of the weights that read it, where columns are orthogonal.

Dropping channels D costs |sum over D of x_j W[:, j]|; with orthogonal columns that is exactly the
root of the sum of (x_j |W[:, j]|)², so keeping the largest |x_j| |W[:, j]| is optimal. A rotation
that changes nothing else makes the columns of W_k and W_gate orthogonal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from gossamer.core import Card, Site
from gossamer.methods.activations.base import Policy, Thresholded
from gossamer.methods.activations.gated import Beneath
from gossamer.methods.activations.levels import column_norms
from gossamer.methods.activations.rotation import GATE_ROLES, KEY_ROLES, Rotation
from gossamer.models import SiteMap

__all__ = ["WINA"]


@dataclass(frozen=True, kw_only=True)
class WINA(Thresholded):
    """Gate the input of every linear layer by |x_j| times the norm of column j.

    Parameters
    ----------
    transform : rotate the model so that W_k and W_gate (or the fused matrices) have orthogonal
        columns, and weigh only those; all others are gated by |x_j|. Needs RMSNorm in front of
        attention and gated MLP, and no experts. Without it the model stays as it is and every
        matrix is weighed by its column norms, on any architecture.
    policy : ``topk`` keeps the same number of channels for every token, as the paper's
        evaluation does; ``quantile`` compares with one calibrated threshold.

    The rotation costs two square matrices a block that every token reads; they are counted
    against the weights not read. Saved models hold the weights as they were.

    Source: arXiv 2505.19427, §3.

    Departs from the paper: by default nothing is rotated (``transform=False``) and every matrix
    gets the same sparsity; the basis changes behind the norms, not on the residual shortcuts: the
    same function with and without masks and the same bytes, while embeddings, head and writers
    stay as they are; nothing is mean-centred, which would change an RMSNorm model; kept channels
    are rounded to the nearest count, not down; every token but a short prefix is masked.
    """

    card: ClassVar[Card] = Card(
        title="WINA: Weight Informed Neuron Activation for Accelerating Large Language Model "
        "Inference",
        system="wina",
        year=2025,
        arxiv="2505.19427",
        family="activations",
        when="inference",
        masks="dynamic",
        site="input of every linear layer of a block",
        score="|x_j| ||W[:, j]||",
        pattern="any channel, per token",
        budget="sparsity, as a count per token or a calibrated threshold",
        schedule="calibrated once",
        update="none",
        kernel="masked dense",
        departs="basis changes behind norms, not on shortcuts; no mean-centring; prefix dense",
    )
    paper_dense: ClassVar[float | None] = 0.01

    policy: Policy = "topk"
    transform: bool = False

    def channel_weight(self, site: Site, weight: Tensor) -> Tensor | None:
        if self.transform and site.role not in (*KEY_ROLES, *GATE_ROLES):
            return None
        return column_norms(site, weight)

    def _beneath(self, model: nn.Module, sites: SiteMap) -> Beneath | None:
        return Rotation(model, sites) if self.transform else None

    def _beneath_again(
        self, model: nn.Module, sites: SiteMap, tensors: Mapping[str, Tensor]
    ) -> Beneath | None:
        return Rotation(model, sites, tensors) if self.transform else None
