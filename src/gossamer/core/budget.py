"""Budget: how much to keep, said in exactly one way.

The public word for the amount is ``sparsity``, the fraction removed.
"""

from dataclasses import dataclass
from math import isfinite

from gossamer.core.errors import GossamerError

__all__ = ["Budget", "check_count", "check_number", "check_sparsity", "kept_count"]


def check_sparsity(sparsity: float, where: str = "sparsity") -> float:
    """Return the sparsity as a float, or say why it is none.

    Raises
    ------
    GossamerError
        Outside ``[0, 1)`` or not a finite number.
    """
    try:
        value = float(sparsity)
    except (TypeError, ValueError):
        raise GossamerError(
            f"{where} is {sparsity!r}; give a number from 0 up to but not including 1"
        ) from None
    if not isfinite(value) or not 0.0 <= value < 1.0:
        raise GossamerError(
            f"{where} is {sparsity!r}; it is the fraction removed, so 0 <= {where} < 1"
        )
    return value


def check_count(name: str, value: object, least: int) -> int:
    """Return a whole number, or say why it is none.

    Raises
    ------
    GossamerError
        If it is no whole number, below ``least``, or too large for 63 bits.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "too large"
        raise GossamerError(f"{name} is {text}; give a whole number, at least {least}")
    return value


def check_number(name: str, value: object, *, above: float | None = None) -> float:
    """Return a finite number, or say why it is none.

    Raises
    ------
    GossamerError
        If it is no number, not finite, or not above ``above``.
    """
    flag = isinstance(value, bool)
    if flag or not isinstance(value, int | float) or not isfinite(value):
        raise GossamerError(f"{name} is {value!r}; give a finite number")
    if above is not None and value <= above:
        raise GossamerError(f"{name} is {value!r}; give a number above {above:g}")
    return float(value)


def kept_count(total: int, sparsity: float) -> int:
    """How many of ``total`` entries a sparsity keeps: ``round((1 - sparsity) * total)``."""
    return round((1.0 - sparsity) * total)


@dataclass(frozen=True)
class Budget:
    """How much a selection may keep: exactly one field is given.

    Parameters
    ----------
    sparsity : fraction removed, 0 <= sparsity <= 1; kept = round((1 - sparsity) * n).
    keep : number of entries kept in each group.
    threshold : keep every entry whose score is at least this.
    mass : top-p; keep the fewest entries whose non-negative scores sum to this share, 0 to 1.
    """

    sparsity: float | None = None
    keep: int | None = None
    threshold: float | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            names = ", ".join(given) or "nothing"
            raise GossamerError(
                f"a budget takes exactly one of sparsity, keep, threshold, mass; got {names}"
            )
        (name, value), *_ = given.items()
        if not isfinite(value):
            raise GossamerError(f"budget {name} is {value!r}; give a finite number")
        if name in ("sparsity", "mass") and not 0.0 <= value <= 1.0:
            raise GossamerError(f"budget {name} is {value!r}; it is a share, so 0 <= {name} <= 1")
        if name == "keep" and (value < 0 or value != int(value)):
            raise GossamerError(f"budget keep is {value!r}; give a whole number, at least 0")

    def count(self, total: int) -> int:
        """Entries kept out of ``total``; only for the two budgets that fix a count."""
        if self.sparsity is not None:
            return kept_count(total, self.sparsity)
        if self.keep is not None:
            return min(int(self.keep), total)
        raise GossamerError(
            "this budget (threshold or mass) fixes no count; give sparsity or keep instead"
        )

    @property
    def fixes_count(self) -> bool:
        """Whether the budget names a number of entries, not a property of their scores."""
        return self.sparsity is not None or self.keep is not None
