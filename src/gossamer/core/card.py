"""Card: what a method is, in the words shared by docs, CLI filters and the report."""

import csv
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from gossamer.core.errors import GossamerError, unknown

__all__ = ["FAMILIES", "Card", "System", "systems"]

FAMILIES = (
    "weights",
    "training",
    "activations",
    "attention",
    "features",
    "control",
    "experts",
    "tuning",
    "retrieval",
    "tables",
    "representations",
    "memory",
    "mechanisms",
)
When = Literal["before training", "during training", "after training", "inference"]
Start = Literal["dense to sparse", "sparse to sparse", "dense"]
Masks = Literal["static", "dynamic", "none"]


@dataclass(frozen=True)
class System:
    """A row of the list of systems the project implements."""

    id: int
    key: str
    family: str
    title: str


@cache
def systems() -> dict[str, System]:
    """The systems by key, in the order of the list."""
    text = files("gossamer.core").joinpath("systems.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {r["key"]: System(int(r["id"]), r["key"], r["family"], r["title"]) for r in rows}


@dataclass(frozen=True, kw_only=True)
class Card:
    """The axes of a method in words, and where it comes from.

    Parameters
    ----------
    title : the paper's title, exactly; that of the list of systems where it is one of them.
    year : of first publication; None for a control without a paper.
    arxiv : identifier such as ``"2306.11695"``, or None.
    system : key in the list of systems, or None for a baseline outside it.
    family : one of :data:`FAMILIES`.
    when : before, during or after training, or at inference.
    start : dense to sparse, sparse to sparse, or dense (nothing is removed for good).
    masks : static (chosen once), dynamic (chosen anew), or none.
    site, score, pattern, budget, schedule, update, kernel : the seven axes in words;
        ``learned``, ``emergent``, ``fused`` and ``none`` are allowed values.
    departs : what differs from the paper; "nothing known" when nothing does.
    """

    title: str
    year: int | None
    family: str
    when: When
    site: str
    score: str
    pattern: str
    budget: str
    arxiv: str | None = None
    system: str | None = None
    start: Start = "dense to sparse"
    masks: Masks = "static"
    schedule: str = "one shot"
    update: str = "none"
    kernel: str = "none"
    departs: str = "nothing known"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise unknown("family", self.family, FAMILIES)
        for name, value, kind in (
            ("time of use", self.when, When),
            ("start", self.start, Start),
            ("kind of masks", self.masks, Masks),
        ):
            if value not in get_args(kind):
                raise unknown(name, value, get_args(kind))
        if self.system is not None:
            if self.system not in systems():
                raise unknown("system", self.system, tuple(systems()))
            if self.title != systems()[self.system].title:
                raise GossamerError(
                    f"title of system {self.system} is {systems()[self.system].title!r}; "
                    f"the card says {self.title!r}"
                )

    @property
    def system_id(self) -> int | None:
        """Number in the list of systems, or None."""
        return None if self.system is None else systems()[self.system].id

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {**asdict(self), "system_id": self.system_id}
