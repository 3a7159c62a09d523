"""A sparse training whose first masks were searched for: the search is counted and reported."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gossamer.core.saved import taking
from gossamer.methods.training.search.search import Found
from gossamer.methods.training.search.units import UnitLayer, units_of
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.decide import first_masks
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier

if TYPE_CHECKING:
    from gossamer.methods.training.random_search import RandomSearch

__all__ = ["Searched"]


class Searched(Sparsifier):
    """Keeps the best of many random masks.

    Attributes
    ----------
    found : losses of all draws. search_flops : operations of the search, part of ``flops.total``.
    """

    own_state: ClassVar[Mapping[str, type]] = {"search": Mapping}
    found: Found
    search_flops: float = 0.0

    def _begin(self, loss: StartLoss | None) -> None:
        method = cast("RandomSearch", self.method)
        scores, self.found = method.search(self.model, self.layers, self.quotas, loss)
        masks, self.quotas = first_masks(method, self.layers, self.quotas, self.held, scores)
        self._note_floors()
        self._set(masks)
        self.search_flops = method.cost(self.flops.forward(self.kept()))
        self.flops.total += self.search_flops

    def state_dict(self) -> dict[str, Any]:
        """As of every training, with the losses of the draws."""
        search = {"losses": list(self.found.losses), "flops": self.search_flops}
        return {**super().state_dict(), "search": search}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, without another search."""
        super().load_state_dict(state)
        with taking():
            self.found = Found(tuple(map(float, state["search"]["losses"])))
            self.search_flops = float(state["search"]["flops"])

    def _remarks(self) -> tuple[str, ...]:
        found = self.found
        remarks = [
            f"search: loss before training {found.loss:.4f} under draw {found.best + 1} of "
            f"{len(found.losses)}, {found.mean:.4f} on average; it cost as much as "
            f"{self.search_flops / self.flops.update(self.kept()):.1f} updates"
        ]
        inner = [layer for layer in self.layers if isinstance(layer, UnitLayer)]
        if inner:
            remarks.append(self._units(inner))
        return tuple(remarks)

    def _units(self, layers: list[UnitLayer]) -> str:
        kept: dict[str, int] = {}
        for layer in layers:
            side, mask = layer.rows, self.mask(layer.name)
            if side is not None:
                kept[side.hidden] = int(mask.flatten(1).any(1).sum()) * side.units // len(mask)
        total = units_of(layers)
        return (
            f"{sum(kept.values()):,} of {sum(total.values()):,} hidden units stay; matrices "
            "without hidden units on a side train densely"
        )
