"""Stream: endless shuffled batches of rows, whose place can be written down and found again.

Shapes: R = rows, D = columns of a row.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["Rows", "Stream"]

_NEXT_PASS = 1_000_003


class Rows(Protocol):
    """What a stream draws from: pieces of rows, which may all be kept in memory."""

    seed: int
    buffer: int
    name: str

    def resident(self) -> Tensor | None:
        """All rows (R, D) in memory, or None where they do not fit."""
        ...

    def pieces(self) -> int:
        """Number of pieces of a pass."""
        ...

    def piece(self, order: Tensor, turn: int, number: int) -> Tensor:
        """Rows of one piece of a pass in which pieces' content comes in ``order``."""
        ...

    def items(self) -> int:
        """Number of things that ``order`` permutes."""
        ...


class Stream(Iterator[Tensor]):
    """Endless shuffled (size, D) batches.

    Rows in memory are permuted anew in every pass. Others fill a buffer, piece by piece in a new
    order each pass; the buffer is shuffled and half used before it is filled again, so that a
    batch mixes many pieces.

    Parameters
    ----------
    rows : drawn from. size : rows of a batch.

    Raises
    ------
    GossamerError
        At the first batch, if there is no row.
    """

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows, self.size = rows, size
        self._generator = torch.Generator().manual_seed(rows.seed)
        self._turn = self._number = 0
        self._order: Tensor | None = None
        # Places of rows in memory that this pass has left, or rows that wait in the buffer.
        self._left: Tensor | None = None
        self._ready = 0
        self._served = 0
        self._found = False

    def peek(self, count: int) -> Tensor:
        """The rows of up to ``count`` batches that come next; the stream stays where it is."""
        if self.rows.resident() is not None:
            ahead = Stream(self.rows, self.size)
            ahead.load(self.state())
            return torch.cat([next(ahead) for _ in range(count)])
        if self._served == self._ready:
            self._fill()
        assert self._left is not None
        return self._left[self._served : min(self._ready, self._served + count * self.size)]

    def __next__(self) -> Tensor:
        rows = self.rows.resident()
        return self._from_buffer() if rows is None else self._from_memory(rows)

    def _permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)

    def _from_memory(self, rows: Tensor) -> Tensor:
        if not len(rows):
            raise GossamerError(f"no rows of {self.rows.name!r} are left; give longer text")
        left = torch.empty(0, dtype=torch.int64) if self._left is None else self._left
        while len(left) < self.size:
            left = torch.cat([left, self._permutation(len(rows))])
        self._left = left[self.size :]
        return rows[left[: self.size].to(rows.device)]

    def _next_piece(self) -> Tensor:
        if self._number == self.rows.pieces():
            if not self._found:
                raise GossamerError(f"no rows of {self.rows.name!r} are left; give longer text")
            self._turn, self._number, self._order, self._found = self._turn + 1, 0, None, False
        if self._order is None:
            seed = (self.rows.seed + _NEXT_PASS * self._turn) % 2**32
            generator = torch.Generator().manual_seed(seed)
            self._order = torch.randperm(self.rows.items(), generator=generator)
        made = self.rows.piece(self._order, self._turn, self._number)
        self._number += 1
        self._found = self._found or bool(len(made))
        return made

    def _from_buffer(self) -> Tensor:
        if self._served == self._ready:
            self._fill()
        assert self._left is not None
        batch = self._left[self._served : self._served + self.size]
        self._served += self.size
        return batch

    def _fill(self) -> None:
        capacity = max(2 * self.size, self.rows.buffer)
        pieces = [] if self._left is None else [self._left[self._served :]]
        count = sum(map(len, pieces))
        while count < capacity:
            pieces.append(self._next_piece())
            count += len(pieces[-1])
        pool = torch.cat([piece.to(pieces[-1].device) for piece in pieces])
        self._left = pool[self._permutation(count).to(pool.device)]
        self._ready, self._served = count // 2 // self.size * self.size, 0

    def state(self) -> dict[str, Tensor]:
        """Where the stream is; the rows that wait in the buffer are part of it."""
        numbers = [self._turn, self._number, self._ready, self._served, int(self._found)]
        found = {"generator": self._generator.get_state(), "numbers": torch.tensor(numbers)}
        if self._left is not None:
            found["left"] = self._left
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave, to the bit."""
        self._generator.set_state(state["generator"].cpu())
        self._turn, self._number, self._ready, self._served, found = state["numbers"].tolist()
        self._found, self._order = bool(found), None
        self._left = state.get("left")
