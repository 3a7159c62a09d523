"""Layers whose weights pass through a mask of learned scores.

Shapes: a weight is (O, I), or (O, I, kernel sides) of a convolution; scores and mask are alike.
"""

from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import Budget, GossamerError, Unstructured, check_sparsity, kept_count

__all__ = ["Masked", "Phase", "SparseConv2d", "SparseLinear", "masked_layers", "plain", "sparse"]

Phase = Literal["dense", "learning", "fixed"]


class _Highest(torch.autograd.Function):
    """1 at the highest scores and 0 elsewhere; the gradient passes as if it were the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, keep: int) -> Tensor:
        chosen = Unstructured("layer").select(scores.detach(), Budget(keep=keep))
        return chosen.mask().to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Masked(nn.Module):
    """What :class:`SparseLinear` and :class:`SparseConv2d` share.

    Attributes
    ----------
    sparsity : share of the weights removed; at least one stays.
    learned : the scores learn; else they are the size the weights had when the phase began.
    phase : ``dense`` shows all weights; ``learning`` masks by the scores as they are, with a
        straight-through gradient; ``fixed`` by the scores as they were when it began.
    """

    weight: nn.Parameter
    scores: nn.Parameter
    mask: Tensor
    sparsity: float
    learned: bool
    phase: Phase

    def begin(self, sparsity: float, *, learned: bool = True) -> None:
        """Give the layer scores for a sparsity, in proportion to its weights' size."""
        self.sparsity = check_sparsity(sparsity)
        self.learned = learned
        self.phase = "learning"
        self.scores = nn.Parameter(torch.empty_like(self.weight))
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))
        self.score()

    @property
    def keep(self) -> int:
        """Number of weights kept."""
        return max(1, kept_count(prod(self.weight.shape), self.sparsity))

    @torch.no_grad()
    def score(self) -> None:
        """Start the scores at |weight| / max |weight|."""
        size = self.weight.abs()
        self.scores.copy_(size / size.max().clamp_min(1e-12))

    @torch.no_grad()
    def enter(self, phase: Phase) -> None:
        """Change the phase; learning starts from the weights' size, fixing from the scores."""
        if phase == "learning" and self.phase == "dense":
            self.score()
        if phase == "fixed":
            found = _Highest.apply(self.scores, self.keep)
            assert isinstance(found, Tensor)
            self.mask.copy_(found.bool())
        self.phase = phase

    def shown(self) -> Tensor:
        """The weights the layer computes with."""
        if self.phase == "dense":
            return self.weight
        if self.phase == "fixed":
            return self.weight * self.mask
        found = _Highest.apply(self.scores, self.keep)
        assert isinstance(found, Tensor)
        return self.weight * found


class SparseLinear(Masked, nn.Linear):
    """A linear layer that computes with the weights of highest learned score.

    Parameters
    ----------
    sparsity : share of the weights removed; a search puts its own in place.

    Examples
    --------
    >>> layer = SparseLinear(8, 4, sparsity=0.75)
    >>> int(layer.shown().count_nonzero())
    8
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, sparsity: float = 0.9):
        super().__init__(inputs, outputs, bias=bias)
        self.begin(sparsity)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return nn.functional.linear(x, self.shown(), self.bias)


class SparseConv2d(Masked, nn.Conv2d):
    """A convolution that computes with the weights of highest learned score.

    Parameters
    ----------
    kernel : side of the kernel. options : those of ``torch.nn.Conv2d``.
    sparsity : share of the weights removed; a search puts its own in place.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, sparsity: float = 0.9, **options: Any
    ):
        super().__init__(inputs, outputs, kernel, **options)
        self.begin(sparsity)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H', W')."""
        return self._conv_forward(x, self.shown(), self.bias)


_PLAIN = {SparseLinear: nn.Linear, SparseConv2d: nn.Conv2d}
_SPARSE = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}


def masked_layers(model: nn.Module) -> dict[str, Masked]:
    """Masked layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Masked)}


def sparse(model: nn.Module, sparsity: float, *, learned: bool = True) -> None:
    """Make every linear layer and convolution of a network masked, in place.

    Parameters
    ----------
    learned : scores of those that were dense learn; else the largest weights stay.

    Raises
    ------
    GossamerError
        If there is none.
    """
    for module in model.modules():
        if type(module) in _SPARSE:
            # The same parameters, hooks and settings under another forward: nothing is copied.
            module.__class__ = _SPARSE[type(module)]
            assert isinstance(module, Masked)
            module.begin(sparsity, learned=learned)
    layers = masked_layers(model)
    if not layers:
        raise GossamerError(
            "the network has no linear layer or convolution to prune; if a search found it so, "
            "put a layer with weights outside of what is searched"
        )
    for layer in layers.values():
        layer.sparsity = check_sparsity(sparsity)


@torch.no_grad()
def plain(model: nn.Module) -> dict[str, int]:
    """Make masked layers ordinary ones that hold their zeros, in place.

    Returns
    -------
    Layer to the number of its weights that are kept.
    """
    kept: dict[str, int] = {}
    for name, layer in masked_layers(model).items():
        kept[name] = int(layer.mask.count_nonzero()) if layer.phase == "fixed" else layer.keep
        layer.weight.copy_(layer.shown())
        del layer.scores, layer.mask, layer.sparsity, layer.phase, layer.learned
        layer.__class__ = _PLAIN[type(layer)]
    return kept
