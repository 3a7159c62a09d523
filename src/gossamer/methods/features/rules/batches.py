"""Rules in which the tokens of a batch compete: BatchTopK, Matryoshka, Mutual and Feature Choice.

In training they choose from the whole (R, M) matrix of a batch; afterwards a code depends on its
own token alone, through thresholds tracked while training.
Shapes: R = rows, M = latents.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from gossamer.core import GossamerError, unknown
from gossamer.methods.features.rules.base import (
    Batch,
    Codes,
    Rule,
    Step,
    check_k,
    combine,
    places,
    read,
    top_batch,
)
from gossamer.methods.features.rules.penalised import JumpReLU

__all__ = ["BatchTopK", "FeatureChoice", "Matryoshka", "MutualChoice", "zipf_counts"]

_MEMORY = 0.99


class _Competing(Rule):
    """A rule that keeps n k entries of a batch of n rows, and remembers its thresholds.

    Parameters
    ----------
    k : mean number of latents of a row.
    """

    gathers = True
    running_steps: Tensor
    running_threshold: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_k(k)
        self.register_buffer("running_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running_threshold", torch.zeros(()))

    @property
    def budget(self) -> int:
        return self.k

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        if not self.training:
            return self.inference(pre.shape[1])(pre, batch)
        score = pre.detach().relu()
        kept = self.choose(score) & (score > 0)
        self.observe(score, kept)
        return read(pre, places(kept), batch)

    def choose(self, score: Tensor) -> Tensor:
        """Mask of the entries kept of (R, M) scores, none below 0; R k of them exactly."""
        return top_batch(score, self.k * len(score))

    def observe(self, score: Tensor, kept: Tensor) -> None:
        """Remember the smallest value kept of the batch."""
        if kept.any():
            self.remember(self.running_threshold, score[kept].min())

    def remember(self, figure: Tensor, now: Tensor, steps: Tensor | None = None) -> None:
        """Move a running mean: of all steps at first, of about the last 100 later on."""
        if steps is None:
            self.running_steps += 1
            steps = self.running_steps
        figure += (now - figure) * (1 / steps.clamp_min(1)).clamp_min(1 - _MEMORY)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        self.running_threshold.div_(scale)

    def inference(self, latents: int) -> JumpReLU:
        """Thresholds in place of the competition, so that a token's code is its own.

        Raises
        ------
        GossamerError
            If the rule never saw a batch in training mode.
        """
        if not self.running_steps:
            raise GossamerError(
                "the threshold of this rule was never trained; train for at least one step"
            )
        rule = JumpReLU(latents).to(self.running_threshold)
        with torch.no_grad():
            rule.threshold.copy_(self.running_threshold.expand(latents))
        return rule.eval().requires_grad_(False)


class BatchTopK(_Competing):
    """The R k largest positive pre-activations of a batch of R rows: k a row on average.

    Source: arXiv 2412.06410.
    """

    architecture = "batchtopk"


class Matryoshka(_Competing):
    """BatchTopK whose first latents must reconstruct alone, in nested groups.

    The selection is made once, over all latents; the loss is the mean of the squared errors of
    the reconstructions from the first m_1 < m_2 < ... < M latents.

    Parameters
    ----------
    fractions : share of the latents that each nested group adds; they sum to 1.

    Source: arXiv 2503.17547, §3.
    """

    architecture = "matryoshka_batchtopk"

    def __init__(
        self, k: int, fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    ) -> None:
        super().__init__(k)
        if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise GossamerError(f"fractions are {fractions}; give positive shares that sum to 1")
        self.fractions = fractions

    def edges(self, latents: int) -> list[int]:
        """Sizes of the nested groups, from 0 to M."""
        shares = torch.tensor([0.0, *self.fractions], dtype=torch.float64).cumsum(0)
        return sorted({round(float(share) * latents) for share in shares})

    def fit_loss(self, step: Step) -> Tensor:
        error, codes = step.error, step.codes
        losses = [error.square().sum()]
        # From the whole inwards: without its last group, a reconstruction misses what that gave.
        for low, high in list(pairwise(self.edges(step.pre.shape[1])))[:0:-1]:
            inside = (codes.indices >= low) & (codes.indices < high)
            error = error + combine(Codes(codes.values * inside, codes.indices), step.batch.atoms)
            losses.append(error.square().sum())
        return torch.stack(losses).mean()


@lru_cache(maxsize=64)
def zipf_counts(total: int, latents: int, most: int, exponent: float, offset: float) -> Tensor:
    """How often each latent is to fire, by rank: whole numbers of exactly that total.

    Proportional to 1 / (rank + offset)^exponent, none above ``most`` and, where the total
    allows, none below 1; what rounding leaves over goes to the largest remainders.

    Parameters
    ----------
    total : at most ``latents * most``.

    Returns
    -------
    int64, (latents,), descending.
    """
    if not 0 < total <= latents * most:
        raise GossamerError(f"k is {total // most}; a code of {latents} latents keeps 1 to that")
    ranks = torch.arange(1, latents + 1, dtype=torch.float64)
    weight = (ranks + offset).pow(-exponent)
    least = min(1.0, total / latents)
    low, high = 0.0, float(total) / float(weight[-1])
    for _ in range(200):
        middle = (low + high) / 2
        if float((middle * weight).clamp(least, most).sum()) < total:
            low = middle
        else:
            high = middle
    wanted = (high * weight).clamp(least, most)
    counts = wanted.floor().long()
    over = total - int(counts.sum())
    order = (wanted - counts).argsort(descending=True, stable=True)
    room = order[(counts[order] < most)]
    counts[room[:over]] += 1
    return counts.sort(descending=True).values


class MutualChoice(_Competing):
    """The R k best matches of tokens and latents, and help for latents used too little.

    The selection is that of BatchTopK. Beside it the rule tracks how often each latent fires and
    compares that with Zipf's law: a latent whose density is below ``tau`` times what the law
    predicts for its rank counts as underused (aux_zipf); at ``tau`` 0 only dead ones do.

    Parameters
    ----------
    tau : 0 to 1. exponent, offset : of the law 1 / (rank + offset)^exponent.

    Source: arXiv 2411.02124, §3 and §4.
    """

    architecture = "mutual_choice"
    running_density: Tensor

    def __init__(
        self,
        k: int,
        latents: int,
        *,
        tau: float = 0.1,
        exponent: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        super().__init__(k)
        if k > latents:
            raise GossamerError(f"k is {k}; a code of {latents} latents keeps 1 to {latents}")
        if not 0 <= tau <= 1:
            raise GossamerError(f"tau is {tau!r}; give a share, 0 to 1")
        self.tau, self.exponent, self.offset = tau, exponent, offset
        self.register_buffer("running_density", torch.zeros(latents))

    def observe(self, score: Tensor, kept: Tensor) -> None:
        super().observe(score, kept)
        self.remember(self.running_density, kept.float().mean(0), self.running_steps)

    def ranks(self) -> Tensor:
        """(M,), place of each latent by density, from 0; ties to the lower latent."""
        order = self.running_density.argsort(descending=True, stable=True)
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))

    def counts(self, rows: int) -> Tensor:
        """(M,), how many of so many rows Zipf's law gives each latent at its present rank."""
        latents = len(self.running_density)
        law = zipf_counts(rows * self.k, latents, rows, self.exponent, self.offset)
        return law.to(self.running_density.device)[self.ranks()]

    def underused(self, dead: Tensor) -> Tensor:
        predicted = self.counts(1 << 20) / (1 << 20)
        weak = self.running_density < self.tau * predicted
        weak[dead] = True
        return weak.nonzero()[:, 0]


