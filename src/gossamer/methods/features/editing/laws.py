"""Laws: how an edit changes the values of some units, activations or latents alike.

Shapes: R = rows, K = units edited, B = bins of a histogram.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core import GossamerError, unknown

__all__ = ["LAWS", "Affine", "Law", "Posterior", "Within", "law_from"]


class Law(ABC):
    """Changes the values of units; a strength of 0 leaves them as they are."""

    kind: ClassVar[str]

    @abstractmethod
    def __call__(self, values: Tensor, strength: float, size: Tensor) -> Tensor:
        """New values.

        Parameters
        ----------
        values : (R, K). strength : how much of the change happens, 1 all of it.
        size : (R, 1), root mean square of the whole row, for changes relative to it.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What :func:`law_from` needs, each (K, ...)."""

    @property
    def units(self) -> int:
        """Number of units K."""
        return len(next(iter(self.tensors().values())))

    @property
    def changes(self) -> int:
        """Units that the law changes at all."""
        return self.units


@dataclass(frozen=True, eq=False)
class Affine(Law):
    """h' = (1 + s (scale - 1)) h + s shift: clamping, scaling, adding a direction.

    Parameters
    ----------
    scale, shift : (K,). relative : the shift is in units of the row's root mean square.
    """

    kind: ClassVar[str] = "affine"

    scale: Tensor
    shift: Tensor
    relative: bool = False

    @classmethod
    def clamp(cls, values: Tensor) -> "Affine":
        """Set units to values (K,); at a lower strength they go part of the way."""
        return cls(torch.zeros_like(values), values)

    @classmethod
    def scaled(cls, factors: Tensor) -> "Affine":
        """Multiply units by factors (K,); 0 ablates."""
        return cls(factors, torch.zeros_like(factors))

    @classmethod
    def added(cls, shift: Tensor, *, relative: bool = False) -> "Affine":
        """Add a vector (K,)."""
        return cls(torch.ones_like(shift), shift, relative)

    def __call__(self, values: Tensor, strength: float, size: Tensor) -> Tensor:
        shift = self.shift * size if self.relative else self.shift
        return (1 + strength * (self.scale - 1)) * values + strength * shift

    def tensors(self) -> dict[str, Tensor]:
        flag = torch.full_like(self.scale, float(self.relative))
        return {"scale": self.scale, "shift": self.shift, "relative": flag}

    @property
    def changes(self) -> int:
        return int(((self.scale != 1) | (self.shift != 0)).sum())


@dataclass(frozen=True, eq=False)
class Posterior(Law):
    """z' = z (1 - s P(c|z)): a unit goes silent as far as its value speaks for the concept.

    Parameters
    ----------
    low, width : (K,), where a unit's bins begin and how wide one is.
    chance : (K, B + 1), P(c|z) of the value exactly 0, then of each bin.
    """

    kind: ClassVar[str] = "posterior"

    low: Tensor
    width: Tensor
    chance: Tensor

    def __call__(self, values: Tensor, strength: float, size: Tensor) -> Tensor:
        return values * (1 - strength * self.of(values))

    def of(self, values: Tensor) -> Tensor:
        """P(c|z) of (R, K) values."""
        bins = self.chance.shape[1] - 1
        place = ((values - self.low) / self.width).floor().clamp(0, bins - 1).long() + 1
        place = torch.where(values == 0, 0, place)
        return self.chance.gather(1, place.T).T

    def tensors(self) -> dict[str, Tensor]:
        return {"low": self.low, "width": self.width, "chance": self.chance}


@dataclass(frozen=True, eq=False)
class Within(Law):
    """Silence a unit only where its value is usual for the concept: in [low, high], both (K,)."""

    kind: ClassVar[str] = "within"

    low: Tensor
    high: Tensor

    def __call__(self, values: Tensor, strength: float, size: Tensor) -> Tensor:
        inside = (values >= self.low) & (values <= self.high)
        return torch.where(inside, (1 - strength) * values, values)

    def tensors(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}


LAWS: Mapping[str, type[Law]] = {law.kind: law for law in (Affine, Posterior, Within)}


def law_from(kind: str, tensors: Mapping[str, Tensor]) -> Law:
    """The law that ``kind`` and :meth:`Law.tensors` describe.

    Raises
    ------
    GossamerError
        For an unknown kind or tensors that do not fit it.
    """
    if kind not in LAWS:
        raise unknown("law", kind, tuple(LAWS))
    given = dict(tensors)
    try:
        if kind == "affine":
            relative = bool(given.pop("relative").any())
            return Affine(given["scale"], given["shift"], relative)
        return LAWS[kind](**given)
    except (KeyError, TypeError) as error:
        raise GossamerError(f"the stored {kind} law is damaged ({error}); save it again") from None
