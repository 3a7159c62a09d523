"""How many parameters were at work on average over the tokens of a training.

That average takes the place of a dense model's size in the law of :mod:`.law`. It is over tokens:
over operations it would be smaller than what was trained with, since dense updates cost more.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layers import find_layers, plain_module

__all__ = ["ParameterCount", "average_parameters", "count_parameters"]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: those that pruning may remove, and all others that are counted."""

    removable: int
    others: int

    @property
    def total(self) -> int:
        """Of the dense model."""
        return self.removable + self.others


def count_parameters(
    model: nn.Module, *, skip: str = "", embeddings: bool = False
) -> ParameterCount:
    """Count the parameters of a model as laws of scaling do.

    Parameters
    ----------
    skip : layers that stay dense, as in every method of sparse training.
    embeddings : count the matrices of the vocabulary, the head's among them. Without, as in the
        common laws, N is what works on every token; name the choice beside every number.
    """
    model = plain_module(model)
    removable = {layer.parameter: layer.size for layer in find_layers(model, skip)}
    seen = {id(model.get_parameter(name)) for name in removable}
    left_out = set() if embeddings else _vocabulary(model)
    # A stack of experts is one parameter and many layers.
    inside = sum(model.get_parameter(name).numel() for name in removable)
    others = sum(p.numel() for p in model.parameters() if id(p) not in seen | left_out)
    return ParameterCount(inside, others)


def _vocabulary(model: nn.Module) -> set[int]:
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        found.update(id(p) for p in head.parameters())
    return found


def average_parameters(schedule: Iterable[tuple[float, float]]) -> float:
    """Mean over tokens of the parameters at work: N̄ = (1/D) ∫ N(τ) dτ.

    Parameters
    ----------
    schedule : stretches of the training in order, each (tokens, parameters at work). Updates do
        for tokens where every update has as many.

    Raises
    ------
    GossamerError
        If a stretch is negative or no number, or there are no tokens at all.

    Examples
    --------
    Half of the tokens with a million parameters, half with 500,000:

    >>> average_parameters([(1e9, 1e6), (1e9, 5e5)])
    750000.0
    """
    tokens = weighted = 0.0
    for length, parameters in schedule:
        if not (isfinite(length) and isfinite(parameters)) or length < 0 or parameters < 0:
            raise GossamerError(
                f"the stretch ({length}, {parameters}) is none; give tokens and parameters of at "
                "least 0"
            )
        tokens += length
        weighted += length * parameters
    if not tokens:
        raise GossamerError("the schedule has no tokens; give stretches (tokens, parameters)")
    return weighted / tokens
