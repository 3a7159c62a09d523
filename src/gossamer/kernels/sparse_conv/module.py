"""SparseConv1x1: a pointwise convolution, its normalisation and its clamp, in one pass."""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.kernels.sparse_conv.op import sparse_conv
from gossamer.kernels.sparse_conv.pack import PackedConv, pack_conv

__all__ = ["SparseConv1x1", "fold", "is_pointwise"]

_NAMES = ("values", "steps", "start")


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that mixes the channels of single positions."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", "same")
    )


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Weight (O, I) and bias of a pointwise convolution with its normalisation folded in.

    In float64 inside, so that folding costs one rounding.
    """
    weight, bias = conv.weight.detach().flatten(1), conv.bias
    if norm is None:
        return weight, None if bias is None else bias.detach()
    if norm.running_mean is None or norm.running_var is None:
        raise GossamerError("a normalisation without running statistics cannot be folded")
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean if bias is None else bias.detach().double() - mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return (weight.double() * scale[:, None]).to(weight), shift.to(weight)


class SparseConv1x1(nn.Module):
    """Clamp of a packed 1x1 convolution, for inference.

    The packed tensors are buffers: they are saved, loaded and moved with the module. A state loads
    into any SparseConv1x1 of the same channels, however many weights either keeps. Gradients flow
    to x, not to the weights.

    Parameters
    ----------
    packed : W, (O, I), with its bias.
    low, high : bounds of the result.
    stride : positions of the input between two of the output, down and across.
    """

    values: Tensor
    steps: Tensor
    start: Tensor
    form: Tensor

    def __init__(
        self,
        packed: PackedConv,
        low: float = -inf,
        high: float = inf,
        stride: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.out_channels, self.in_channels = packed.shape
        self.block, self.low, self.high, self.stride = packed.block, low, high, stride
        for name in _NAMES:
            self.register_buffer(name, getattr(packed, name))
        # The block travels with the state; tensors alone do not tell.
        self.register_buffer("form", torch.tensor([packed.block, *packed.shape]))

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None = None,
        low: float = -inf,
        high: float = inf,
        block: int | None = None,
    ) -> "SparseConv1x1":
        """From a pruned pointwise convolution and, where one follows, its normalisation.

        Raises
        ------
        GossamerError
            If the convolution is not 1x1 without groups and padding.
        """
        if not is_pointwise(conv):
            raise GossamerError(f"a sparse convolution is 1x1, ungrouped, unpadded; got {conv}")
        stride = (conv.stride[0], conv.stride[1])
        return cls(pack_conv(*fold(conv, norm), block), low, high, stride)

    @property
    def packed(self) -> PackedConv:
        """W as it is now; shares its tensors with the module."""
        shape = (self.out_channels, self.in_channels)
        return PackedConv(self.values, self.steps, self.start, shape, self.block)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) or (I, H, W) -> (N, O, H, W) or (O, H, W)."""
        batch = x if x.dim() == 4 else x[None]
        if self.stride != (1, 1):
            batch = batch[:, :, :: self.stride[0], :: self.stride[1]]
        y = sparse_conv(batch, self.packed, self.low, self.high)
        return y if x.dim() == 4 else y[0]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take over sizes and block of the state first; the copying is torch's."""
        names = [prefix + name for name in (*_NAMES, "form")]
        if all(isinstance(state_dict.get(name), Tensor) for name in names):
            values, steps, start, form = (state_dict[name] for name in names)
            block, *shape = form.tolist()
            if shape != [self.out_channels, self.in_channels]:
                raise GossamerError(
                    f"{prefix}form holds a convolution of shape {tuple(shape)}; this layer is "
                    f"{self.out_channels}x{self.in_channels}"
                )
            given = PackedConv(values, steps, start, (shape[0], shape[1]), block).check()
            self.block = given.block
            for name in _NAMES:
                device = getattr(self, name).device
                setattr(self, name, getattr(given, name).to(device, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Channels, block, bounds, sparsity."""
        return (
            f"{self.in_channels}, {self.out_channels}, block={self.block}, low={self.low:g}, "
            f"high={self.high:g}, stride={self.stride}, sparsity={self.packed.sparsity:.4f}"
        )
