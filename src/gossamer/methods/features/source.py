"""ActivationSource: the activations of any module, as shuffled rows ready for training.

The forward pass ends at the module: nothing behind it is computed. Padding never enters.
Shapes: R = rows, D = columns of a row: the width of the module's output, or of several.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.hooks import find_module, split_path
from gossamer.methods.features.host import HostPass
from gossamer.methods.features.packing import Packed
from gossamer.methods.features.readers import Reader
from gossamer.methods.features.stream import Stream
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
    model : a transformers model.
    path : of the module whose output is read, ``path:in`` for its input, or several of them:
        their columns are joined in this order.
    data : windows of tokens, packed documents, or ready-made inputs.
    windows : windows of a forward pass. seed : of every shuffle.
    sink_multiple : rows with a norm above so many times the median of the first batch are left
        out; such attention sinks carry the loss and teach nothing. None keeps them. Of several
        modules the first decides.
    skip_first : leave out the first real token of every window, or of every document where
        documents are packed.
    resident_bytes : most memory for rows kept between passes. buffer : rows mixed otherwise.
    reader : makes a batch's columns in place of the hooks; see ``readers.py``.
    host : forward passes shared with other sources over the same data, windows and seed.

    Attributes
    ----------
    sink_norm : the limit in force, or None. width : D. columns : widths of the joined modules.

    Raises
    ------
    GossamerError
        For an unknown path (the nearest are named) or activations that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | tuple[str, ...],
        data: Tokens | Packed | Inputs,
        *,
        windows: int = 8,
        seed: int = 0,
        sink_multiple: float | None = 10.0,
        skip_first: bool = False,
        resident_bytes: int = 1 << 28,
        buffer: int = 1 << 15,
        reader: Reader | None = None,
        host: HostPass | None = None,
    ) -> None:
        check_sink_multiple(sink_multiple)
        self.paths = (path,) if isinstance(path, str) else tuple(path)
        for one in self.paths:
            find_module(model, split_path(one)[0])
        self.model, self.path, self.data = model, "|".join(self.paths), data
        self.name = self.path
        self.windows, self.seed, self.buffer = windows, seed, buffer
        self.sink_multiple, self.skip_first, self.reader = sink_multiple, skip_first, reader
        self._host = HostPass(model, data) if host is None or reader is not None else host
        assert self._host.data is data, "sources that share a pass share the data"
        self._me = self._host.join(self.paths)
        self._resident: Tensor | None = None
        self.sink_norm: float | None = None
        self.columns: tuple[int, ...] = ()
        self._host.announce(self._me, "first")
        first = self._rows(torch.arange(min(windows, len(data))), ("first",))
        self._host.leave(self._me, "first")
        self.width = first.shape[1]
        if sink_multiple is not None and len(first):
            self.sink_norm = sink_multiple * float(self._norms(first).median())
        if isinstance(data, Inputs):
            self._most = len(first) // min(windows, len(data)) * len(data)
        else:
            self._most = int(self._real(torch.arange(len(data))).sum())
        self._fits = self._most * self.width * 4 <= resident_bytes
        self._host.announce(self._me, "all" if self._fits else "passes")

    # -- rows ------------------------------------------------------------------------------

    def _real(self, at: Tensor) -> Tensor:
        """Which tokens of windows (W, T) become rows."""
        assert not isinstance(self.data, Inputs)
        if isinstance(self.data, Packed):
            return self.data.rows(at, skip_first=self.skip_first)
        valid = self.data.attention_mask[at]
        return valid & (valid.cumsum(1) > 1) if self.skip_first else valid

    def _hidden(self, at: Tensor, ticket: tuple[Any, ...]) -> list[Tensor]:
        """Activations of the windows at these places, a tensor a module."""
        if self.reader is not None:
            return [self.reader(self.model, self._host.batch(at))]
        found = self._host.fetch(self._me, ticket, at)
        return [found[path] for path in self.paths]

    def _norms(self, rows: Tensor) -> Tensor:
        first = self.columns[0] if self.reader is None else self.reader.channels
        return torch.linalg.vector_norm(rows[:, :first], dim=1)

    def _rows(self, at: Tensor, ticket: tuple[Any, ...]) -> Tensor:
        """Valid rows (R, D), float32, of the windows at these places."""
        parts = [
            hidden.reshape(-1, hidden.shape[-1]).float() for hidden in self._hidden(at, ticket)
        ]
        if len({len(part) for part in parts}) > 1:
            raise GossamerError(
                f"modules {', '.join(self.paths)} give {', '.join(str(len(p)) for p in parts)} "
                "rows; join modules with one row a token"
            )
        self.columns = tuple(part.shape[1] for part in parts)
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if not isinstance(self.data, Inputs):
            valid = self._real(at)
            if valid.numel() != len(rows):
                raise GossamerError(
                    f"module {self.path!r} returns {len(rows)} rows for {tuple(valid.shape)} "
                    "tokens; hook a module with one row a token"
                )
            rows = rows[valid.reshape(-1).to(rows.device)]
        if not bool(torch.isfinite(rows).all()):
            raise GossamerError(
                f"activations of {self.path!r} hold NaN or infinity; load the model in float32"
            )
        if self.sink_norm is not None:
            rows = rows[self._norms(rows) <= self.sink_norm]
        return rows

    def rows(self, at: Tensor) -> Tensor:
        """Valid rows (R, D), float32, of the windows at these places."""
        return self._rows(at, (("own", self._me), int(at[0])))

    def fingerprint(self) -> str:
        """SHA-256 of the data that is read."""
        data = self.data
        named = vars(data)["values"] if isinstance(data, Inputs) else vars(data)
        digest = hashlib.sha256()
        for name, value in sorted(named.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()

    def one_pass(self) -> Iterator[Tensor]:
        """The rows of every window once, in the windows' own order, a batch at a time."""
        if self._resident is not None:
            yield from self._resident.split(self.buffer)
            return
        for number, at in enumerate(torch.arange(len(self.data)).split(self.windows)):
            # Sources that keep all rows walk the data together; others look on their own.
            yield self._rows(at, ("all" if self._fits else ("own", self._me), number))

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

    # -- the stream ------------------------------------------------------------------------

    def items(self) -> int:
        """Windows, which a stream puts in a new order each pass."""
        return len(self.data)

    def pieces(self) -> int:
        """Forward passes of one pass over the data."""
        return -(-len(self.data) // self.windows)

    def piece(self, order: Tensor, turn: int, number: int) -> Tensor:
        """Rows of one forward pass of a stream's pass over the data."""
        at = order[number * self.windows : (number + 1) * self.windows]
        return self._rows(at, ("passes", turn, number))

    def batches(self, size: int) -> Stream:
        """Endless shuffled (size, D) batches; the stream can tell its place and be resumed.

        Raises
        ------
        GossamerError
            At the first batch, if the data yields no row.
        """
        return Stream(self, size)

    def close(self) -> None:
        """Read no more: others that share the forward passes need not wait."""
        self._host.leave(self._me, "passes")
        self._host.leave(self._me, "all")

    def metadata(self) -> dict[str, Any]:
        """What was read and what was left out, JSON-able."""
        config = getattr(self.model, "config", None)
        packed = self.data.describe() if isinstance(self.data, Packed) else {"packing": "as given"}
        first = "document" if isinstance(self.data, Packed) else "window"
        return {
            "model_name": getattr(config, "name_or_path", "") or type(self.model).__name__,
            "hook_name": self.path,
            "context_size": None if isinstance(self.data, Inputs) else self.data.length,
            "windows": len(self.data),
            **packed,
            "padding": "left out",
            "first_token": "left out" if self.skip_first else "kept",
            "first_token_of": first,
            "sink_multiple": self.sink_multiple,
            "sink_norm": self.sink_norm,
            "seed": self.seed,
        }
