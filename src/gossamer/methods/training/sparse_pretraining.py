"""Sparse pre-training: dense for a quarter of the compute, sparse from three quarters on.

Shares are of the operations spent, not of the updates: these grow cheaper while weights go.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from operator import itemgetter
from typing import Any, ClassVar

from gossamer.core import Card, GossamerError, check_count, unknown
from gossamer.methods.training.base import Allocation, Change, SparseTraining, check_share
from gossamer.methods.training.scaling.parameters import average_parameters
from gossamer.methods.training.scaling.timetable import CURVES, Curve, prunings, share_of
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier

__all__ = ["ByCompute", "SparsePretraining"]


class ByCompute(Sparsifier):
    """A :class:`Sparsifier` that tells its method what pruning cannot make cheaper."""

    method: "SparsePretraining"

    def __init__(self, method: "SparsePretraining", *args: Any, **given: Any) -> None:
        super().__init__(method, *args, **given)
        # What is due next was asked of a method that did not know the model yet.
        self._change = self.method.change(self.updates + 1)

    def _begin(self, loss: StartLoss | None) -> None:
        self._learn()
        super()._begin(loss)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Sparsifier.load_state_dict`; a state read from a file has no tuples."""
        self._learn()
        given = state.get("method") if isinstance(state, Mapping) else None
        if isinstance(given, Mapping) and given.get("method") == self.method.key():
            state = {**state, "method": type(self.method).from_dict(given).to_dict()}
        super().load_state_dict(state)

    def _learn(self) -> None:
        if self.method.fixed is None:
            dense = 0.5 * self.flops.forward(self.flops.sizes)
            self.method = replace(self.method, fixed=self.flops.others / dense)

    def _remarks(self) -> tuple[str, ...]:
        size = sum(layer.size for layer in self.layers)
        mean = average_parameters(self.method.active_parameters(size))
        events = self.method.prunings
        when = f"pruned after updates {events[0][0]} to {events[-1][0]}; " if events else ""
        return (f"{when}{mean:,.0f} of {size:,} weights at work on average over the tokens",)


@dataclass(frozen=True, kw_only=True)
class SparsePretraining(SparseTraining):
    """Train dense, prune the smallest weights over the middle of the compute, train on sparse.

    Parameters
    ----------
    window : shares of the training's operations between which the sparsity rises, as (start, end)
        or as text, ``"0.25-0.75"``. Equal ones prune at once.
    curve : ``cubic``, fast at first, or ``linear``, in the operations spent.
    every : updates between two prunings; there is always one at the end of the window.
    fixed : share of a dense update's operations that no pruning removes (a head, skipped layers);
        None finds out when attached to a model.

    Matrices of the vocabulary are never pruned. The learning rate of ``apply`` depends on ``steps``
    alone, so all windows train under the same one. Trainings of equal compute have equal
    ``steps * share``.

    Source: arXiv 2501.12486, §3.

    Departs from the paper: the form of its curve is not known to us, so both are here; removed
    weights stay away; each layer keeps the same share (``pattern="model"``: all layers compete).

    Examples
    --------
    As many operations as a dense training of 1000 updates, and the size for the scaling law:

    >>> from gossamer.methods.training.scaling.parameters import average_parameters
    >>> method = SparsePretraining(sparsity=0.5, steps=1000, every=10)
    >>> method = method.lasting(round(1000 / method.share))
    >>> method.steps, round(average_parameters(method.active_parameters(1e6)))
    (1580, 632052)
    """

    keeper: ClassVar[type[Sparsifier]] = ByCompute
    patterns: ClassVar[tuple[str, ...]] = ("layer", "model", "row", "block")
    card: ClassVar[Card] = Card(
        title="The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and "
        "Dense Scaling Laws",
        year=2025,
        arxiv="2501.12486",
        system="sparse_pretraining",
        family="training",
        when="during training",
        start="dense to sparse",
        masks="dynamic",
        site="linear weight, convolution",
        score="|w|",
        pattern="unstructured, constant fan-in, block",
        budget="sparsity; uniform as a rule, any allocation, or one competition of all layers",
        schedule="from 25 % to 75 % of the operations spent; cubic or linear",
        update="training under the mask",
        kernel="masked dense",
        departs="the paper's curve is not known: cubic and linear; removed weights stay away",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 6, "every": 1, "batch_size": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    allocation: Allocation = "uniform"
    window: tuple[float, float] | str = (0.25, 0.75)
    curve: Curve = "cubic"
    every: int = 100
    fixed: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "window", _window(self.window))
        check_count("every", self.every, 1)
        if self.curve not in CURVES:
            raise unknown("curve", self.curve, tuple(CURVES))
        if self.fixed is not None:
            check_share("fixed", self.fixed)

    @property
    def prunings(self) -> tuple[tuple[int, float], ...]:
        """After which updates weights go, and the sparsity then in force."""
        window = _window(self.window)
        fixed = self.fixed or 0.0
        return prunings(self.steps, window, self.curve, self.final_sparsity, self.every, fixed)

    @property
    def share(self) -> float:
        """Operations of the training over those of a dense one of as many updates."""
        return share_of(self.prunings, self.steps, self.fixed or 0.0)

    def active_parameters(
        self, removable: float, others: float = 0.0
    ) -> tuple[tuple[int, float], ...]:
        """Stretches of the training, each (updates, parameters at work), for
        :func:`~gossamer.methods.training.scaling.parameters.average_parameters`.

        Parameters
        ----------
        removable : parameters that are pruned. others : counted beside them; say whether the
            embeddings are among them (``count_parameters`` does both).
        """
        ends = [update for update, _ in self.prunings] + [self.steps]
        starts = [0, *ends[:-1]]
        sparsities = [0.0, *(sparsity for _, sparsity in self.prunings)]
        return tuple(
            (end - start, others + removable * (1.0 - sparsity))
            for start, end, sparsity in zip(starts, ends, sparsities, strict=True)
        )

    @property
    def initial_sparsity(self) -> float:
        return 0.0

    def sparsity_at(self, update: int) -> float:
        """Sparsity in force after so many updates."""
        events = self.prunings
        done = bisect_right(events, update, key=itemgetter(0))
        return events[done - 1][1] if done else 0.0

    def change(self, update: int) -> Change | None:
        """Prune where the timetable says so."""
        events = self.prunings
        done = bisect_right(events, update, key=itemgetter(0))
        if not done or events[done - 1][0] != update:
            return None
        return Change(sparsity=events[done - 1][1])


def _window(value: object) -> tuple[float, float]:
    """A window from a pair or from text, checked.

    Raises
    ------
    GossamerError
        If it is none, or ends before it starts.
    """
    parts: Any = value.split("-") if isinstance(value, str) else value
    try:
        start, end = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise GossamerError(
            f"window is {value!r}; give two shares of the operations, as 0.25-0.75"
        ) from None
    if not isfinite(start) or not isfinite(end) or not 0.0 <= start <= end <= 1.0:
        raise GossamerError(
            f"the window ends at {end:g} of the operations and starts at {start:g}; give shares "
            "with 0 <= start <= end <= 1"
        )
    return start, end
