"""Pattern: which shapes of sparsity are allowed, and the one function that selects.

``pattern.select(score, budget)`` is used wherever a score meets a budget: pruning, gating,
eviction, codes. Decided here once, for everyone:

- a count budget keeps exactly ``round((1 - sparsity) * n)`` entries of each group, never
  ``score > threshold``, because ties would then change the count;
- among equal scores the entry with the lower index is kept, so results are deterministic;
- NaN is an error: a score that is not a number has no rank;
- infinities rank as usual; protected entries rank above everything and count as kept;
- nothing kept (sparsity 1) and everything kept (sparsity 0) are ordinary results.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.budget import Budget
from gossamer.core.errors import GossamerError, unknown
from gossamer.core.selection import Selection

__all__ = ["NM", "Block", "Channels", "Pattern", "Unstructured", "Window", "parse_pattern", "topk_mask"]


def check_scores(score: Tensor, name: str = "score") -> None:
    """Refuse scores that have no order."""
    # One pass over finite data: a sum is NaN when any term is, or when +inf meets -inf.
    if torch.isnan(score.sum()) and bool(torch.isnan(score).any()):
        bad = int(torch.isnan(score).sum())
        raise GossamerError(
            f"{name} holds {bad} NaN of {score.numel()} entries; NaN has no rank: "
            "look for NaN in the weights or the calibration activations"
        )


def topk_mask(score: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest entries of each row, ties to the lower index.

    Parameters
    ----------
    score : (R, C), no NaN.
    keep : 0 <= keep <= C, exact for every row.

    Returns
    -------
    bool, (R, C).
    """
    rows, columns = score.shape
    if keep <= 0 or columns == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if keep >= columns:
        return torch.ones_like(score, dtype=torch.bool)
    # kthvalue counts from the smallest; it is cheaper than topk, which also sorts.
    edge = score.kthvalue(columns - keep + 1, dim=1, keepdim=True).values
    mask = score >= edge
    surplus = mask.sum(1) - keep
    tied = surplus.nonzero()[:, 0]
    if len(tied):
        equal = score[tied] == edge[tied]
        room = equal.sum(1, keepdim=True) - surplus[tied, None]
        mask[tied] &= ~equal | (equal.cumsum(1) <= room)
    return mask


def _mass_mask(score: Tensor, mass: float) -> Tensor:
    """Fewest entries of each row whose scores reach a share of the row's sum."""
    if bool((score < 0).any()):
        raise GossamerError("a mass budget needs scores of at least 0; take probabilities or |score|")
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    ranked = score.gather(1, order).double()
    before = ranked.cumsum(1) - ranked
    wanted = before < mass * ranked.sum(1, keepdim=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, wanted)


def select_rows(score: Tensor, budget: Budget, protect: Tensor | None = None) -> Tensor:
    """Apply a budget to each row of a matrix of scores; the core of every pattern.

    Parameters
    ----------
    score : (R, C).
    protect : bool, (R, C); entries that must be kept and count towards the budget.

    Raises
    ------
    GossamerError
        On NaN, or when more entries are protected than a count budget keeps.
    """
    check_scores(score)
    if protect is not None:
        if protect.shape != score.shape or protect.dtype != torch.bool:
            raise GossamerError(
                f"protect is a bool tensor of the score's shape {tuple(score.shape)}; "
                f"got {protect.dtype} {tuple(protect.shape)}"
            )
        if budget.fixes_count:
            keep, most = budget.count(score.shape[1]), int(protect.sum(1).max())
            if most > keep:
                raise GossamerError(
                    f"{most} entries of a row are protected but the budget keeps {keep}; "
                    "lower the sparsity or protect fewer"
                )
    if budget.fixes_count:
        keep = budget.count(score.shape[1])
        if protect is None:
            return topk_mask(score, keep)
        # Protected entries take their places first, so that a score of +inf cannot displace one.
        need = keep - protect.sum(1)
        order = torch.argsort(score.masked_fill(protect, -torch.inf), 1, descending=True, stable=True)
        free = (~protect).gather(1, order)
        taken = free & (free.cumsum(1) <= need[:, None])
        return protect | torch.zeros_like(protect).scatter_(1, order, taken)
    if budget.threshold is not None:
        mask = score >= budget.threshold
    else:
        assert budget.mass is not None
        mask = _mass_mask(score, budget.mass)
    return mask if protect is None else mask | protect


