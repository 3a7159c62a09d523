"""Searched: a sparse training whose masks come from a search before it."""

from typing import TYPE_CHECKING, cast

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.decide import first_masks
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier
from gossamer.methods.training.tickets.search import Found

if TYPE_CHECKING:
    from gossamer.methods.training.concrete_ticket import ConcreteTicket

__all__ = ["Searched"]


class Searched(Sparsifier):
    """Searches when it is made, counts what that costs, and keeps the masks.

    Attributes
    ----------
    search : what was found, without the logits; None where a state was loaded, or all was kept.
    """

    search: Found | None = None

    def _begin(self, loss: StartLoss | None) -> None:
        if self.sharded:
            raise GossamerError(
                f"{self.method.key()} searches over whole weights; these are sharded over "
                "processes (FSDP): replicate the model with DistributedDataParallel"
            )
        method = cast("ConcreteTicket", self.method)
        found = method.search_masks(self.model, self.layers, loss)
        scores = method.ranked(found, self.layers, self.model)
        masks, self.quotas = first_masks(method, self.layers, self.quotas, self.held, scores)
        self._note_floors()
        self._set(masks)
        if found is not None:
            self.flops.total += found.forwards * self.flops.forward(self.flops.sizes)
            self.search = found.without_logits()

    def begin_at(self, update: int) -> None:
        """Count dense updates that came before."""
        self.updates = update
        for _ in range(update):
            self.flops.count(self.flops.sizes)

    def _remarks(self) -> tuple[str, ...]:
        found = self.search
        if found is None:
            return ()
        method = cast("ConcreteTicket", self.method)
        steps = len(found.trace)
        dense = 3.0 * self.flops.forward(self.flops.sizes) * method.steps
        some = max(1, steps // 20)
        first, last = float(found.trace[:some, 0].mean()), float(found.trace[-some:, 0].mean())
        return (
            f"search by {method.objective}: {steps} steps, objective {first:.4g} at first, "
            f"{last:.4g} in the end, expected weights {found.kept:.2f} of the budget",
            f"search and training took {self.flops.total / dense:.2f} times the operations of a "
            f"dense training; logits and Adam's state held {found.memory:,} bytes, freed before it",
        )
