"""Perplexity: how surprised a model is by text, and how far it moved from the dense one."""

from contextlib import closing
from dataclasses import asdict, dataclass
from math import exp
from typing import TYPE_CHECKING, Any

from torch import nn

from gossamer.evaluate.forward import Chunk, log_probabilities
from gossamer.evaluate.windows import windows
from gossamer.models import Progress, Tokens

if TYPE_CHECKING:
    from gossamer.evaluate.divergence import Reference

__all__ = ["Score", "score"]


@dataclass(frozen=True)
class Score:
    """How well a model predicts some text.

    Parameters
    ----------
    loss : mean negative log-probability of the scored tokens, in nats per token.
    perplexity : exp(loss); infinite when the loss is beyond what a float can hold.
    tokens : number of scored tokens.
    context : tokens of a window.
    stride : distance between windows; equal to the context when they are disjoint.
    kl : mean KL(dense || this model) in nats over the reference's positions, or None.
    agreement : share of those positions where both models' most likely token is the same.
    """

    loss: float
    perplexity: float
    tokens: int
    context: int
    stride: int
    kl: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"perplexity {self.perplexity:.2f} (loss {self.loss:.4f} nats/token) over "
            f"{self.tokens:,} tokens, context {self.context}, stride {self.stride}"
        )
        if self.kl is not None and self.agreement is not None:
            text += f"; KL from dense {self.kl:.4f} nats, top-1 agreement {self.agreement:.1%}"
        return text


class LossSum:
    """Sum of negative log-probabilities: fp32 terms, added in fp64."""

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0

    def add(self, chunk: Chunk) -> None:
        """Count the predictions of a chunk."""
        hit = chunk.log_probs.gather(1, chunk.targets[:, None])
        self.total -= float(hit.double().sum())
        self.tokens += len(chunk.targets)

    def loss(self) -> float:
        """Mean, in nats per token."""
        return self.total / self.tokens


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite instead of an overflow; NaN stays NaN."""
    try:
        return exp(loss)
    except OverflowError:
        return float("inf")


def score(
    model: nn.Module,
    tokens: Tokens,
    *,
    stride: int | None = None,
    reference: "Reference | None" = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Score:
    """Score a causal language model on text; one forward pass per batch gives everything.

    Parameters
    ----------
    model : any causal language model of transformers.
    tokens : (N, T) windows; padding is neither scored nor looked at.
    stride : None scores the rows as disjoint windows, without each one's first token. A number
        slides a window of T tokens over the joined rows: every token is scored once, with at
        least T - stride tokens before it. See :func:`gossamer.evaluate.windows.windows`.
    reference : the dense model's predictions on the same tokens and stride; adds ``kl`` and
        ``agreement``. Record it with the same batch size where exact zeros matter.
    batch_size : windows run at once, at most; changes the result by rounding only.
    progress : called with (windows done, windows, what).

    Returns
    -------
    Score. Loss and perplexity are NaN when the model's logits are: a destroyed model is a
    result, not an error.

    Raises
    ------
    GossamerError
        If nothing can be scored, the stride is impossible, the model is no causal language
        model, or the reference was recorded on other tokens.
    """
    cut = windows(tokens, stride)
    comparison = None if reference is None else reference.compare(cut)
    losses = LossSum()
    run = log_probabilities(model, cut, batch_size=batch_size, progress=progress)
    with closing(run) as chunks:
        for chunk in chunks:
            losses.add(chunk)
            if comparison is not None:
                comparison.add(chunk)
    loss = losses.loss()
    return Score(
        loss=loss,
        perplexity=perplexity_of(loss),
        tokens=losses.tokens,
        context=cut.context,
        stride=cut.stride,
        kl=None if comparison is None else comparison.kl(),
        agreement=None if comparison is None else comparison.agreement(),
    )
