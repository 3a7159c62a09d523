"""Rewiring of SET: the connections closest to zero go, as many random ones come."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from gossamer.core import kept_count, topk_mask

__all__ = ["free_places", "random_places", "survivors"]


def _distinct(count: int, size: int, generator: Generator) -> Tensor:
    """A uniformly drawn set of ``count`` whole numbers below ``size``: int64, ascending."""
    if size <= 4 * count:
        return torch.randperm(size, generator=generator)[:count].sort().values
    # Drawn with replacement, a few too many, and repeats dropped: memory is that of the draw, not
    # of the range. A set of distinct draws is uniform given its size, and so is any random part.
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        spare = 16 + (count * count) // size
        more = torch.randint(0, size, (count - len(found) + spare,), generator=generator)
        found = torch.unique_consecutive(torch.cat([found, more]).sort().values)
    keep = torch.ones(len(found), dtype=torch.bool)
    keep[torch.randperm(len(found), generator=generator)[count:]] = False
    return found[keep]


def random_places(count: int, shape: Sequence[int], generator: Generator) -> Tensor:
    """Places of an Erdos-Renyi matrix: ``count`` row-major positions, ascending, none twice."""
    rows, columns = shape
    return _distinct(count, rows * columns, generator)


def free_places(taken: Tensor, count: int, size: int, generator: Generator) -> Tensor:
    """``count`` positions below ``size`` that are not taken, uniform, ascending.

    Parameters
    ----------
    taken : int64, ascending, none twice; at most ``size - count`` of them.
    """
    ranks = _distinct(count, size - len(taken), generator)
    # taken[j] - j free positions lie before the j-th taken one; so the r-th free position has
    # before it the taken ones for which that count is at most r.
    before = torch.searchsorted(taken - torch.arange(len(taken)), ranks, right=True)
    return ranks + before


def survivors(values: Tensor, zeta: float) -> Tensor:
    """Which connections stay: the share ``zeta`` closest to zero goes, of each sign for itself.

    Parameters
    ----------
    values : (K,). zeta : share removed, 0 to 1, rounded to a count for each sign.

    Returns
    -------
    bool, (K,). Zeros count as positive; ties go against the higher index.
    """
    keep = torch.zeros(len(values), dtype=torch.bool)
    for side in (values >= 0, values < 0):
        at = side.nonzero()[:, 0]
        if len(at):
            size = values[at].abs()[None]
            keep[at] = topk_mask(size, kept_count(len(at), zeta))[0]
    return keep
