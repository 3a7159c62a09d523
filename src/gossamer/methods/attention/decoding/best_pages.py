"""The best pages of one decoded token, left as scores for a kernel that chooses by itself.

A fused kernel finds the best pages while it attends, and nothing returns to the host. Every other
executor reads lists; they are made when it first asks.
Shapes: B = batch, G = key-value heads, P = pages before the query's own.
"""

from functools import cached_property

from torch import Tensor

from gossamer.kernels.page_attention.reference import choose_reference
from gossamer.methods.attention.decoding.choose import index_of
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout

__all__ = ["BestPages"]


class BestPages(BlockIndex):
    """The pages with the highest scores and the query's own, for one query a row.

    Of equal scores the earlier pages are taken.

    Parameters
    ----------
    layout : plain, of one query. page : keys of a page; pages begin at the call's first key.
    score : (B, G, P) float32, P = (keys up to the query - 1) // page. No NaN.
    keep : pages read, the query's own among them; 1 to P + 1.
    """

    score: Tensor
    keep: int

    def __init__(self, layout: Layout, page: int, score: Tensor, keep: int) -> None:
        pages = (layout.end - layout.key_offset - 1) // page
        assert layout.plain, "padded rows take lists"
        assert layout.queries == 1, "several queries take lists"
        assert score.shape[2] == pages, (score.shape, pages)
        assert 1 <= keep <= pages + 1, (keep, pages)
        # The base is frozen; its lists are made below, when asked for.
        vars(self).update(layout=layout, block=(1, page), score=score, keep=keep)

    @property
    def whole(self) -> bool:
        return self.keep > self.score.shape[2]

    @cached_property
    def _lists(self) -> BlockIndex:
        chosen = choose_reference(self.score, self.keep)
        return index_of(self.layout, chosen[:, :, None], self.block[1])

    @cached_property
    def indptr(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._lists.indptr

    @cached_property
    def indices(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._lists.indices

    def __repr__(self) -> str:
        return f"BestPages({self.keep} of {self.score.shape[2] + 1} pages of {self.block[1]} keys)"
