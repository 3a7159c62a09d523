"""Rows of a comparison as the page reads them: named, grouped, ranked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite, log
from typing import Any

from gossamer.core import GossamerError

__all__ = ["BLOCKS", "NEAR", "TIE", "USABLE", "Group", "Row", "Series", "Table", "short_label"]

USABLE = 2.0
"""A row is called usable up to this multiple of the dense perplexity."""
TIE = 1.01
"""Two perplexities are called level when they differ by less than this factor."""

BLOCKS = "block weight bytes"
"""What weight reads are compared by: methods count them over different matrices."""
NEAR = 0.01
"""Shares of block weight bytes are called equal when they differ by no more than this."""
_READS = "weight reads"

_UNITS = {
    "weights": "weights",
    "activations": _READS,
    "attention": "attention pairs",
    "features": "latents",
}

Group = tuple[str, float, str]
"""What is compared with what: (measure, share, N:M pattern or "")."""


def _number(value: Any) -> float | None:
    """A finite float, or None for null, NaN, infinity and what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isfinite(value) else None


def short_label(method: str) -> str:
    """``magnitude:allocation=erk`` as ``magnitude erk``: the values without their names."""
    key, *parts = method.split(":", 1)
    values = [part.partition("=")[2] or part for part in ",".join(parts).split(",") if part]
    return " ".join([key, *values])


@dataclass(frozen=True)
class Row:
    """One cell of a comparison; figures that are not finite are None.

    Parameters
    ----------
    index : place in the results. unit : what the sparsity is a share of.
    bytes_blocks : of the blocks' linear weights, as much of them as a token reads of dense.
    spared : share of ``bytes_blocks`` that a token need not read, of 1; only where the unit is
        weight reads.
    """

    index: int
    method: str
    pattern: str
    unit: str
    sparsity: float
    achieved: float
    achieved_all: float | None
    perplexity: float | None
    loss: float | None
    kl: float | None
    agreement: float | None
    bytes_stored: float | None
    bytes_moved: float | None
    bytes_moved_limit: float | None
    bytes_blocks: float | None
    tokens_per_second: float | None
    dense_tokens_per_second: float | None
    prefill: float | None
    simulated: bool
    seconds: float | None
    seed: Any
    note: str
    layers: tuple[Mapping[str, Any], ...]
    spared: float | None = None

    @classmethod
    def of(cls, index: int, values: Mapping[str, Any]) -> "Row":
        """From a JSON row.

        Raises
        ------
        GossamerError
            If it names no method.
        """
        if not isinstance(values.get("method"), str):
            raise GossamerError(f"row {index + 1} of the results names no method; compare again")
        family = str(values.get("family") or "weights")
        loss, perplexity = _number(values.get("loss")), _number(values.get("perplexity"))
        if perplexity is None and loss is not None and loss < 700:
            perplexity = exp(loss)
        if loss is None and perplexity is not None and perplexity > 0:
            loss = log(perplexity)
        sparsity = _number(values.get("sparsity")) or 0.0
        achieved = _number(values.get("achieved_sparsity"))
        achieved = sparsity if achieved is None else achieved
        simulated = bool(values.get("simulated"))
        return cls(
            index=index,
            method=values["method"],
            pattern=str(values.get("pattern") or ""),
            unit=str(values.get("unit") or _UNITS.get(family, family)),
            # A method without a sparsity of its own (a window) is placed by what it achieved.
            sparsity=sparsity or round(achieved, 2),
            achieved=achieved,
            achieved_all=_number(values.get("sparsity_all")),
            perplexity=perplexity,
            loss=loss,
            kl=_number(values.get("kl")),
            agreement=_number(values.get("agreement")),
            bytes_stored=_number(values.get("bytes_stored")),
            bytes_moved=_number(values.get("bytes_moved")),
            bytes_moved_limit=_number(values.get("bytes_moved_limit")),
            bytes_blocks=_number(values.get("bytes_blocks")),
            # Simulated sparsity runs the dense arithmetic: whatever was timed is not its speed.
            tokens_per_second=None if simulated else _number(values.get("tokens_per_second")),
            dense_tokens_per_second=_number(values.get("dense_tokens_per_second")),
            prefill=None if simulated else _number(values.get("prefill_tokens_per_second")),
            simulated=simulated,
            seconds=_number(values.get("seconds")),
            seed=values.get("seed"),
            note=str(values.get("note") or ""),
            layers=tuple(values.get("layers") or ()),
        )

    @property
    def speedup(self) -> float | None:
        """Decoding speed over that of the dense model timed beside this row; dense is 1."""
        if self.dense:
            return None if self.tokens_per_second is None else 1.0
        if not self.tokens_per_second or not self.dense_tokens_per_second:
            return None
        return self.tokens_per_second / self.dense_tokens_per_second

    @property
    def dense(self) -> bool:
        """Whether this is the untouched model."""
        return self.method == "dense"

    @property
    def random(self) -> bool:
        """Whether this is the random baseline."""
        return self.method.partition(":")[0] == "random"

    @property
    def role(self) -> str:
        """``dense``, ``random`` or ``method``."""
        return "dense" if self.dense else "random" if self.random else "method"

    @property
    def fixed(self) -> str:
        """The pattern where it is N:M, which is compared only with its like; else empty."""
        keep, _, of = self.pattern.partition(":")
        return self.pattern if keep.isdigit() and of.isdigit() else ""

    @property
    def kind(self) -> str:
        """The pattern as far as it separates lines: the budgets of a window lie on one."""
        return "window" if self.pattern.startswith("window:") else self.pattern

    def beside(self, dense: "Row | None") -> "Row":
        """The row with its spared share, where the bytes of both rows are known."""
        sizes = (dense and dense.bytes_moved, self.bytes_moved_limit, self.bytes_blocks)
        before, after, blocks = sizes
        if self.unit != _READS or self.dense or before is None or after is None or not blocks:
            return self
        return replace(self, spared=(before - after) / blocks)

    @property
    def measure(self) -> str:
        """What :attr:`share` is a share of."""
        return self.unit if self.spared is None else BLOCKS

    @property
    def share(self) -> float:
        """Share removed, comparable between the rows of one measure."""
        return self.achieved if self.spared is None else self.spared

    @property
    def read(self) -> float | None:
        """Share of the block weight bytes a token still reads, where that is what counts."""
        return None if self.spared is None else 1.0 - self.spared

    @property
    def label(self) -> str:
        """Short name, with the pattern where it fixes the sparsity."""
        return f"{short_label(self.method)} {self.fixed}".strip()


