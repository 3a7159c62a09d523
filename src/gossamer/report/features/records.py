"""Records: what is shown of a feature, whoever measured it. Plain values, ready for JSON."""

from dataclasses import dataclass

__all__ = ["Example", "Feature", "Group", "Histogram", "rounded"]


def rounded(value: float) -> float:
    """Four significant digits: what a page shows, without the digits nobody reads."""
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of one width.

    Parameters
    ----------
    low, high : outer edges of the first and the last bin. counts : one a bin; empty for no value.
    """

    low: float
    high: float
    counts: tuple[int, ...]

    @property
    def centres(self) -> list[float]:
        """Middle of each bin."""
        width = (self.high - self.low) / max(1, len(self.counts))
        return [self.low + (index + 0.5) * width for index in range(len(self.counts))]


@dataclass(frozen=True)
class Example:
    """A piece of text around a token that a feature fires on.

    Parameters
    ----------
    tokens : the text. values : the feature's code at each of them. at : which one it is about.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    at: int


@dataclass(frozen=True)
class Group:
    """Examples whose codes lie in one interval.

    Parameters
    ----------
    kind : ``top`` and ``bottom`` are the largest and the most negative codes, best first;
        ``interval`` is a seeded sample of the codes from ``low`` to ``high``.
    share : of the feature's codes that lie in the interval.
    """

    kind: str
    low: float
    high: float
    share: float
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Feature:
    """One latent as text shows it.

    Parameters
    ----------
    index : of the latent. density : share of tokens it fires on, None where not known.
    top, bottom : largest and smallest code, 0 where it never fires. mean : of its codes.
    fires : tokens it fires on most, by summed code. histogram : of its codes.
    positive, negative : tokens whose logit its atom raises and lowers most, with the change.
    logits : histogram of that change over the vocabulary.
    neighbours : other latents and the cosine of their atoms, the closest first.
    explanation : in words, or empty.
    """

    index: int
    density: float | None
    top: float
    bottom: float
    mean: float | None
    fires: tuple[str, ...]
    histogram: Histogram
    positive: tuple[tuple[str, float], ...]
    negative: tuple[tuple[str, float], ...]
    logits: Histogram
    neighbours: tuple[tuple[int, float], ...]
    groups: tuple[Group, ...]
    explanation: str = ""

    @property
    def dead(self) -> bool:
        """Whether no token fired it."""
        return self.top == 0 and self.bottom == 0
