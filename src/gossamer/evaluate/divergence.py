"""Divergence: how far a sparse model's predictions moved from the dense model's.

Perplexity can stay while answers change; KL and top-1 agreement see it. The dense model runs
once: its log-probabilities are kept on disk at evenly spread positions.
Shapes: P = positions of the reference, K = scored tokens of a chunk, V = vocabulary.
"""

import os
import tempfile
from contextlib import closing
from dataclasses import dataclass
from math import nan
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.evaluate.forward import Chunk, log_probabilities
from gossamer.evaluate.perplexity import LossSum, Score, perplexity_of
from gossamer.evaluate.windows import Windows, windows
from gossamer.models import Progress, Tokens

__all__ = ["Comparison", "Reference", "kl_divergence"]


def kl_divergence(dense: Tensor, sparse: Tensor) -> Tensor:
    """KL(dense || sparse) of rows of log-probabilities, in nats.

    Parameters
    ----------
    dense, sparse : (K, V) float32 or float64 log-probabilities; -inf is probability 0.

    Returns
    -------
    (K,) float64, infinite where the sparse model rules out what the dense one does not.

    Summed as p (log p - log q) - p + q in fp64: the last two terms add up to nothing for
    normalised rows, and make every term at least 0, so that rounding of the fp32 inputs enters
    squared and equal rows give exactly 0.
    """
    terms = dense.to(torch.float64, copy=True)
    log_q = sparse.to(torch.float64, copy=True)
    p = terms.exp()
    # Where p is 0 the term is 0, also when both logarithms are infinite. In place: the passes
    # over memory cost more than the arithmetic.
    terms.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0)
    return terms.sub_(p).add_(log_q.exp_()).sum(-1)


class Comparison:
    """Running mean of KL and top-1 agreement over a reference's positions."""

    def __init__(self, reference: "Reference") -> None:
        self.reference = reference
        self.seen = 0
        self.kl_sum = 0.0
        self.equal = 0

    def add(self, chunk: Chunk) -> None:
        """Compare those predictions of a chunk that the reference holds."""
        low, high = self.reference.between(chunk.start, chunk.start + len(chunk.targets))
        if low == high:
            return
        device = chunk.log_probs.device
        index = (self.reference.positions[low:high] - chunk.start).to(device)
        dense = self.reference.rows(low, high).to(device)
        sparse = chunk.log_probs[index]
        if sparse.shape != dense.shape:
            raise GossamerError(
                f"the reference has a vocabulary of {dense.shape[1]}, the model one of "
                f"{sparse.shape[1]}; record the reference with the same model"
            )
        self.kl_sum += float(kl_divergence(dense, sparse).sum())
        # NaN logits have no most likely token: argmax would name one, so they agree with none.
        top = (dense.argmax(-1) == sparse.argmax(-1)) & ~sparse.isnan().any(-1)
        self.equal += int(top.sum())
        self.seen += high - low

    def kl(self) -> float:
        """Mean KL(dense || sparse), nats per position."""
        return self.kl_sum / self.seen if self.seen else nan

    def agreement(self) -> float:
        """Share of positions with the same most likely token."""
        return self.equal / self.seen if self.seen else nan