class Pattern(ABC):
    """An allowed shape of sparsity. Its text form (``str(pattern)``) parses back to it."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity the pattern itself dictates, or None when the budget decides."""
        return None

    @abstractmethod
    def select(self, score: Tensor, budget: Budget, protect: Tensor | None = None) -> Selection:
        """Choose what to keep.

        Parameters
        ----------
        score : higher means keep; for weights (O, I) with groups along I.
        budget : how much.
        protect : bool, the score's shape; entries kept whatever their score.
        """

    def check(self, selection: Selection) -> None:
        """Raise ``GossamerError`` if a selection does not have this shape."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any entry may go; the budget holds per row, per layer, or over the whole model.

    Parameters
    ----------
    per : the group in which scores compete. ``"model"`` selects from several layers at once
        through :meth:`select_model`; on a single tensor it equals ``"layer"``.
    """

    per: Literal["row", "layer", "model"] = "row"

    def __post_init__(self) -> None:
        if self.per not in ("row", "layer", "model"):
            raise unknown("comparison group", self.per, ("row", "layer", "model"))

    def select(self, score: Tensor, budget: Budget, protect: Tensor | None = None) -> Selection:
        rows = score.shape[0] if self.per == "row" and score.dim() > 1 else 1
        flat = score.reshape(rows, -1)
        safe = None if protect is None else protect.reshape(rows, -1)
        return Selection.from_mask(select_rows(flat, budget, safe).view(score.shape))

    def select_model(self, scores: Mapping[str, Tensor], budget: Budget) -> dict[str, Selection]:
        """Select from all layers in one competition; the order of the mapping breaks ties.

        Parameters
        ----------
        scores : layer name to scores of any shape, on one device.
        """
        for name, score in scores.items():
            check_scores(score, f"score of {name}")
        flat = torch.cat([score.reshape(1, -1) for score in scores.values()], dim=1)
        parts = select_rows(flat, budget)[0].split([score.numel() for score in scores.values()])
        return {
            name: Selection.from_mask(part.view(score.shape))
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }

    def __str__(self) -> str:
        return self.per


