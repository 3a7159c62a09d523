"""Progressive gradient flow: fade weights out, or narrow the pattern, in place of a hard cut."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from typing import Any, ClassVar, Literal, get_args

from gossamer.core import NM, Card, GossamerError, Pattern, unknown
from gossamer.methods.training.base import check_share
from gossamer.methods.training.nm.base import BehindMask
from gossamer.methods.training.sparsifier.layers import Layer, Quota, quotas

__all__ = ["GradientFlow"]

Course = Literal["exponential", "linear", "stepwise", "geometric"]
_LAST = 1e-4


@dataclass(frozen=True, kw_only=True)
class GradientFlow(BehindMask):
    """Train dense, then let what lies outside the N:M mask see less and less, then train sparse.

    Parameters
    ----------
    course : of the middle phase. MdGf: ``exponential`` or ``linear``, removed weights count β
        times, and β falls from 1 (to 1e-4, or to 0). SdGf: hard masks of equal time that narrow:
        ``stepwise`` (M-1:M, M/2:M, M/4:M ... N:M) or ``geometric`` (8N:8M, 4N:4M, 2N:2M, N:M).
    dense : share of the updates trained dense first.
    tune : share of the updates trained under the final mask, which then stays.
    straight_through : removed weights get their whole gradient, as in the released code; by
        default they get β of it, the derivative of what the network computes.

    Source: arXiv 2402.04744, §4.

    Departs from the paper: β's rate follows from the length of the phase; the mask stays while
    tuning.
    """

    card: ClassVar[Card] = Card(
        title="Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
        year=2024,
        arxiv="2402.04744",
        system="gradient_flow",
        family="training",
        when="during training",
        start="dense to sparse",
        masks="dynamic",
        site="linear weight",
        score="|w| of the dense weights",
        pattern="N:M",
        budget="N of M, or any allocation with N varying by layer",
        schedule="dense; then removed weights fade or the pattern narrows; then the final mask",
        update="gradients of removed weights fade with them",
        kernel="masked dense",
        departs="the fading's rate follows from its length; the mask stays while tuning",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 5, "batch_size": 3}

    course: Course = "exponential"
    dense: float = 0.05
    tune: float = 0.25
    straight_through: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.course not in get_args(Course):
            raise unknown("course", self.course, get_args(Course))
        check_share("dense", self.dense)
        check_share("tune", self.tune)
        if self.dense + self.tune >= 1.0:
            raise GossamerError(
                f"dense {self.dense:g} and tune {self.tune:g} leave no updates to fade in; "
                "give dense + tune < 1"
            )
        if self.narrows and self.allocation != "uniform":
            raise GossamerError(
                f"course {self.course} narrows one pattern of all layers; leave the sparsity out, "
                f"or choose course exponential for allocation {self.allocation}"
            )

    @property
    def narrows(self) -> bool:
        """Whether the pattern narrows (SdGf) rather than weights fading (MdGf)."""
        return self.course in ("stepwise", "geometric")

    @property
    def phases(self) -> tuple[int, int]:
        """Updates after which fading begins, and ends."""
        first = round(self.dense * self.steps)
        return first, max(first + 1, round((1.0 - self.tune) * self.steps))

    @property
    def frames(self) -> tuple[Pattern, ...]:
        """Patterns of the middle phase, one after the other."""
        assert isinstance(self.pattern, NM)
        n, m = self.pattern.keep, self.pattern.of
        if self.course == "geometric":
            return tuple(NM(n * by, m * by) for by in (8, 4, 2, 1))
        if self.course != "stepwise":
            return (self.pattern,)
        kept = [m - 1] if m - 1 > n else []
        half = m // 2
        while half > n:
            kept += [half] if half < m - 1 else []
            half //= 2
        return tuple(NM(keep, m) for keep in (*kept, n))

    def frame_at(self, t: int) -> Pattern:
        """Pattern in force after so many updates."""
        first, last = self.phases
        number = int(max(0, t - first) / (last - first) * len(self.frames))
        return self.frames[min(number, len(self.frames) - 1)]

    def quotas_at(self, layers: tuple[Layer, ...], t: int) -> dict[str, Quota]:
        if not self.narrows:
            return super().quotas_at(layers, t)
        frame = self.frame_at(t)
        share = frame.fixed_sparsity
        assert share is not None
        return quotas(layers, frame, "uniform", share)

    def sparsity_at(self, update: int) -> float:
        """Sparsity of the mask in force."""
        if not self.narrows:
            return self.final_sparsity
        share = self.frame_at(update).fixed_sparsity
        assert share is not None
        return share

    def refreshes(self, t: int) -> bool:
        return t <= self.phases[1]

    def removed_share(self, t: int) -> float:
        """β: 1 while dense, 0 under a hard mask."""
        first, last = self.phases
        if t < first:
            return 1.0
        if t >= last or self.narrows:
            return 0.0
        done = (t - first) / (last - first)
        return 1.0 - done if self.course == "linear" else exp(log(_LAST) * done)

    def gradient_share(self, t: int) -> float:
        """That of the forward pass, unless straight through."""
        return 1.0 if self.straight_through else self.removed_share(t)
