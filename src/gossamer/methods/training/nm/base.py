"""What the methods share that train dense weights behind an N:M mask.

Three numbers at every update describe them: the share of a removed weight that the forward pass
sees, the share of its gradient that reaches it, and the decay that pulls it towards zero.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import NM, Pattern
from gossamer.methods.training.base import Change, SparseTraining, Sparsifier
from gossamer.methods.training.nm.adam import Decay
from gossamer.methods.training.nm.sparsifier import NMSparsifier
from gossamer.methods.training.nm.trained import NMTrained
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.layers import Layer, Quota, plain_module
from gossamer.methods.training.sparsifier.trained import SparselyTrained, copy_of

__all__ = ["BehindMask", "Taught"]


@dataclass(frozen=True, kw_only=True)
class BehindMask(SparseTraining):
    """Base of the N:M methods: dense weights train, the network computes with masked ones.

    N:M means N KEPT of M. Leave ``sparsity`` out for the same N in every layer; with a sparsity
    and an allocation, N varies by layer. Times t count updates done, from 0.
    """

    patterns: ClassVar[tuple[str, ...]] = ("N:M",)
    keeper: ClassVar[type[Sparsifier]] = NMSparsifier
    example: ClassVar[Mapping[str, Any]] = {"steps": 4, "batch_size": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    pattern: Pattern = NM(2, 4)

    @property
    def initial_sparsity(self) -> float:
        return self.final_sparsity

    def sparsity_at(self, update: int) -> float:
        """Sparsity of the mask; whether the network already computes with it, the method says."""
        return self.final_sparsity

    def change(self, update: int) -> Change | None:
        """Nothing of the usual kind: masks follow the weights, see :meth:`refreshes`."""
        return None

    def quotas_at(self, layers: tuple[Layer, ...], t: int) -> dict[str, Quota]:
        """What every layer keeps."""
        return self.quotas(layers, self.final_sparsity)

    @abstractmethod
    def refreshes(self, t: int) -> bool:
        """Whether masks are chosen anew before an update."""

    @abstractmethod
    def removed_share(self, t: int) -> float:
        """Share of a removed weight that the forward pass sees: 0 masks, 1 is dense."""

    def gradient_share(self, t: int) -> float:
        """Share of its gradient that reaches a removed weight: 1 is straight through."""
        return 1.0

    def decay(self, t: int, lr: float) -> Decay | None:
        """What pulls removed weights at an update of this learning rate."""
        return None

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SparselyTrained:
        """Take up the stored masks, and branches, of a loaded model."""
        return NMTrained.again(self, model, meta, tensors)

    @property
    def keeps_dense(self) -> bool:
        """Whether the dense weights need a place of their own while the network computes."""
        return True

    @property
    def changes_adam(self) -> bool:
        """Whether the method changes Adam's update, and so takes no other optimizer."""
        return False

    @property
    def scales(self) -> int:
        """Trained scales of every output; 0 for none."""
        return 0

    @property
    def low_rank_block(self) -> int:
        """Inputs of a block of the low-rank branch; 0 for none."""
        return 0

    @property
    def distilled_share(self) -> float:
        """Share of the loss that is divergence from the dense model."""
        return 0.0

    @property
    def distilled_temperature(self) -> float:
        """Temperature of that divergence."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Taught(BehindMask):
    """Base of those whose teacher is the dense model they begin with."""

    def attach(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        undo: bool = False,
        masters: Mapping[str, Any] | None = None,
        state: Mapping[str, Any] | None = None,
        loss: StartLoss | None = None,
        teacher: nn.Module | None = None,
    ) -> Sparsifier:
        """As :meth:`SparseTraining.attach`.

        Parameters
        ----------
        teacher : the dense model; a copy of ``model`` by default. Going on from a ``state`` needs
            it, since the model is then no longer the one the training began with. It is frozen and
            in evaluation mode until the training ends.
        """
        before = copy_of(plain_module(model)) if undo else None
        return NMSparsifier(
            self,
            model,
            optimizer,
            before=before,
            masters=masters,
            state=state,
            loss=loss,
            teacher=teacher,
        )
