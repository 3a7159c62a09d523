"""Rows: a linear layer stored so that what a token does not need is never read.

Channel-major: one contiguous row for every input channel, W transposed; channels are skipped.
Output-major: one contiguous row for every output, W as ``nn.Linear`` holds it; outputs are skipped.
Shapes: O = out features, I = in features.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

__all__ = ["DTYPES", "Major", "Rows", "rows"]

Major = Literal["channel", "output"]
_LARGE = 1 << 22  # bytes from which large pages pay
_HUGE = 14  # MADV_HUGEPAGE
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True, eq=False)
class Rows:
    """A linear layer by rows; made by :func:`rows`.

    Parameters
    ----------
    weight : (I, O) if ``major`` is channel, (O, I) if output; contiguous; float32, bfloat16, or
        int8 with a scale.
    scale : float32 (O,), what one step of int8 is worth in each output; else None.
    bias : float32 (O,), or None.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    major: Major

    @property
    def in_features(self) -> int:
        """I."""
        return self.weight.shape[0 if self.major == "channel" else 1]

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight.shape[1 if self.major == "channel" else 0]

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and bias."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.bias) if t is not None)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """(O, I), what the rows stand for."""
        weight = self.weight.to(dtype)
        weight = weight.T if self.major == "channel" else weight
        return weight if self.scale is None else weight * self.scale.to(dtype)[:, None]


def rows(
    weight: Tensor,
    bias: Tensor | None = None,
    major: Major = "channel",
    dtype: torch.dtype | None = None,
) -> Rows:
    """Store a linear layer by rows.

    Parameters
    ----------
    weight : (O, I), as ``nn.Linear`` holds it. Memory that already lies as asked for is shared:
        output-major rows of an ``nn.Linear``, channel-major ones of a transposed layer.
    bias : (O,), or None.
    dtype : float32, bfloat16, or int8 (symmetric, the largest weight of each output is 127
        steps); that of the weight when left out.

    Raises
    ------
    GossamerError
        For another shape or dtype, or non-finite weights that are to be int8.
    """
    dtype = weight.dtype if dtype is None else dtype
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        seen = None if bias is None else tuple(bias.shape)
        raise GossamerError(
            f"a layer has a matrix and a bias of its rows; got {tuple(weight.shape)} and {seen}"
        )
    if dtype not in DTYPES or not weight.dtype.is_floating_point:
        raise GossamerError(
            f"rows are stored as float32, bfloat16 or int8; got {dtype}: pass dtype=torch.float32"
        )
    weight = weight.detach()
    scale = None
    if dtype == torch.int8:
        weight, scale = _int8(weight)
    shared = major == "output" and weight.dtype == dtype and weight.is_contiguous()
    return Rows(
        weight=weight
        if shared
        else _on_large_pages(weight.T if major == "channel" else weight, dtype),
        scale=scale,
        bias=None if bias is None else bias.detach().float().contiguous(),
        major=major,
    )


def _on_large_pages(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy for which the system was asked to use large pages.

    Rows are visited in leaps; with pages of 4 KB every leap costs a walk through the page table.
    """
    made = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    advise = _advise() if made.device.type == "cpu" else None
    if advise is not None and made.nbytes >= _LARGE:
        begin = -(-made.data_ptr() // 4096) * 4096
        advise(begin, (made.data_ptr() + made.nbytes) // 4096 * 4096 - begin, _HUGE)
    return made.copy_(weight)


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The system's ``madvise``; a refusal costs nothing but speed. None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole steps, and what a step is worth in each row; rows of zeros have steps of 1."""
    largest = weight.float().abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    if not bool(largest.isfinite().all()):
        raise GossamerError("weights that are NaN or infinite cannot be int8; use float32")
    scale = torch.where(largest > 0, largest / 127, 1.0).float()
    return (weight.float() / scale[:, None]).round().clamp(-127, 127), scale