@dataclass(frozen=True)
class Series:
    """The rows of one method over sparsity: one line of a plot."""

    label: str
    name: str
    role: str
    rows: tuple[Row, ...]
    colour: int = 0


class Table:
    """All rows of a comparison, and what they say together."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        read = [Row.of(index, row) for index, row in enumerate(rows)]
        self.dense = next((row for row in read if row.dense), None)
        self.rows = [row.beside(self.dense) for row in read]
        self._names = {
            row.index: line.label
            for lines in self.series().values()
            for line in lines
            for row in line.rows
        }

    def name(self, row: Row) -> str:
        """Short name, with the pattern where the method was run with several."""
        return self._names.get(row.index, row.label)

    def times_dense(self, row: Row) -> float | None:
        """Perplexity as a multiple of dense."""
        base = None if self.dense is None else self.dense.perplexity
        return None if not base or row.perplexity is None else row.perplexity / base

    def loss_over_dense(self, row: Row) -> float | None:
        """Loss added to dense, nats per token."""
        base = None if self.dense is None else self.dense.loss
        return None if base is None or row.loss is None else row.loss - base

    def usable(self, row: Row) -> bool:
        """Whether perplexity stays within :data:`USABLE` times dense."""
        times = self.times_dense(row)
        return times is not None and times <= USABLE

    def groups(self) -> dict[Group, list[Row]]:
        """Sparse rows by what they are ranked against, best first, destroyed ones last.

        Weight reads are grouped by the block weight bytes they spare, within :data:`NEAR`; where
        those are not known the rows are in no group, for their sparsities do not compare.
        """
        groups: dict[Group, list[Row]] = {}
        for row in self.rows:
            if not row.dense and row.unit != _READS:
                group = row.unit, round(row.sparsity, 3), row.fixed
                groups.setdefault(group, []).append(row)
        for members in _near([row for row in self.rows if row.spared is not None]):
            middle = (members[0].share + members[-1].share) / 2
            groups[BLOCKS, round(middle, 3), ""] = members
        for members in groups.values():
            members.sort(key=lambda r: (r.perplexity is None, r.perplexity or 0.0, r.index))
        return dict(sorted(groups.items(), key=lambda item: _unit_order(item[0])))

    def best(self) -> set[int]:
        """Indices of the rows that lead a group of at least two methods besides random."""
        found: set[int] = set()
        for members in self.groups().values():
            rivals = [row for row in members if not row.random]
            if len({row.method for row in rivals}) > 1 and rivals[0].perplexity is not None:
                limit = rivals[0].perplexity * TIE
                found |= {r.index for r in rivals if r.perplexity and r.perplexity < limit}
        return found

    def series(self) -> dict[str, list[Series]]:
        """Lines by measure, in order of appearance; colours are unique within the page's order."""
        patterns: dict[str, set[str]] = {}
        for row in self.rows:
            if not row.fixed:
                patterns.setdefault(row.method, set()).add(row.kind)
        lines: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.dense:
                continue
            several = not row.fixed and len(patterns.get(row.method, ())) > 1
            label = f"{row.label} {row.kind}" if several and row.kind else row.label
            lines.setdefault((row.measure, label), []).append(row)
        result: dict[str, list[Series]] = {}
        colours: dict[str, int] = {}
        for (unit, label), rows in lines.items():
            first = rows[0]
            if first.role == "method":
                colours.setdefault(label, len(colours))
            ordered = tuple(sorted(rows, key=lambda r: (r.share, r.index)))
            line = Series(label, first.method, first.role, ordered, colours.get(label, 0))
            result.setdefault(unit, []).append(line)
        return dict(sorted(result.items(), key=lambda item: _unit_order((item[0],))))


def _near(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in order of their shares, cut so that no two in a part differ by more than NEAR."""
    parts: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: (r.share, r.index)):
        if not parts or row.share - parts[-1][0].share > NEAR + 1e-9:
            parts.append([])
        parts[-1].append(row)
    return parts


def _unit_order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    units = ["weights", BLOCKS, *list(_UNITS.values())[1:]]
    unit = key[0]
    return (units.index(unit) if unit in units else len(units), *key)
