"""Modules with weights held at zero by masks, and what all of them can be asked."""

from abc import abstractmethod
from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Budget, Unstructured

__all__ = ["MaskedModule", "folded_decay", "masked_modules", "normal", "options_of"]


def _random_mask(shape: tuple[int, ...], kept: int, generator: torch.Generator | None) -> Tensor:
    score = torch.rand(shape, generator=generator).reshape(shape[0], -1)
    return Unstructured("layer").select(score, Budget(keep=kept)).mask().view(shape)


class MaskedModule(nn.Module):
    """A linear map of which some weights are held at zero by masks.

    Attributes
    ----------
    dense_gradient : gradients also reach weights that are masked; their value stays out. On while
        a rule that grows weights by their gradient looks, see
        :class:`gossamer.methods.weights.structured.rigl.MaskUpdater`.
    """

    in_features: int
    out_features: int
    bias: Tensor | None
    masked: tuple[str, ...] = ()
    dense_gradient: bool = False

    def _masked_parameter(
        self, name: str, shape: tuple[int, ...], kept: int, options: dict[str, Any]
    ) -> None:
        generator: torch.Generator | None = options["generator"]
        mask = _random_mask(shape, kept, generator).to(options["device"])
        place = {"device": options["device"], "dtype": options["dtype"]}
        self.register_parameter(name, nn.Parameter(torch.zeros(shape, **place)))
        self.register_buffer(f"{name}_mask", mask)
        self.masked = (*self.masked, name)

    def pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every masked parameter with its bool mask."""
        for name in self.masked:
            yield self.get_parameter(name), self.get_buffer(f"{name}_mask")

    def live(self, name: str) -> Tensor:
        """A masked parameter's values that count."""
        weight, mask = self.get_parameter(name), self.get_buffer(f"{name}_mask")
        if self.dense_gradient:
            # Adds exactly zero where masked, but lets the gradient pass.
            return torch.where(mask, weight, weight - weight.detach())
        return torch.where(mask, weight, 0)

    @torch.no_grad()
    def enforce(self) -> None:
        """Set masked weights to zero, for example after loading others."""
        for weight, mask in self.pairs():
            weight.masked_fill_(~mask, 0)

    @torch.no_grad()
    def _draw(self, name: str, fan: float, gain: float, generator: torch.Generator | None) -> None:
        """Normal values of variance gain² / fan where the mask keeps, zero elsewhere."""
        weight, mask = self.get_parameter(name), self.get_buffer(f"{name}_mask")
        weight.copy_(normal(tuple(weight.shape), fan, gain, generator))
        weight.masked_fill_(~mask, 0)

    def _add_bias(self, bias: bool, options: dict[str, Any]) -> None:
        place = {"device": options["device"], "dtype": options["dtype"]}
        made = nn.Parameter(torch.zeros(self.out_features, **place)) if bias else None
        self.register_parameter("bias", made)

    @property
    def sparse_size(self) -> int:
        """Entries of all masked matrices."""
        return sum(mask.numel() for _, mask in self.pairs())

    @property
    def sparsity(self) -> float:
        """Share of them that is held at zero."""
        return 1.0 - sum(int(mask.sum()) for _, mask in self.pairs()) / self.sparse_size

    def multiply_adds(self) -> int:
        """Multiply-adds for one input that a kernel which skips zeros does; biases not counted."""
        free = [p for n, p in self.named_parameters() if n not in (*self.masked, "bias")]
        return sum(int(m.sum()) for _, m in self.pairs()) + sum(p.numel() for p in free)

    @abstractmethod
    def dense(self) -> Tensor:
        """The one matrix that this layer amounts to.

        Raises
        ------
        GossamerError
            If a nonlinearity stands inside, so that there is none.
        """

    @abstractmethod
    def folded_norm(self) -> Tensor:
        """Squared norm of what the layer's factors multiply or add up to, with gradient."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, sparsity={self.sparsity:.4f}"
        )


def normal(
    shape: tuple[int, ...], fan: float, gain: float, generator: torch.Generator | None
) -> Tensor:
    return torch.randn(shape, generator=generator) * (gain / sqrt(max(fan, 1.0)))


def options_of(
    device: Any, dtype: torch.dtype | None, generator: torch.Generator | None
) -> dict[str, Any]:
    return {"device": device or "cpu", "dtype": dtype, "generator": generator}


def masked_modules(model: nn.Module) -> list[MaskedModule]:
    """The modules of a model that hold masks."""
    return [module for module in model.modules() if isinstance(module, MaskedModule)]


def folded_decay(model: nn.Module, strength: float) -> Tensor:
    """A weight decay to add to a loss: strength / 2 times the squared norm of folded products.

    Decaying the factors one by one is another penalty than decaying what they make; this one is
    that of the dense layer they stand for: |V U|², |sum of W_j|². Computed anew at every call.

    Source: the released code of arXiv 2303.11525 (dynamic weight norm).
    """
    norms = [module.folded_norm() for module in masked_modules(model)]
    return 0.5 * strength * (torch.stack(norms).sum() if norms else torch.zeros(()))
