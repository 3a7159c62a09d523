"""ConceptNet: rows that are linear in the exact log-odds of dependent concepts.

Binary concepts hang on a tree; a context shows noisy tokens of some of them. Theory says that a
next-token predictor's features are an invertible linear map of the concepts' log-posteriors given
the context: here they are, with the truth beside them.
Shapes: N = rows, C = concepts, D = width.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["ConceptNet"]


@dataclass(frozen=True)
class ConceptNet:
    """A tree of binary concepts, and features made of their log-odds.

    Parameters
    ----------
    concepts : C, at most 12; concept i hangs on concept (i - 1) // 2.
    width : D. copies : probability that a concept equals its parent; 0.5 makes all independent.
    shown : tokens of each concept in a context, 0 to this many. right : probability that a token
        tells the truth.
    noise : standard deviation added to each channel. seed : of the linear map.
    """

    concepts: int = 8
    width: int = 24
    copies: float = 0.85
    shown: int = 3
    right: float = 0.8
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.concepts <= 12:
            raise GossamerError(f"concepts is {self.concepts}; give 1 to 12")

    def states(self) -> tuple[Tensor, Tensor]:
        """All 2^C states, bool (S, C), and the log-probability of each, float64 (S,)."""
        numbers = torch.arange(2**self.concepts)
        states = (numbers[:, None] >> torch.arange(self.concepts)) & 1 == 1
        total = torch.full((len(states),), log(0.5), dtype=torch.float64)
        for i in range(1, self.concepts):
            same = states[:, i] == states[:, (i - 1) // 2]
            total += torch.where(same, log(self.copies), log(1 - self.copies)).double()
        return states, total

    def rows(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Features (N, D), exact log-odds (N, C) and true concepts, bool (N, C)."""
        generator = torch.Generator().manual_seed(0x5EED0000 + 7919 * self.seed + seed)
        states, prior = self.states()
        drawn = torch.multinomial(prior.exp(), count, replacement=True, generator=generator)
        truth = states[drawn]
        shape = (count, self.concepts)
        shown = torch.randint(self.shown + 1, shape, generator=generator)
        lot = torch.rand(*shape, self.shown, generator=generator) < self.right
        told = lot & (torch.arange(self.shown) < shown[..., None])
        # Tokens for the truth less tokens against it, turned to tokens for 'yes' less for 'no'.
        lead = (2 * told.sum(-1) - shown) * (2 * truth - 1)
        weight = log(self.right / (1 - self.right))
        evidence = 0.5 * weight * lead.double() @ (2 * states.double() - 1).T
        joint = (evidence + prior).softmax(1)
        yes = (joint @ states.double()).clamp(1e-9, 1 - 1e-9)
        odds = torch.logit(yes).float()
        mixing = torch.randn(
            self.concepts,
            self.width,
            generator=torch.Generator().manual_seed(0x3A7D0000 + self.seed),
        )
        noise = self.noise * torch.randn(count, self.width, generator=generator)
        return odds @ mixing + noise, odds, truth
