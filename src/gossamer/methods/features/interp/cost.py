"""Cost: what a judge will read and write, counted before it is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.methods.features.interp.prompts import explain_prompt
from gossamer.methods.features.interp.scores import questions
from gossamer.methods.features.interp.windows import Sample

__all__ = ["Cost", "estimate"]

_LETTERS = 4
"""Letters of a token of English, as byte-pair tokenizers cut it."""
_ANSWER = 64
_DUMMY = 45


@dataclass(frozen=True)
class Cost:
    """Calls and tokens, an upper bound but for the letters of a token.

    Parameters
    ----------
    calls : prompts to complete and texts to score. read : tokens of prompts. written : tokens of
        answers, all of the length allowed.
    """

    calls: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.calls + other.calls, self.read + other.read, self.written + other.written)

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.read + self.written

    def price(self, per_million_read: float, per_million_written: float) -> float:
        """In the currency of the prices."""
        return (self.read * per_million_read + self.written * per_million_written) / 1e6

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, about {self.read:,} tokens read and at most "
            f"{self.written:,} written"
        )


def _tokens(text: str) -> int:
    return -(-len(text) // _LETTERS)


def estimate(
    samples: Sequence[Sample],
    scorers: Sequence[str],
    *,
    per_prompt: int = 5,
    max_tokens: int = 64,
    seed: int = 0,
) -> Cost:
    """What explaining and scoring these samples asks of a judge.

    Prompts are built as they will be, with explanations as long as allowed. Embedding asks
    nothing of the judge.
    """
    total = Cost()
    told = "x" * (_LETTERS * max_tokens)
    for sample in samples:
        shown = explain_prompt([w.text(w.active) for w in sample.shown])
        total += Cost(1, _tokens(shown), max_tokens)
        for name in scorers:
            if name in ("detection", "fuzzing"):
                prompts, _ = questions(name, told, sample, per_prompt=per_prompt, seed=seed)
                read = sum(_tokens(p) for p in prompts)
                total += Cost(len(prompts), read, _ANSWER * len(prompts))
            elif name == "surprisal":
                texts = [w.text() for w in (*sample.active, *sample.silent)]
                read = sum(2 * _tokens(t) + max_tokens + _DUMMY for t in texts)
                total += Cost(2 * len(texts), read, 0)
    return total
