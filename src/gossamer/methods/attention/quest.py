"""Quest: bound what each page of keys could score, read the pages that could score most.

Which keys matter depends on the query, so none may be thrown away; but most need not be read. Two
vectors per page of 16 keys bound every q . k inside it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from gossamer.core import Card, check_count, unknown
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.decoding.best_pages import BestPages
from gossamer.methods.attention.decoding.choose import Amount, index_of, visible
from gossamer.methods.attention.decoding.pages import Scorer, page_scores, remembered_pages
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import State

__all__ = ["Quest"]

_LEAST = 3
"""Pages read in any case, as in the reference code."""


@dataclass(frozen=True)
class PageSelector(Selector):
    """The pages with the highest estimates, and the page that is still being filled."""

    page_size: int
    scorer: Scorer
    sparsity: float | None
    budget_tokens: int | None

    stateful: ClassVar[bool] = True

    def select(self, call: Call, layout: Layout, layer: int) -> BlockIndex:
        first, second, start = remembered_pages(call, layout, self.page_size, self.scorer)
        query = call.grouped_query()
        if layout.plain and layout.queries == 1:
            pages = (layout.end - layout.key_offset - 1) // self.page_size
            first, second = first[:, :, :pages], second[:, :, :pages]
            score = page_scores(query, first, second, self.scorer)[:, :, 0]
            # Counted on the host: the kernel that attends also chooses, so nothing waits.
            keep = int(self._amount.of(torch.tensor(pages + 1)))
            return BestPages(layout, self.page_size, score, keep)
        score = page_scores(query, first, second, self.scorer)
        if isinstance(start, int):
            start = torch.full((1,), start, device=score.device)
        page = self._pages(score, layout, start)
        if layout.padding is None:
            return index_of(layout, page, self.page_size)
        return index_of(layout, self._keys(page, start, layout))

    @property
    def _amount(self) -> Amount:
        return Amount(self.sparsity, self.budget_tokens).pages(self.page_size, _LEAST)

    def _pages(self, score: Tensor, layout: Layout, start: Tensor) -> Tensor:
        """(B, G, Q, k) numbers of the pages read, -1 for none; best first, then earlier first."""
        size, pages = self.page_size, score.shape[-1]
        at = layout.query_index - layout.key_offset
        own = (at - start[:, None]).div(size, rounding_mode="floor")[:, None, :, None]
        number = torch.arange(pages + 1, device=score.device)
        # A page counts once it is full before the query's own, which is read in any case; so a
        # query sees the same pages alone and among others that are checked with it.
        score = torch.nn.functional.pad(score, (0, 1), value=-torch.inf)
        score = score.masked_fill(number >= own, -torch.inf)
        score = score.masked_fill(~self._shown(layout, start, pages + 1), -torch.inf)
        score = score.scatter(3, own.clamp(0, pages).expand(*score.shape[:3], 1), torch.inf)
        # A window of the model's own may begin inside a page.
        oldest = at - visible(layout) + 1 - start[:, None]
        seen = own[:, 0, :, 0] - oldest.clamp_min(0).div(size, rounding_mode="floor") + 1
        keep = self._amount.of(seen)
        most = min(int(keep.max()), pages + 1)
        top, order = score.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(most, device=score.device)
        kept = (rank < keep[:, None, :, None]) & (top[..., :most] > -torch.inf)
        return torch.where(kept, order[..., :most], -1)

    def _shown(self, layout: Layout, start: Tensor, pages: int) -> Tensor:
        """Whether the model shows a query the last key of a page: (B, 1, Q, P), or all (1,)."""
        if layout.causal or not layout.regular:
            return torch.ones(1, dtype=torch.bool, device=layout.device)
        last = torch.arange(1, pages + 1, device=layout.device) * self.page_size - 1
        last = (last + start[:, None] + layout.key_offset).clamp_max(layout.known - 1)
        return layout.sees(layout.query_index.view(1, 1, -1, 1), last[:, None, None])

    def _keys(self, page: Tensor, start: Tensor, layout: Layout) -> Tensor:
        """Single keys of pages that begin at other places in every row."""
        inside = torch.arange(self.page_size, device=page.device)
        place = page[..., None] * self.page_size + start.view(-1, 1, 1, 1, 1) + inside
        there = (page[..., None] >= 0) & (place < layout.keys)
        return torch.where(there, place, -1).flatten(3)

    def state(self) -> State:
        return State(asdict(self))

    def notes(self) -> tuple[str, ...]:
        return (
            f"choosing reads 1/{self.page_size} of the keys' and values' bytes: "
            f"two vectors per page of {self.page_size} keys",
        )


@dataclass(frozen=True, kw_only=True)
class Quest(AttentionMethod):
    """While decoding, read only the pages of keys that could score highest with the query.

    Parameters
    ----------
    sparsity : share of the visible pages a query leaves out, in [0, 1); 0.5 when no budget is
        given. At least three pages are read.
    budget_tokens : keys a query reads instead, in whole pages.
    page_size : keys of a page.
    scorer : ``minmax`` (the paper's bound) or ``meanstd`` (mean and spread of a page, narrower
        where the keys of a page have little in common).
    dense_layers : first layers that keep full attention; 2 as in the reference code.

    The heads that share keys share pages: their scores are summed. The page being filled is
    always read, of equal scores the earlier pages. All keys stay in the cache; the summaries take
    1/page_size more. On a GPU one kernel bounds the pages and one chooses and attends (backend
    ``triton_decode``); padded batches and several tokens at once read lists of keys instead.

    Examples
    --------
    >>> from gossamer import FlexPrefill, Quest  # doctest: +SKIP
    >>> with (FlexPrefill() + Quest(budget_tokens=1024)).apply(model):  # doctest: +SKIP
    ...     model.generate(prompt, max_new_tokens=100)

    Departs from the paper: pages are shared by the heads of a group, as grouped-query models need
    (the paper's models have none); the page being filled is read without asking for its score.
    """

    card: ClassVar = Card(
        title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        year=2024,
        arxiv="2406.10774",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores of decoded tokens",
        score="upper bound of q . k in a page from channel minima and maxima, or mean and spread",
        pattern="pages of keys per query and key-value head",
        budget="number of keys, or sparsity over visible pages",
        schedule="every decoded token",
        kernel="page scores; choice, page gather and attention in one (Triton)",
        departs="heads of a group share pages by summed scores; the open page is always read",
    )
    phases: ClassVar = frozenset({"decode"})
    subject: ClassVar = "decoding language model"
    full: ClassVar = {"sparsity": 0.0}
    example: ClassVar = {"page_size": 2, "dense_layers": 0}
    exempt: ClassVar = {
        "exact sparsity": "a query reads whole pages, at least three",
        "encoders": "the family works on causal decoders",
    }

    sparsity: float | None = None
    budget_tokens: int | None = None
    page_size: int = 16
    scorer: Scorer = "minmax"
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        Amount.check(self)
        check_count("page_size", self.page_size, 1)
        if self.scorer not in get_args(Scorer):
            raise unknown("page scorer", self.scorer, get_args(Scorer))

    def plan(self, model: nn.Module, data: Any, length: int) -> PageSelector:
        return PageSelector(self.page_size, self.scorer, self.sparsity, self.budget_tokens)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PageSelector:
        return PageSelector(
            meta["page_size"], meta["scorer"], meta["sparsity"], meta["budget_tokens"]
        )