@dataclass(frozen=True, eq=False)
class Reference:
    """The dense model's log-probabilities at evenly spread positions of a text.

    Made by :meth:`record`; a context manager that frees its disk space on exit.

    Parameters
    ----------
    score : the dense model's own score, from the same forward passes; its kl is 0.
    positions : (P,) int64, which of the scored tokens are held, ascending.
    fingerprint : of the windows it was recorded on.
    """

    score: Score
    positions: Tensor
    fingerprint: str
    _store: "_Store"

    @classmethod
    def record(
        cls,
        model: nn.Module,
        tokens: Tokens,
        *,
        stride: int | None = None,
        max_bytes: int = 512 * 2**20,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Self:
        """Run the dense model once and keep its predictions.

        Parameters
        ----------
        tokens, stride, batch_size, progress : as for :func:`gossamer.evaluate.score`.
        max_bytes : most disk space used, 4 V bytes a position: 512 MiB hold 32,768 positions of
            a vocabulary of 4,096 and 890 of one of 151,000. The file has no name, lies in the
            system's temporary folder, and goes with the process however it ends.

        Raises
        ------
        GossamerError
            If not one position fits, or the disk is full.
        """
        cut = windows(tokens, stride)
        losses, store = LossSum(), None
        positions = torch.empty(0, dtype=torch.int64)
        run = log_probabilities(
            model, cut, batch_size=batch_size, progress=progress, what="recording dense"
        )
        try:
            with closing(run) as chunks:
                for chunk in chunks:
                    if store is None:
                        count = min(cut.count, max_bytes // (4 * chunk.log_probs.shape[1]))
                        store = _Store(count, chunk.log_probs.shape[1], max_bytes)
                        positions = torch.arange(count) * cut.count // count
                    losses.add(chunk)
                    low, high = _between(positions, chunk.start, chunk.start + len(chunk.targets))
                    index = (positions[low:high] - chunk.start).to(chunk.log_probs.device)
                    store.write(low, chunk.log_probs[index])
        except BaseException:
            if store is not None:
                store.close()
            raise
        assert store is not None
        loss = losses.loss()
        own = Score(loss, perplexity_of(loss), losses.tokens, cut.context, cut.stride, 0.0, 1.0)
        return cls(own, positions, cut.fingerprint(), store)

    def compare(self, cut: Windows) -> Comparison:
        """Start a comparison over the windows the reference was recorded on.

        Raises
        ------
        GossamerError
            If they are other windows, or the reference is closed.
        """
        if self._store.closed:
            raise GossamerError("the reference is closed; record it again")
        if cut.fingerprint() != self.fingerprint:
            raise GossamerError(
                "the reference was recorded on other tokens or another stride; "
                "score with the same tokens and stride, or record again"
            )
        return Comparison(self)

    def between(self, start: int, stop: int) -> tuple[int, int]:
        """Range of the held positions that lie in ``start <= position < stop``."""
        return _between(self.positions, start, stop)

    def rows(self, low: int, high: int) -> Tensor:
        """(high - low, V) float32 log-probabilities of some held positions."""
        return self._store.read(low, high)

    def close(self) -> None:
        """Free the disk space. A second call does nothing."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _between(positions: Tensor, start: int, stop: int) -> tuple[int, int]:
    low, high = torch.searchsorted(positions, torch.tensor([start, stop])).tolist()
    return low, high


class _Store:
    """A (P, V) float32 matrix in an unnamed temporary file."""

    def __init__(self, positions: int, vocabulary: int, max_bytes: int) -> None:
        if positions < 1:
            raise GossamerError(
                f"max_bytes is {max_bytes}; one position of a vocabulary of {vocabulary} takes "
                f"{4 * vocabulary}: give at least that"
            )
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._map: np.memmap | None = None
        size = 4 * positions * vocabulary
        try:
            # A sparse file on a full disk would end the process on a write into the map.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            self._map = np.memmap(self._file, np.float32, "r+", shape=(positions, vocabulary))
        except OSError as error:
            self._file.close()
            raise GossamerError(
                f"no room for {size / 2**20:.0f} MiB of predictions in {tempfile.gettempdir()} "
                f"({error.strerror}); lower max_bytes or set TMPDIR"
            ) from None

    @property
    def closed(self) -> bool:
        return self._map is None

    def write(self, low: int, rows: Tensor) -> None:
        assert self._map is not None
        self._map[low : low + len(rows)] = rows.cpu().numpy()

    def read(self, low: int, high: int) -> Tensor:
        assert self._map is not None
        return torch.from_numpy(np.array(self._map[low:high]))

    def close(self) -> None:
        self._map = None
        self._file.close()
