"""Scores that look at the loss gradient. All shapes are those of the weight."""

from torch import Tensor

__all__ = ["fisher", "taylor"]


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w · ∂L/∂w|: first-order change of the loss when the weight is removed."""
    return (weight.float() * gradient.float()).abs()


def fisher(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """½ w² · E[g²]: second-order change of the loss under the empirical Fisher diagonal."""
    return 0.5 * weight.float().square() * squared_gradient.float()