@dataclass(frozen=True)
class NM(Pattern):
    """``keep`` of every ``of`` consecutive entries along the input dimension stay.

    Parameters
    ----------
    keep, of : 0 < keep <= of. ``NM(2, 4)`` is what sparse tensor cores read.
    """

    keep: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of:
            raise GossamerError(
                f"pattern {self.keep}:{self.of} keeps {self.keep} of {self.of}; "
                "it needs 0 < keep <= of"
            )

    @property
    def fixed_sparsity(self) -> float:
        return 1.0 - self.keep / self.of

    def _check_width(self, columns: int) -> None:
        if columns % self.of:
            raise GossamerError(
                f"pattern {self} needs an input width divisible by {self.of}; got {columns}: "
                "choose another pattern or skip this layer"
            )

    def select(
        self, score: Tensor, budget: Budget | None = None, protect: Tensor | None = None
    ) -> Selection:
        """Keep the best of each group; a budget that says something else is an error."""
        self._check_width(score.shape[-1])
        if budget is not None:
            wanted = budget.count(self.of) if budget.fixes_count else None
            if wanted != self.keep:
                raise GossamerError(
                    f"pattern {self} fixes the sparsity at {self.fixed_sparsity:g}; "
                    "leave the sparsity out or choose another pattern"
                )
        groups = score.reshape(-1, self.of)
        safe = None if protect is None else protect.reshape(-1, self.of)
        if safe is None and hasattr(torch.ops.gossamer, "nm_mask"):
            check_scores(score)
            mask = torch.ops.gossamer.nm_mask(groups, self.keep)
        else:
            mask = select_rows(groups, Budget(keep=self.keep), safe)
        return Selection.from_mask(mask.view(score.shape))

    def check(self, selection: Selection) -> None:
        self._check_width(selection.shape[-1])
        counts = selection.mask().reshape(-1, self.of).sum(1)
        wrong = int((counts != self.keep).sum())
        if wrong:
            raise GossamerError(f"{wrong} of {len(counts)} groups do not keep {self.keep} of {self.of}")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class Block(Pattern):
    """Whole tiles of ``high`` x ``wide`` stay or go; a tile's score is the sum of its entries."""

    high: int = 16
    wide: int = 16

    def __post_init__(self) -> None:
        if self.high < 1 or self.wide < 1:
            raise GossamerError(f"pattern {self} needs blocks of at least 1x1")

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[0] % self.high or shape[1] % self.wide:
            raise GossamerError(
                f"pattern {self} needs a matrix whose sides are divisible by {self.high} and "
                f"{self.wide}; got {'x'.join(map(str, shape))}"
            )

    def _grid(self, tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        return tensor.reshape(rows // self.high, self.high, columns // self.wide, self.wide)

    def select(self, score: Tensor, budget: Budget, protect: Tensor | None = None) -> Selection:
        self._check_shape(tuple(score.shape))
        tiles = self._grid(score).sum((1, 3))
        safe = None if protect is None else self._grid(protect).any(3).any(1).reshape(1, -1)
        kept = select_rows(tiles.reshape(1, -1), budget, safe).view(tiles.shape)
        rows, columns = score.shape
        return Selection.from_blocks(kept, (self.high, self.wide), (rows, columns))

    def check(self, selection: Selection) -> None:
        self._check_shape(selection.shape)
        selection.blocks((self.high, self.wide))

    def __str__(self) -> str:
        return f"block:{self.high}x{self.wide}"


@dataclass(frozen=True)
class Channels(Pattern):
    """Whole rows (``axis="out"``) or columns (``axis="in"``) stay or go, by summed score."""

    axis: Literal["out", "in"] = "in"

    def __post_init__(self) -> None:
        if self.axis not in ("out", "in"):
            raise unknown("channel axis", self.axis, ("out", "in"))

    def select(self, score: Tensor, budget: Budget, protect: Tensor | None = None) -> Selection:
        if score.dim() != 2:
            raise GossamerError(f"pattern {self} needs a matrix; got shape {tuple(score.shape)}")
        across = 1 if self.axis == "out" else 0
        safe = None if protect is None else protect.any(across)[None]
        kept = select_rows(score.sum(across)[None], budget, safe)[0]
        mask = kept[:, None] if self.axis == "out" else kept[None, :]
        return Selection.from_mask(mask.expand(score.shape).contiguous())

    def check(self, selection: Selection) -> None:
        mask = selection.mask()
        across = 1 if self.axis == "out" else 0
        if not bool(torch.equal(mask.all(across), mask.any(across))):
            raise GossamerError(f"some {self.axis} channels are kept in part")

    def __str__(self) -> str:
        return f"channels:{self.axis}"


@dataclass(frozen=True)
class Window(Pattern):
    """In a causal map, each query keeps the first ``sink`` keys and the latest ``recent``.

    Parameters
    ----------
    sink : >= 0. recent : >= 1, the query's own position included.
    """

    sink: int = 4
    recent: int = 252

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise GossamerError(
                f"a window needs sink >= 0 and recent >= 1; got sink {self.sink}, recent {self.recent}"
            )

    def kept_pairs(self, length: int) -> int:
        """Pairs (query, key) kept of the ``length * (length + 1) / 2`` causal ones."""
        span = min(length, self.sink + self.recent)
        return span * (span + 1) // 2 + (length - span) * (self.sink + self.recent)

    def sparsity_at(self, length: int) -> float:
        """Share of the causal pairs removed at a sequence length."""
        return 1.0 - self.kept_pairs(length) / (length * (length + 1) // 2)

    @classmethod
    def for_sparsity(cls, sparsity: float, length: int, sink: int = 4) -> "Window":
        """The widest window that removes at least this share of the causal pairs."""
        low, high = 1, max(1, length - sink)
        if cls(sink, low).sparsity_at(length) < sparsity:
            raise GossamerError(
                f"a window with {sink} sinks at {length} tokens reaches sparsity "
                f"{cls(sink, low).sparsity_at(length):.3f} at most; {sparsity} was asked"
            )
        while low < high:
            middle = (low + high + 1) // 2
            if cls(sink, middle).sparsity_at(length) >= sparsity:
                low = middle
            else:
                high = middle - 1
        return cls(sink, low)

    def select(
        self, score: Tensor, budget: Budget | None = None, protect: Tensor | None = None
    ) -> Selection:
        """Keep by position; the score gives only the shape (Q, K), queries at the end of keys."""
        from gossamer.core.scores.attention import positional_window

        queries, keys = score.shape[-2:]
        if len(score.shape) != 2 or queries > keys:
            raise GossamerError(f"a window needs a (queries, keys) map; got {tuple(score.shape)}")
        if budget is not None:
            raise GossamerError(f"pattern {self} fixes what is kept; leave the budget out")
        at = torch.arange(keys, device=score.device)
        mask = positional_window(at[keys - queries :], at, self.sink, self.recent)
        return Selection.from_mask(mask if protect is None else mask | protect)

    def __str__(self) -> str:
        return f"window:{self.sink}+{self.recent}"


_FORMS = ("row", "layer", "model", "N:M as 2:4", "block:HxW", "channels:in", "channels:out", "window:SINK+RECENT")


def parse_pattern(text: str) -> Pattern:
    """Read a pattern's text form, the same in the CLI, in recipes and on cards.

    >>> parse_pattern("2:4")
    NM(keep=2, of=4)

    Raises
    ------
    GossamerError
        For anything else than the forms above.
    """
    word = text.strip()
    try:
        if word in ("row", "layer", "model"):
            return Unstructured(per=word)
        head, colon, tail = word.partition(":")
        if colon and head.isdigit() and tail.isdigit():
            return NM(int(head), int(tail))
        if head == "block":
            high, wide = tail.split("x")
            return Block(int(high), int(wide))
        if head == "channels" and tail in ("in", "out"):
            return Channels(axis=tail)
        if head == "window":
            sink, recent = tail.split("+")
            return Window(int(sink), int(recent))
    except GossamerError:
        raise
    except ValueError:
        pass
    raise unknown("pattern", text, _FORMS)


def group_count(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """In how many groups of a tensor the pattern applies its budget separately."""
    if isinstance(pattern, NM):
        return prod(shape) // pattern.of
    return shape[0] if isinstance(pattern, Unstructured) and pattern.per == "row" else 1
