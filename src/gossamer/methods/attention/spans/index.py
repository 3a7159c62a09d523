"""A window per key-value head: sinks and the latest keys, as many as the head's span says.

Shapes: B = batch (1 where all rows agree), G = key-value heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.methods.attention.index import KeyIndex, WindowIndex
from gossamer.methods.attention.layout import Layout

__all__ = ["Group", "SpanIndex", "logical_lengths"]


@dataclass(frozen=True, eq=False)
class Group:
    """Heads and rows with one and the same window.

    Parameters
    ----------
    row : the batch row, or None for all. heads : key-value heads. index : their window.
    """

    row: int | None
    heads: tuple[int, ...]
    index: WindowIndex


@dataclass(frozen=True, eq=False)
class SpanIndex(KeyIndex):
    """Each query keeps the first ``sink`` real tokens and the latest ones, a number per head.

    Parameters
    ----------
    recent : latest keys, the query's own included; one tuple of G numbers per row, or a single
        one for all rows.
    """

    layout: Layout
    sink: int
    recent: tuple[tuple[int, ...], ...]

    @property
    def whole(self) -> bool:
        shortest = min(min(row) for row in self.recent)
        return WindowIndex(self.layout, self.sink, shortest).whole

    def mask(self, rows: slice | None = None) -> Tensor:
        layout = self.layout
        query, key = layout.query_index, layout.key_index
        query = query if rows is None else query[rows]
        at, of = layout.position[:, None, query, None], layout.position[:, None, None, key]
        recent = torch.tensor(self.recent, device=layout.device)[:, :, None, None]
        inside = ((at - of) < recent) | (of < self.sink)
        return inside & (at >= 0) & (of >= 0) & layout.mask(rows)

    def groups(self) -> tuple[Group, ...]:
        """The plain windows it is made of, each with the rows and heads it serves."""
        found: list[Group] = []
        for row, recent in enumerate(self.recent):
            alone = len(self.recent) > 1
            layout = _row(self.layout, row) if alone else self.layout
            for span in dict.fromkeys(recent):
                heads = tuple(head for head, own in enumerate(recent) if own == span)
                window = WindowIndex(layout, self.sink, span)
                found.append(Group(row if alone else None, heads, window))
        return tuple(found)


def _row(layout: Layout, row: int) -> Layout:
    """One row's part of a layout; made once."""
    name = ("row", row)
    if name not in layout.memo:
        rule = layout.rule

        def own(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return rule(batch + row, head, query, key)

        padding = None if layout.padding is None else layout.padding[row : row + 1]
        part = replace(layout, batch=1, padding=padding, rule=own, memo={})
        position = layout.position
        part.__dict__["position"] = position if len(position) == 1 else position[row : row + 1]
        layout.memo[name] = part
    return layout.memo[name]


def logical_lengths(layout: Layout) -> tuple[int, ...]:
    """Real tokens each row has up to its last query: one number where all rows agree."""
    name = ("logical lengths",)
    if name not in layout.memo:
        if layout.padding is None and layout.regular:
            layout.memo[name] = (layout.end,)
        else:
            last = layout.position[:, : layout.end].amax(1) + 1
            found = tuple(int(n) for n in last.tolist())
            layout.memo[name] = found[:1] if len(set(found)) == 1 else found
    return layout.memo[name]
