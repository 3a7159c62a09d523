"""Cells of a comparison: which method at which sparsity and pattern."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from gossamer import methods
from gossamer.core import NM, GossamerError, Method, Pattern, check_sparsity, parse_pattern

__all__ = ["MAX_CELLS", "Cell", "grid"]

MAX_CELLS = 10_000


@dataclass(frozen=True)
class Cell:
    """One row of a comparison.

    Parameters
    ----------
    label : the method as written, without what the columns say; ``dense`` for no method.
    method : what to apply, or None for dense.
    seed : of the run.
    """

    label: str
    method: Method | None
    seed: int = 0

    @property
    def sparsity(self) -> float:
        """The sparsity asked for."""
        return float(getattr(self.method, "sparsity", None) or 0.0)

    @property
    def pattern(self) -> str | None:
        """The pattern's text form, or None for methods without one."""
        pattern = getattr(self.method, "pattern", None)
        return None if pattern is None else str(pattern)

    @property
    def name(self) -> str:
        """A file name, unique for what the cell runs."""
        text = f"{self.method.to_dict() if self.method else 'dense'} {self.seed}"
        plain = "".join(c if c.isalnum() else "-" for c in self.label)[:40]
        return f"{plain}-{sha256(text.encode()).hexdigest()[:12]}"


def grid(
    names: Sequence[str],
    sparsities: Sequence[float],
    patterns: Sequence[str | Pattern] = (),
    seed: int = 0,
) -> list[Cell]:
    """Every method at every sparsity and pattern it knows, dense first, random always there.

    Parameters
    ----------
    names : text forms ``key`` or ``key:field=value``; what a text fixes is not varied.
    sparsities : 0 <= s < 1. A method without a sparsity gives one cell; a pattern that fixes
        the sparsity gives one cell, at its own.
    patterns : text forms; empty takes each method's own. Only for methods that have a pattern.
    seed : of the methods that sample.

    Raises
    ------
    GossamerError
        For unknown methods or patterns, bad sparsities, or more than 10,000 cells.
    """
    if not names:
        raise GossamerError("no method was named; give at least one, see 'gossamer methods'")
    if not sparsities:
        raise GossamerError("no sparsity was given; give at least one, such as 0.5")
    for sparsity in sparsities:
        check_sparsity(sparsity)
    shapes = [p if isinstance(p, Pattern) else parse_pattern(p) for p in patterns]
    wanted = list(dict.fromkeys(names))
    if not any(name.partition(":")[0] == "random" for name in wanted):
        wanted.insert(0, "random")
    if len(wanted) * len(sparsities) * max(1, len(shapes)) > MAX_CELLS:
        raise GossamerError(f"a comparison has at most {MAX_CELLS} cells; name fewer methods")
    cells = {"dense": Cell("dense", None, seed)}
    for name in wanted:
        for cell in _cells_of(name, sparsities, shapes, seed):
            cells.setdefault(cell.name, cell)
    return list(cells.values())


def _cells_of(
    name: str, sparsities: Sequence[float], patterns: Sequence[Pattern], seed: int
) -> Iterable[Cell]:
    key = name.partition(":")[0]
    fixed = methods.parse_method(name, seed=seed)
    own_pattern = ":pattern=" in name or not methods.has_field(key, "pattern") or not patterns
    for pattern in [None] if own_pattern else patterns:
        chosen = getattr(fixed, "pattern", None) if pattern is None else pattern
        at: Sequence[float | None] = sparsities
        if ":sparsity=" in name or not methods.has_field(key, "sparsity"):
            at = [None]
        elif isinstance(chosen, NM) and getattr(fixed, "allocation", "uniform") == "uniform":
            at = [chosen.fixed_sparsity]
        for sparsity in at:
            made = methods.parse_method(name, sparsity=sparsity, pattern=pattern, seed=seed)
            yield Cell(_label(name), made, seed)


def _label(name: str) -> str:
    """The text form without sparsity and pattern, which have columns of their own."""
    key, *parts = methods.split_text(name)
    kept = [part for part in parts if not part.startswith(("sparsity=", "pattern="))]
    return ":".join([key, *kept])