class FeatureChoice(MutualChoice):
    """Each latent takes the tokens it matches best, as many as Zipf's law gives its rank.

    Latent i keeps its m_i largest pre-activations of the batch, where positive; the m_i sum to
    R k. Thresholds are the latents' own: the running mean of the smallest value each one kept.

    Parameters
    ----------
    prior : ``zipf``, or ``uniform`` for equal m_i.
    """

    architecture = "feature_choice"
    running_seen: Tensor

    def __init__(
        self,
        k: int,
        latents: int,
        *,
        prior: Literal["zipf", "uniform"] = "zipf",
        tau: float = 0.1,
        exponent: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        if prior not in ("zipf", "uniform"):
            raise unknown("prior", prior, ("zipf", "uniform"))
        exponent = exponent if prior == "zipf" else 0.0
        super().__init__(k, latents, tau=tau, exponent=exponent, offset=offset)
        self.running_threshold = torch.zeros(latents)
        self.register_buffer("running_seen", torch.zeros(latents, dtype=torch.int64))

    def choose(self, score: Tensor) -> Tensor:
        """Mask of exactly ``counts(R)`` entries a column, ties to the lower row."""
        if bool(score.isnan().any()):
            return top_batch(score, 1)  # says what NaN means
        counts = self.counts(len(score))
        order = score.argsort(dim=0, descending=True, stable=True)
        taken = torch.arange(len(score), device=score.device)[:, None] < counts
        return torch.zeros_like(taken).scatter_(0, order, taken)

    def observe(self, score: Tensor, kept: Tensor) -> None:
        self.running_steps += 1
        self.remember(self.running_density, kept.float().mean(0), self.running_steps)
        fired = kept.any(0)
        self.running_seen += fired
        edge = score.masked_fill(~kept, float("inf")).amin(0)
        edge = torch.where(fired, edge, self.running_threshold)
        self.remember(self.running_threshold, edge, self.running_seen)

    def inference(self, latents: int) -> JumpReLU:
        rule = super().inference(latents)
        with torch.no_grad():
            # A latent that never kept anything has no threshold that it could exceed.
            rule.threshold[self.running_seen == 0] = float("inf")
        return rule
