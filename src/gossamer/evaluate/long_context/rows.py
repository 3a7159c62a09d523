"""Rows: everything a figure about sparse attention must say to be compared with another."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Row"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one task.

    What was not measured is None, never a guess. Simulated sparsity has no attention time.

    Parameters
    ----------
    method : in text form. task : its name. phase : ``prefill``, ``decode``, or both with a ``+``.
    density : pairs read over the pairs that causality allows, in the phases the method acts on.
    rho : mean attention probability on the kept keys, in those phases.
    batch, length : prompts run at once, and their tokens.
    score : share of exact answers. part : share of the single answers given.
    samples : prompts answered. question : ``seen`` or ``unseen``.
    scope, dispersion : axes of the task.
    selection_seconds, attention_seconds, dense_attention_seconds : of one layer's call in the
        method's phase: choosing keys, reading them, and full attention instead.
    seconds : of prompts and answers end to end, per prompt.
    dense_seconds : the same of dense. baseline : what dense attention ran.
    executors : what ran, with counts.
    """

    method: str
    task: str
    phase: str
    density: float | None
    rho: float | None
    batch: int
    length: int
    score: float
    part: float
    samples: int
    question: str
    scope: str
    dispersion: str
    selection_seconds: float | None = None
    attention_seconds: float | None = None
    dense_attention_seconds: float | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    baseline: str | None = None
    executors: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)
