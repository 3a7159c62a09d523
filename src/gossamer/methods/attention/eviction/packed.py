"""The index of a call whose cache gave up keys: all that is still held.

Shapes: B = batch, G = key-value heads, Q = queries, M = most kept keys of a head, T = tokens that
came after the eviction.
"""

from dataclasses import dataclass

from torch import Tensor

from gossamer.methods.attention.eviction.ragged import from_right
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import Layout

__all__ = ["PackedIndex"]


_ROWS = 256
"""Queries whose pairs are counted at a time."""


@dataclass(frozen=True, eq=False)
class PackedIndex(KeyIndex):
    """All keys that a shortened cache layer still holds.

    Parameters
    ----------
    layout : the call over what is held. The new keys stand at the end, so causality is as ever.
    model : the call as the model sees it, over all keys there ever were.
    held : bool, (B, G, M + T), places of the returned tensors that hold a key of the head.
    """

    layout: Layout
    model: Layout
    held: Tensor

    @classmethod
    def over(
        cls, model: Layout, counts: Tensor, later: int, size: int | None = None
    ) -> "PackedIndex":
        """The index of a call on a shortened layer.

        Parameters
        ----------
        model : its layout. counts : (B, G), keys held of each head, the later ones included.
        later : T, of these those that came after the eviction. size : M + T, where
            it is known without asking the device.
        """
        size = int(counts.max()) if size is None else size
        name = ("packed", size)
        if name not in model.memo:
            model.memo[name] = Layout(
                model.batch,
                model.queries,
                size,
                query_offset=size - model.queries,
                device=model.device,
            )
        held = from_right(counts, size)
        if model.padding is not None and later:
            held[:, :, size - later :] &= model.padding[:, None, model.end - later : model.end]
        return cls(model.memo[name], model, held)

    @property
    def whole(self) -> bool:
        return bool(self.held.all())

    def mask(self, rows: slice | None = None) -> Tensor:
        return self.layout.mask(rows) & self.held[:, :, None, :]

    def pairs(self) -> tuple[int, int]:
        """Pairs held, and pairs the model would read had nothing been evicted."""
        kept = own = 0
        for start in range(0, self.layout.queries, _ROWS):
            rows = slice(start, min(start + _ROWS, self.layout.queries))
            seen = self.model.mask(rows)
            batch = max(len(self.held), len(seen))
            kept += int(self.mask(rows).sum())
            own += int(seen.sum()) * (batch // len(seen)) * self.held.shape[1]
        return kept, own
