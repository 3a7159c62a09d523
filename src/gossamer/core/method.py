"""Method: a card, parameters, and a way to apply them. Immutable; vary with ``replace``."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, cast

from gossamer.core.budget import check_count, check_sparsity
from gossamer.core.card import Card
from gossamer.core.errors import GossamerError, unknown
from gossamer.core.pattern import Pattern, parse_pattern
from gossamer.core.stats import Stat

__all__ = ["Method"]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of every method: fields are its parameters, class attributes describe it.

    A family's ``base.py`` says how its methods are applied; a method's own file adds the card,
    its fields, and as a rule one function.
    """

    card: ClassVar[Card]
    needs: ClassVar[frozenset[Stat]] = frozenset()
    subject: ClassVar[str] = "language model"
    """What ``apply`` takes, in words; the conformance checks build one of that kind."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Parameters that make the method cheap on a tiny model, for the conformance checks."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Conformance checks that do not apply, with the reason: ``{check: reason}``."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name == "pattern":
                object.__setattr__(self, field.name, _as_pattern(value))
            elif field.name == "sparsity" and value is not None:
                object.__setattr__(self, field.name, check_sparsity(value))
            elif field.name == "seed":
                check_count("seed", value, 0)

    @classmethod
    def key(cls) -> str:
        """The method's name in CLI, recipes and results: the name of its file."""
        return cls.__module__.rpartition(".")[2]

    @abstractmethod
    def apply(self, model: Any, data: Any = None, *, progress: Any = None) -> Any:
        """Apply to a model in place and return an ``Applied`` that can report, undo and save.

        Parameters
        ----------
        data : calibration tokens or text, for methods that need any.
        progress : called with (steps done, steps in all, what is being done).
        """

    @abstractmethod
    def reattach(self, model: Any, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
        """Apply again what ``Applied.state`` stored, without data, after the weights are loaded."""

    def to_dict(self) -> dict[str, object]:
        """As plain values that :meth:`from_dict` reads back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: str(v) if isinstance(v, Pattern) else v for k, v in values.items()}
        return {"method": self.key(), **plain}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The method that :meth:`to_dict` described.

        Raises
        ------
        GossamerError
            On an unknown parameter, with the nearest known ones.
        """
        given = dict(values)
        name = given.pop("method", cls.key())
        if name != cls.key():
            raise GossamerError(f"these are parameters of {name!r}, not of {cls.key()!r}")
        known = tuple(f.name for f in fields(cls) if f.init)
        for key in given:
            if key not in known:
                raise unknown(f"parameter of {cls.key()}", key, known)
        return cls(**{name: _frozen(value) for name, value in given.items()})


def _as_pattern(value: object) -> Pattern:
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return parse_pattern(value)
    raise GossamerError(f"pattern is {value!r}; give a pattern or its text form, such as '2:4'")


def _frozen(value: Any) -> Any:
    """JSON has no tuples; frozen methods have no lists."""
    return tuple(cast(list[Any], value)) if isinstance(value, list) else value
