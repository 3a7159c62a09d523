"""Bits: values moved as integers, so that no NaN is changed on the way."""

import torch
from torch import Tensor

__all__ = ["as_floats", "as_integers"]

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def as_integers(values: Tensor) -> Tensor:
    """The same bits as integers; a contiguous tensor of float32, bfloat16 or float16.

    Arithmetic on 16-bit floats passes through float32, which changes signalling NaNs.
    """
    return values.view(_INTEGERS[values.dtype])


def as_floats(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`as_integers`."""
    return bits.view(dtype)
