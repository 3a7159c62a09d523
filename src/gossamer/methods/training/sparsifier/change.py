"""What may happen to the masks at one update of a training, as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

__all__ = ["Change", "Growth", "StartLoss"]

Growth = Literal["gradient", "random", "correlation"]
StartLoss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Change:
    """First prune to a sparsity, then exchange a share of what is left; either may be absent.

    Parameters
    ----------
    sparsity : prune by magnitude to this sparsity; None leaves the number kept alone.
    exchange : share of every layer's kept weights that are dropped and grown elsewhere.
    growth : where weights grow: where the gradient is largest, anywhere, or where the activities of
        the two units are most correlated.
    by_sign : drop the share of the positive and of the negative weights apart.
    grown_std : standard deviation of grown weights' values; 0 starts them at zero.
    instead : the change takes the place of the update, whose gradients are then used for nothing
        else.
    """

    sparsity: float | None = None
    exchange: float = 0.0
    growth: Growth = "gradient"
    by_sign: bool = False
    grown_std: float = 0.0
    instead: bool = False

    @property
    def dense_gradient(self) -> bool:
        """Whether the gradients of removed weights are needed."""
        return self.exchange > 0.0 and self.growth == "gradient"
