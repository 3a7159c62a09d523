"""Difference in means: add the vector from one group's mean activation to the other's.

The plainest steering there is, and the baseline of every other: nothing is learned but two means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from gossamer.core import Card, GossamerError
from gossamer.methods.control.base import Affine, ContrastMethod, Edit, Plan
from gossamer.methods.features.editing import Pooling, gathered, middle_block
from gossamer.models import Progress, Tokens
from gossamer.models.labelled import Labelled

__all__ = ["DifferenceInMeans", "mean_difference"]


def mean_difference(
    model: nn.Module, source: Tokens, target: Tokens, path: str, pooling: Pooling = "last"
) -> Tensor:
    """(D,): mean activation of the target's windows minus that of the source's."""
    start = gathered(model, source, (path,), pooling)[path]
    end = gathered(model, target, (path,), pooling)[path]
    return end.mean(0) - start.mean(0)


@dataclass(frozen=True, kw_only=True)
class DifferenceInMeans(ContrastMethod):
    """Steer by adding the difference of two groups' mean activations to one module's output.

    Parameters
    ----------
    hook : module whose output is shifted; None: the middle block.
    pooling : what of a window counts: its ``last`` token or the ``mean`` of its tokens.

    Source: arXiv 2312.06681, §3. Departs from the paper: texts need not come in pairs.
    """

    card: ClassVar[Card] = Card(
        title="Steering Llama 2 via Contrastive Activation Addition",
        year=2023,
        arxiv="2312.06681",
        family="control",
        when="inference",
        start="dense",
        masks="none",
        site="output of any module",
        score="none",
        pattern="dense",
        budget="one vector",
        update="none",
        kernel="fused add",
        departs="texts need not come in pairs",
    )
    example: ClassVar[Mapping[str, Any]] = {"source": "0", "target": "1"}

    hook: str | None = None
    pooling: Pooling = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling not in get_args(Pooling):
            raise GossamerError(f"pooling is {self.pooling!r}; give 'last' or 'mean'")

    def plan(self, model: nn.Module, data: Labelled, progress: Progress | None = None) -> Plan:
        path = middle_block(model) if self.hook is None else self.hook
        shift = mean_difference(model, *self.sides(data), path, self.pooling)
        note = f"moves {path} by {float(shift.norm()):.3f} towards {self.target!r}"
        return Plan((Edit(path, Affine.added(shift)),), (note,))
