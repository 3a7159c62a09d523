"""Tables: samples by features, as numbers that can be trained on."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["as_table", "standardise", "varying"]


def as_table(data: Any, features: int | None = None) -> Tensor:
    """Data as a float tensor (N, F), N >= 2; float64 stays, all else becomes float32.

    Parameters
    ----------
    data : tensor, array, or nested lists of numbers. features : F, if it is known.

    Raises
    ------
    GossamerError
        If it is no table of numbers, holds NaN or infinity, or has another number of features.
    """
    try:
        table = data.detach().cpu() if isinstance(data, Tensor) else torch.from_numpy(_array(data))
        table = table if table.dtype == torch.float64 else table.to(torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise GossamerError(
            f"a table is an array of numbers (samples, features); got {type(data).__name__}"
        ) from None
    if table.dim() != 2 or table.shape[0] < 2 or table.shape[1] < 1:
        raise GossamerError(
            f"a table is (samples, features), at least 2 samples; got shape {tuple(table.shape)}"
        )
    if features is not None and table.shape[1] != features:
        raise GossamerError(
            f"the table has {table.shape[1]} features; {features} are expected: give such a table"
        )
    if bad := int((~torch.isfinite(table)).any(0).sum()):
        raise GossamerError(f"{bad} features hold NaN or infinity; fill or drop those values")
    return table


def _array(data: Any) -> np.ndarray:
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise TypeError("not numbers")
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def varying(table: Tensor) -> Tensor:
    """Which features are not constant: bool, (F,)."""
    return (table != table[0]).any(0)


def standardise(table: Tensor) -> Tensor:
    """Every feature with mean 0 and variance 1 over the samples; all of them must vary."""
    deviation = table.std(0, correction=0)
    # Far from zero, a spread of a few roundings may vanish against the mean.
    return (table - table.mean(0)).div_(deviation.clamp_min_(torch.finfo(table.dtype).tiny))
