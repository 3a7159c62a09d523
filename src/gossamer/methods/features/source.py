"""ActivationSource: the activations of any module, as shuffled rows ready for training.

The forward pass ends at the module: nothing behind it is computed. Padding never enters.
Shapes: R = rows, D = width of the module's output.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.hooks import record
from gossamer.models import Inputs, Tokens

__all__ = ["ActivationSource", "check_sink_multiple"]


def check_sink_multiple(multiple: float | None) -> None:
    """Refuse a multiple of the median norm that would call ordinary rows sinks."""
    if multiple is not None and not 1 < multiple < float("inf"):
        raise GossamerError(f"sink_multiple is {multiple!r}; give a number above 1, or None")


class ActivationSource:
    """Rows of one module's activations, endlessly, in an order fixed by the seed.

    Rows that fit ``resident_bytes`` are computed once and permuted anew in every pass. Others
    are computed anew in every pass: windows in random order fill a buffer, which is shuffled
    and half used before it is filled again, so that a batch mixes many windows.

    Parameters
    ----------
    model, path : whose activations. data : windows of tokens, or ready-made inputs.
    windows : windows of a forward pass. seed : of every shuffle.
    sink_multiple : rows with a norm above so many times the median of the first batch are left
        out; such attention sinks carry the loss and teach nothing. None keeps them.
    skip_first : leave out the first real token of every window.
    resident_bytes : most memory for rows kept between passes. buffer : rows mixed otherwise.

    Attributes
    ----------
    sink_norm : the limit in force, or None. width : D.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        data: Tokens | Inputs,
        *,
        windows: int = 8,
        seed: int = 0,
        sink_multiple: float | None = 10.0,
        skip_first: bool = False,
        resident_bytes: int = 1 << 28,
        buffer: int = 1 << 15,
    ) -> None:
        check_sink_multiple(sink_multiple)
        self.model, self.path, self.data = model, path, data
        self.windows, self.seed, self.buffer = windows, seed, buffer
        self.sink_multiple, self.skip_first = sink_multiple, skip_first
        self._generator = torch.Generator().manual_seed(seed)
        self._resident: Tensor | None = None
        self.sink_norm: float | None = None
        first = self._rows(torch.arange(min(windows, len(data))))
        self.width = first.shape[1]
        if sink_multiple is not None and len(first):
            norms = torch.linalg.vector_norm(first, dim=1)
            self.sink_norm = sink_multiple * float(norms.median())
        if isinstance(data, Tokens):
            self._most = data.count - skip_first * len(data)
        else:
            self._most = len(first) // min(windows, len(data)) * len(data)
        self._fits = self._most * self.width * 4 <= resident_bytes

    def _batch(self, at: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Keyword arguments of the windows at these places, and which tokens are real."""
        device = next(self.model.parameters()).device
        if isinstance(self.data, Inputs):
            chosen = Inputs({name: value[at] for name, value in self.data.values.items()})
            return next(chosen.batches(len(at), device)), None
        chosen = Tokens(self.data.input_ids[at], self.data.attention_mask[at])
        return next(chosen.batches(len(at), device)), chosen.attention_mask

    def _rows(self, at: Tensor) -> Tensor:
        """Valid rows (R, D), float32, of the windows at these places."""
        batch, valid = self._batch(at)
        hidden = record(self.model, (self.path,), batch)[self.path]
        rows = hidden.reshape(-1, hidden.shape[-1]).float()
        if valid is not None:
            if valid.numel() != len(rows):
                raise GossamerError(
                    f"module {self.path!r} returns {tuple(hidden.shape)} for "
                    f"{tuple(valid.shape)} tokens; hook a module with one row a token"
                )
            if self.skip_first:
                valid = valid & (valid.cumsum(1) > 1)
            rows = rows[valid.reshape(-1).to(rows.device)]
        if not bool(torch.isfinite(rows).all()):
            raise GossamerError(
                f"activations of {self.path!r} hold NaN or infinity; load the model in float32"
            )
        if self.sink_norm is not None:
            rows = rows[torch.linalg.vector_norm(rows, dim=1) <= self.sink_norm]
        return rows

    def one_pass(self, order: Tensor | None = None) -> Iterator[Tensor]:
        """The rows of every window once, a batch of windows at a time.

        Parameters
        ----------
        order : of the windows; None for their own.
        """
        if order is None and self._resident is not None:
            yield from self._resident.split(self.buffer)
            return
        order = torch.arange(len(self.data)) if order is None else order
        for at in order.split(self.windows):
            yield self._rows(at)

    def head(self, rows: int) -> Iterator[Tensor]:
        """Batches of :meth:`one_pass` until so many rows have passed."""
        for batch in self.one_pass():
            yield batch
            rows -= len(batch)
            if rows <= 0:
                return

    @property
    def count(self) -> int:
        """Rows of one pass; where they are not kept in memory, sink rows are counted too."""
        rows = self.resident()
        return self._most if rows is None else len(rows)

    def resident(self) -> Tensor | None:
        """All rows (R, D) in memory, in the order of the data, or None where they do not fit."""
        if self._fits and self._resident is None:
            self._resident = torch.cat(list(self.one_pass()))
        return self._resident

    def _permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)

    def _passes(self) -> Iterator[Tensor]:
        """Rows in pieces, pass after pass, windows in a new order each time."""
        while True:
            yielded = 0
            for rows in self.one_pass(self._permutation(len(self.data))):
                yielded += len(rows)
                yield rows
            if not yielded:
                raise GossamerError(f"no rows of {self.path!r} are left; give longer text")

    def batches(self, size: int) -> Iterator[Tensor]:
        """Endless shuffled (size, D) batches.

        Raises
        ------
        GossamerError
            If the data yields no row.
        """
        rows = self.resident()
        if rows is not None:
            yield from self._from_memory(rows, size)
        pool, stream = torch.empty(0, self.width), self._passes()
        capacity = max(2 * size, self.buffer)
        while True:
            pieces, count = [pool], len(pool)
            while count < capacity:
                pieces.append(next(stream))
                count += len(pieces[-1])
            pool = torch.cat([piece.to(pieces[-1].device) for piece in pieces])
            pool = pool[self._permutation(count).to(pool.device)]
            used = count // 2 // size * size
            yield from pool[:used].split(size)
            pool = pool[used:]

    def _from_memory(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        if not len(rows):
            raise GossamerError(f"no rows of {self.path!r} are left; give longer text")
        left = torch.empty(0, dtype=torch.int64)
        while True:
            while len(left) < size:
                left = torch.cat([left, self._permutation(len(rows))])
            yield rows[left[:size].to(rows.device)]
            left = left[size:]

    def metadata(self) -> dict[str, Any]:
        """What was read and what was left out, JSON-able."""
        config = getattr(self.model, "config", None)
        return {
            "model_name": getattr(config, "name_or_path", "") or type(self.model).__name__,
            "hook_name": self.path,
            "context_size": self.data.length if isinstance(self.data, Tokens) else None,
            "windows": len(self.data),
            "packing": "as given",
            "padding": "left out",
            "first_token": "left out" if self.skip_first else "kept",
            "sink_multiple": self.sink_multiple,
            "sink_norm": self.sink_norm,
            "seed": self.seed,
        }
