"""Rows of unequal number per sequence and head, back to back, so that none is padding.

Shapes: B = sequences, G = key-value heads, K = keys, N = rows held in all, M = most rows of a
head, W = width of a row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Ragged", "from_right"]


def from_right(counts: Tensor, size: int) -> Tensor:
    """Which of ``size`` places belong to a head whose rows stand at the right end.

    Parameters
    ----------
    counts : (B, G).

    Returns
    -------
    bool, (B, G, size).
    """
    at = torch.arange(size, device=counts.device)
    return at >= size - counts[..., None]


@dataclass(frozen=True, eq=False)
class Ragged:
    """A tensor (B, G, any, W) whose heads have different numbers of rows.

    Parameters
    ----------
    flat : (N, W), the rows of sequence 0 head 0, then of head 1 ...
    counts : int64, (B, G), rows of each head.
    """

    flat: Tensor
    counts: Tensor

    @classmethod
    def gather(cls, tensor: Tensor, kept: Tensor) -> "Ragged":
        """The kept rows of a tensor, in their order.

        Parameters
        ----------
        tensor : (B, G, K, W). kept : bool, (B, G, K).
        """
        return cls(tensor[kept], kept.sum(-1))

    @property
    def equal(self) -> bool:
        """All heads have the same number of rows."""
        return len(self.flat) == self.counts.numel() * self.most

    @cached_property
    def most(self) -> int:
        """M; asked of the device once."""
        return int(self.counts.max()) if self.counts.numel() else 0

    @property
    def nbytes(self) -> int:
        """Bytes held, the counts included."""
        return self.flat.nbytes + self.counts.nbytes

    def padded(self, extra: int = 0) -> Tensor:
        """As (B, G, M + extra, W): each head's rows end at place M, zeros before them.

        Parameters
        ----------
        extra : places left free behind, zeros too.
        """
        batch, heads = self.counts.shape
        width, most = self.flat.shape[1], self.most
        if self.equal and not extra:
            return self.flat.view(batch, heads, most, width)
        out = self.flat.new_zeros(batch, heads, most + extra, width)
        if self.equal:
            out[:, :, :most] = self.flat.view(batch, heads, most, width)
        else:
            out.view(-1, width).index_copy_(0, self._places(most + extra), self.flat)
        return out

    def _places(self, size: int) -> Tensor:
        """(N,) where every row stands among (B * G * size), M - count places left free before."""
        counts = self.counts.flatten()
        head = torch.arange(len(counts), device=counts.device)
        shift = head * size + self.most - counts.cumsum(0)
        total = len(self.flat)
        shift = torch.repeat_interleave(shift, counts, output_size=total)
        return shift + torch.arange(total, device=shift.device)

    def rows(self, chosen: Tensor) -> "Ragged":
        """The sequences named by ``chosen`` (int64), in that order, repeats allowed."""
        chosen = chosen.to(self.counts.device)
        size = self.counts.sum(1)
        start = size.cumsum(0) - size
        wanted = size[chosen]
        ends = wanted.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        step = torch.arange(total, device=self.flat.device)
        begin = torch.repeat_interleave(start[chosen] - (ends - wanted), wanted, output_size=total)
        return Ragged(self.flat[begin + step], self.counts[chosen])

    def to(self, device: torch.device | str) -> "Ragged":
        """On another device."""
        return Ragged(self.flat.to(device), self.counts.to(device))
