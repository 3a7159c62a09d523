"""SparseLinear: a drop-in for ``nn.Linear`` that stores and reads only the kept weights."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.kernels.sparse_linear.op import sparse_linear
from gossamer.kernels.sparse_linear.pack import LAYOUTS, Layout, Packed, pack

__all__ = ["SparseLinear"]

_NAMES = ("values", "index", "start")


class SparseLinear(nn.Module):
    """x Wᵀ + bias for a packed W, for inference.

    The tensors of the matrix are buffers: they are saved, loaded and moved with the module. A
    state loads into any SparseLinear of the same features, however many weights either keeps
    and in whatever layout. Gradients flow to x and to the bias, not to the weights.

    Parameters
    ----------
    packed : W, (out_features, in_features).
    bias : (out_features,), or None.
    """

    values: Tensor
    index: Tensor
    start: Tensor
    form: Tensor

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise GossamerError(
                f"the bias of {self.out_features} features has as many; got {tuple(bias.shape)}"
            )
        self.layout: Layout = packed.layout
        for name in _NAMES:
            self.register_buffer(name, getattr(packed, name))
        # Which layout it is travels with the state; tensors alone do not tell.
        self.register_buffer("form", torch.tensor([LAYOUTS.index(packed.layout), *packed.shape]))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        layout: Layout | Literal["auto"] = "auto",
        dtype: torch.dtype | None = None,
        mask: Tensor | None = None,
    ) -> "SparseLinear":
        """From a pruned layer; parameters as in :func:`pack`. The bias keeps its dtype."""
        made = cls(pack(linear.weight, layout, dtype, mask), linear.bias)
        return made.train(linear.training)

    @property
    def packed(self) -> Packed:
        """W as it is now; shares its tensors with the module."""
        shape = (self.out_features, self.in_features)
        return Packed(self.values, self.index, self.start, shape, self.layout)

    def to_linear(self) -> nn.Linear:
        """The dense layer with zeros for what is not kept."""
        dense = self.packed.to_dense()
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
            dtype=dense.dtype,
        )
        linear.weight = nn.Parameter(dense)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), dtype of x."""
        return sparse_linear(x, self.packed, self.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take over sizes and layout of the state first; the copying is torch's."""
        names = [prefix + name for name in (*_NAMES, "form")]
        if all(isinstance(state_dict.get(name), Tensor) for name in names):
            values, index, start, form = (state_dict[name] for name in names)
            self._take_over(values, index, start, form.tolist(), prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _take_over(
        self, values: Tensor, index: Tensor, start: Tensor, form: list[int], prefix: str
    ) -> None:
        number, *shape = form
        if shape != [self.out_features, self.in_features] or not 0 <= number < len(LAYOUTS):
            raise GossamerError(
                f"{prefix}form holds a matrix of shape {tuple(shape)}; this layer is "
                f"{self.out_features}x{self.in_features}"
            )
        given = Packed(values, index, start, (shape[0], shape[1]), LAYOUTS[number]).check()
        self.layout = given.layout
        for name in _NAMES:
            device = getattr(self, name).device
            setattr(self, name, getattr(given, name).to(device, copy=True))

    def extra_repr(self) -> str:
        """Features, layout, sparsity."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, layout={self.layout}, "
            f"sparsity={self.packed.sparsity:.4f}"
        )
