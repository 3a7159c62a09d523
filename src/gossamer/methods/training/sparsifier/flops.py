"""What a training costs: floating-point operations of every update, counted as it runs.

A forward pass costs two operations per kept weight and position (token, pixel), a backward pass
twice that. An update whose gradients are needed for all weights costs a dense weight gradient.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TrainingFlops", "positions_of", "updates_within"]


@dataclass
class TrainingFlops:
    """Counts the operations of a training in which the kept weights change.

    Numbers are per sample of an update: multiply by the batch size, and by the tokens of a sample
    where positions were not measured. Matrix products of weights only: attention scores, norms,
    activations and the optimizer are left out.

    Parameters
    ----------
    sizes : layer to its number of weights.
    positions : layer to how often a sample passes through it; 1 where not given.
    others : weights that are never removed, times their positions (heads, skipped layers).

    Attributes
    ----------
    total : operations so far. dense_total : of a dense training of as many updates.
    updates : counted so far. dense_gradients : updates among them that needed all gradients.

    Source: arXiv 1911.11134, appendix H: an update costs 3 f_S, one with all gradients
    2 f_S + f_D, where f_S and f_D are a sparse and a dense forward pass.
    """

    sizes: Mapping[str, int]
    positions: Mapping[str, float] | None = None
    others: float = 0.0
    total: float = 0.0
    dense_total: float = 0.0
    updates: int = 0
    dense_gradients: int = 0

    def forward(self, kept: Mapping[str, int]) -> float:
        """Operations of one forward pass with these numbers of kept weights."""
        at = self.positions or {}
        return 2.0 * (sum(kept[name] * at.get(name, 1.0) for name in self.sizes) + self.others)

    def update(self, kept: Mapping[str, int], *, dense_gradient: bool = False) -> float:
        """Operations of one update."""
        sparse = self.forward(kept)
        return 2.0 * sparse + (self.forward(self.sizes) if dense_gradient else sparse)

    def count(self, kept: Mapping[str, int], *, dense_gradient: bool = False) -> None:
        """Add one update."""
        self.total += self.update(kept, dense_gradient=dense_gradient)
        self.dense_total += 3.0 * self.forward(self.sizes)
        self.updates += 1
        self.dense_gradients += dense_gradient

    @property
    def share(self) -> float:
        """Operations over those of a dense training of as many updates; 1 before the first."""
        return self.total / self.dense_total if self.dense_total else 1.0

    def to_dict(self) -> dict[str, float]:
        """The counts, as plain values."""
        names = ("total", "dense_total", "updates", "dense_gradients")
        return {name: getattr(self, name) for name in names}

    def load(self, values: Mapping[str, Any]) -> None:
        """Go on from the counts that :meth:`to_dict` gave."""
        for name, value in values.items():
            setattr(self, name, type(getattr(self, name))(value))


def updates_within(budget: float, per_update: float) -> int:
    """How many updates a number of operations pays for."""
    return int(budget / per_update + 1e-9)


@torch.no_grad()
def positions_of(
    model: nn.Module, names: Iterable[str], run: Callable[[], Any], samples: int
) -> dict[str, float]:
    """How often one sample passes through each layer, seen in one forward pass.

    Parameters
    ----------
    names : modules of the model. run : runs the model once. samples : in that run.
    """
    seen: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            weight: Any = module.weight
            seen[name] = seen.get(name, 0.0) + output.numel() / len(weight) / samples

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen
