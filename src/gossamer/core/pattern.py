"""Pattern: which shapes of sparsity are allowed, and the one function that selects.

``pattern.select(score, budget)`` is used wherever a score meets a budget: pruning, gating,
eviction, codes. How ties, rounding, NaN and protected entries are treated is decided once, in
:mod:`gossamer.core.rank`; a pattern only says what competes with what.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from gossamer.core.budget import Budget
from gossamer.core.errors import GossamerError, unknown
from gossamer.core.rank import check_scores, select_rows, topk_mask
from gossamer.core.scores.attention import positional_window
from gossamer.core.selection import Selection

__all__ = [
    "NM",
    "Block",
    "Channels",
    "Pattern",
    "Unstructured",
    "Window",
    "check_scores",
    "parse_pattern",
    "select_rows",
    "topk_mask",
]


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
        budget : how much; counts, thresholds and masses hold for each group.
        protect : bool, the score's shape; entries kept whatever their score.

        Raises
        ------
        GossamerError
            On NaN, a shape the pattern does not divide, or more protected than may be kept.
        """

    @abstractmethod
    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``GossamerError`` if a tensor of this shape cannot take the pattern."""

    def check(self, selection: Selection) -> None:
        """Raise ``GossamerError`` if a selection does not have this pattern."""
        self.check_shape(selection.shape)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any entry may go; the budget holds per row, per layer, or over the whole model.

    Parameters
    ----------
    per : the group in which scores compete. A row is an index of the first axis with all that
        hangs on it. ``"model"`` selects from several layers at once through
        :meth:`select_model`; on a single tensor it equals ``"layer"``.
    """

    per: Literal["row", "layer", "model"] = "row"

    def __post_init__(self) -> None:
        if self.per not in ("row", "layer", "model"):
            raise unknown("comparison group", self.per, ("row", "layer", "model"))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Every shape is allowed."""

    def _rows(self, tensor: Tensor) -> Tensor:
        by_row = self.per == "row" and tensor.dim() > 1
        return tensor.flatten(1) if by_row else tensor.reshape(1, -1)

    def select(self, score: Tensor, budget: Budget, protect: Tensor | None = None) -> Selection:
        safe = None if protect is None else self._rows(protect)
        return Selection.from_mask(select_rows(self._rows(score), budget, safe).view(score.shape))

    def select_model(self, scores: Mapping[str, Tensor], budget: Budget) -> dict[str, Selection]:
        """Select from all layers in one competition; the order of the mapping breaks ties.

        Parameters
        ----------
        scores : layer name to scores of any shape, on one device.
        """
        if not scores:
            return {}
        for name, score in scores.items():
            check_scores(score, f"score of {name}")
        flat = torch.cat([score.reshape(-1) for score in scores.values()])
        mask = select_rows(flat[None], budget, checked=True)[0]
        parts = torch.split(mask, [score.numel() for score in scores.values()])
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

    def check_shape(self, shape: tuple[int, ...]) -> None:
        columns = shape[-1] if shape else 0
        if not columns or columns % self.of:
            raise GossamerError(
                f"pattern {self} needs an input width divisible by {self.of}; got {columns}: "
                "choose another pattern or skip this layer"
            )

    def _check_budget(self, budget: Budget | None) -> None:
        if budget is None or budget.keep == self.keep:
            return
        if budget.sparsity is None or abs(budget.sparsity - self.fixed_sparsity) > 1e-6:
            raise GossamerError(
                f"pattern {self} fixes the sparsity at {self.fixed_sparsity:g}; "
                "leave the sparsity out or choose another pattern"
            )

    def select(
        self, score: Tensor, budget: Budget | None = None, protect: Tensor | None = None
    ) -> Selection:
        """Keep the best of each group; a budget that says something else is an error."""
        self.check_shape(tuple(score.shape))
        self._check_budget(budget)
        groups = score.reshape(-1, self.of)
        kernel = _nm_kernel()
        if protect is None and kernel is not None:
            mask = kernel(groups, self.keep)  # Looks for NaN in the same pass over the scores.
        else:
            safe = None if protect is None else protect.reshape(-1, self.of)
            mask = select_rows(groups, Budget(keep=self.keep), safe)
        return Selection.from_mask(mask.view(score.shape), kept=len(groups) * self.keep)

    def check(self, selection: Selection) -> None:
        self.check_shape(selection.shape)
        counts = selection.mask().reshape(-1, self.of).sum(1)
        if wrong := int((counts != self.keep).sum()):
            raise GossamerError(
                f"{wrong} of {len(counts)} groups do not keep {self.keep} of {self.of}"
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


def _nm_kernel() -> Callable[[Tensor, int], Tensor] | None:
    # Looked up by name because core imports no kernels; gossamer.kernels registers it.
    operator: object = getattr(torch.ops.gossamer, "nm_mask", None)
    return cast(Callable[[Tensor, int], Tensor] | None, operator)


def _sum(score: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum in at least float32: the rounding of half precision would create ties."""
    small = score.is_floating_point() and score.element_size() < 4
    return score.sum(dim, dtype=torch.float32 if small else None)


@dataclass(frozen=True)
class Block(Pattern):
    """Whole tiles of ``high`` x ``wide`` stay or go; a tile's score is the sum of its entries.

    All tiles of the matrix compete. A ``keep`` budget counts tiles; a threshold is compared
    with their sums. A tile with a protected entry is protected.
    """

    high: int = 16
    wide: int = 16

    def __post_init__(self) -> None:
        if self.high < 1 or self.wide < 1:
            raise GossamerError(f"pattern {self} needs blocks of at least 1x1")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[0] % self.high or shape[1] % self.wide:
            raise GossamerError(
                f"pattern {self} needs a matrix whose sides are divisible by {self.high} and "
                f"{self.wide}; got {'x'.join(map(str, shape))}"
            )

    def _grid(self, tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        return tensor.reshape(rows // self.high, self.high, columns // self.wide, self.wide)

    def select(self, score: Tensor, budget: Budget, protect: Tensor | None = None) -> Selection:
        self.check_shape(tuple(score.shape))
        tiles = _sum(self._grid(score), (1, 3))
        safe = None if protect is None else self._grid(protect).any(3).any(1).reshape(1, -1)
        kept = select_rows(tiles.reshape(1, -1), budget, safe).view(tiles.shape)
        rows, columns = score.shape
        return Selection.from_blocks(kept, (self.high, self.wide), (rows, columns))

    def check(self, selection: Selection) -> None:
        self.check_shape(selection.shape)
        selection.blocks((self.high, self.wide))

    def __str__(self) -> str:
        return f"block:{self.high}x{self.wide}"


@dataclass(frozen=True)
class Channels(Pattern):
    """Whole rows (``axis="out"``) or columns (``axis="in"``) stay or go, by summed score.

    A ``keep`` budget counts channels. A channel with a protected entry is protected.
    """

    axis: Literal["out", "in"] = "in"

    def __post_init__(self) -> None:
        if self.axis not in ("out", "in"):
            raise unknown("channel axis", self.axis, ("out", "in"))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise GossamerError(f"pattern {self} needs a matrix; got shape {shape}")

    @property
    def _across(self) -> int:
        return 1 if self.axis == "out" else 0

    def select(self, score: Tensor, budget: Budget, protect: Tensor | None = None) -> Selection:
        self.check_shape(tuple(score.shape))
        safe = None if protect is None else protect.any(self._across)[None]
        kept = select_rows(_sum(score, self._across)[None], budget, safe)[0]
        return Selection.from_mask(kept.unsqueeze(self._across).expand(score.shape).contiguous())

    def check(self, selection: Selection) -> None:
        self.check_shape(selection.shape)
        mask = selection.mask()
        if not torch.equal(mask.all(self._across), mask.any(self._across)):
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
                f"a window needs sink >= 0 and recent >= 1; "
                f"got sink {self.sink}, recent {self.recent}"
            )

    def kept_pairs(self, length: int) -> int:
        """Pairs (query, key) kept of the ``length * (length + 1) / 2`` causal ones."""
        span = min(length, self.sink + self.recent)
        return span * (span + 1) // 2 + (length - span) * (self.sink + self.recent)

    def sparsity_at(self, length: int) -> float:
        """Share of the causal pairs removed at a sequence length of at least 1."""
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

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[0] > shape[1]:
            raise GossamerError(
                f"a window needs a (queries, keys) map with queries <= keys; got {shape}"
            )

    def select(
        self, score: Tensor, budget: Budget | None = None, protect: Tensor | None = None
    ) -> Selection:
        """Keep by position; the score gives only the shape (Q, K), queries at the end of keys."""
        self.check_shape(tuple(score.shape))
        if budget is not None:
            raise GossamerError(f"pattern {self} fixes what is kept; leave the budget out")
        mask = self._mask(score.shape[0], score.shape[1], score.device)
        return Selection.from_mask(mask if protect is None else mask | protect)

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        at = torch.arange(keys, device=device)
        return positional_window(at[keys - queries :], at, self.sink, self.recent)

    def check(self, selection: Selection) -> None:
        self.check_shape(selection.shape)
        mask = selection.mask()
        wanted = self._mask(mask.shape[0], mask.shape[1], mask.device)
        if missing := int((wanted & ~mask).sum()):
            raise GossamerError(f"{missing} pairs inside pattern {self} are removed")

    def __str__(self) -> str:
        return f"window:{self.sink}+{self.recent}"


_FORMS = (
    "row",
    "layer",
    "model",
    "N:M as 2:4",
    "block:HxW",
    "channels:in",
    "channels:out",
    "window:SINK+RECENT",
)


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
    head, _, tail = word.partition(":")
    try:
        if word in ("row", "layer", "model"):
            return Unstructured(per=word)
        if word in ("channels:in", "channels:out"):
            return Channels(axis="in" if tail == "in" else "out")
        if head == "block":
            high, wide = tail.split("x")
            return Block(int(high), int(wide))
        if head == "window":
            sink, recent = tail.split("+")
            return Window(int(sink), int(recent))
        return NM(int(head), int(tail))
    except GossamerError:
        raise
    except ValueError:
        raise unknown("pattern", text, _FORMS) from None
