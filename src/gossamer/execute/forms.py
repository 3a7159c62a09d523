"""Forms: the ways in which a matrix with zeros can be stored and multiplied on a device.

Shapes: O = out features, I = in features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer.kernels.sparse_linear import Packed, Tiled, pack, sparse_linear, tile, tiled_linear
from gossamer.kernels.sparse_linear.op import usable as cpu_usable
from gossamer.kernels.sparse_linear.pack import DTYPES as PACKED_DTYPES
from gossamer.kernels.sparse_linear.tiled import DTYPES as TILED_DTYPES
from gossamer.kernels.sparse_linear.tiled import is_two_four
from gossamer.kernels.sparse_linear.tiled_op import usable as gpu_usable

__all__ = ["Form", "Offer", "offers", "why_none"]

_WORTH = 0.95  # a form of more of dense's bytes cannot win by any margin
_NIBBLE = 15  # columns one step of the gaps form can span


@dataclass(frozen=True, eq=False)
class Form:
    """A matrix in one way of storing it.

    Parameters
    ----------
    name : ``bitmask``, ``csr``, ``fanin`` (CPU), ``2:4``, ``gaps`` (Triton), ``torch 2:4``.
    matrix : what is stored.
    """

    name: str
    matrix: Packed | Tiled | Tensor

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., I) -> (..., O)."""
        if isinstance(self.matrix, Packed):
            return sparse_linear(x, self.matrix, bias)
        if isinstance(self.matrix, Tiled):
            return tiled_linear(x, self.matrix, bias)
        return linear(x, self.matrix, bias)

    @property
    def nbytes(self) -> int:
        """Bytes stored, which a product reads."""
        if isinstance(self.matrix, Tensor):
            # Values and metadata of torch's semi-structured tensors: 9/16 of dense at 16 bits.
            dense = self.matrix.numel() * self.matrix.element_size()
            return dense // 2 + self.matrix.numel() // 8
        return self.matrix.nbytes

    def to_dense(self) -> Tensor:
        """The (O, I) matrix, as stored."""
        return self.matrix.to_dense()


@dataclass(frozen=True)
class Offer:
    """A form that could be made of a matrix.

    Parameters
    ----------
    make : builds it. least, most : rows of a product it is worth timing for.
    """

    make: Callable[[Tensor], Form]
    least: int = 1
    most: int = 1 << 30


def _pack(weight: Tensor, name: str, dtype: torch.dtype) -> Form:
    return Form(name, pack(weight, name, dtype))  # type: ignore[arg-type]


def _tile(weight: Tensor, name: str, dtype: torch.dtype) -> Form:
    return Form(name, tile(weight, name, dtype))  # type: ignore[arg-type]


def _semi_structured(weight: Tensor) -> Form:
    return Form("torch 2:4", torch.sparse.to_sparse_semi_structured(weight.detach()))


def why_none(weight: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why no kernel can store this weight here, in words; None where one can."""
    stored = weight.dtype if dtype is None else dtype
    device = weight.device.type
    if device == "cpu":
        if stored not in PACKED_DTYPES:
            return f"CPU kernels read float32 and bfloat16, not {_name(stored)}"
        return None if cpu_usable() else "no C++ compiler to build the kernels"
    if device == "cuda":
        if stored not in TILED_DTYPES or stored != weight.dtype:
            return "GPU kernels read the model's own bfloat16 or float16"
        return None if gpu_usable(weight.device) else "no triton, or a GPU before Ampere"
    return f"there are no kernels for {device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def offers(weight: Tensor, dtype: torch.dtype | None = None) -> dict[str, Offer]:
    """What is worth timing for a weight (O, I), by name; empty where nothing can win.

    Parameters
    ----------
    dtype : of the stored weights; that of the weight when left out.
    """
    if why_none(weight, dtype) is not None:
        return {}
    stored = weight.dtype if dtype is None else dtype
    counts = (weight != 0).sum(1)
    kept, total = int(counts.sum()), weight.numel()
    limit = _WORTH * total * weight.element_size()
    width = stored.itemsize
    found: dict[str, Offer] = {}
    if weight.device.type == "cpu":
        if kept * width + total / 8 < limit:
            found["bitmask"] = Offer(partial(_pack, name="bitmask", dtype=stored))
        column = 2 if weight.shape[1] <= 1 << 16 else 4
        if kept * (width + column) < limit:
            equal = int(counts.min()) == int(counts.max())
            name = "fanin" if equal else "csr"
            found[name] = Offer(partial(_pack, name=name, dtype=stored))
        return found
    if is_two_four(weight):
        found["2:4"] = Offer(partial(_tile, name="2:4", dtype=stored), most=32)
        whole = weight.shape[0] % 64 == 0 and weight.shape[1] % 64 == 0
        if whole and torch.backends.cusparselt.is_available():
            found["torch 2:4"] = Offer(_semi_structured, least=64)
    # A weight after a wide gap costs zeros to cross it, as often as at random places.
    empty = 1.0 - kept / max(1, total)
    crossed = empty**_NIBBLE / max(1e-9, 1.0 - empty**_NIBBLE)
    if kept * (1 + crossed) * (width + 0.5) < limit:
        found["gaps"] = Offer(partial(_tile, name="gaps", dtype=stored), most=32)
    return found
