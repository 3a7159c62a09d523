"""Which neurons a prompt needs: every token names its strongest, the most often named stay.

Free functions of tensors. Shapes: B rows (prompts), E experts (1 in a plain MLP), F neurons,
T tokens, N tokens of all rows.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.core import topk_mask
from gossamer.core.rank import check_scores

__all__ = [
    "Ranking",
    "Tally",
    "chord_elbow",
    "contains",
    "sentence_core",
    "token_core",
    "top_count",
]

Ranking = Literal["magnitude", "contribution", "positive", "active"]


def top_count(activation: Tensor, alpha: float) -> int:
    """Neurons one token names: alpha times the mean number of positive activations, at least 1.

    Parameters
    ----------
    activation : (N, F), what enters the down projection. alpha : 0 < alpha <= 1.
    """
    return max(1, round(alpha * float((activation > 0).sum(1).double().mean())))


def token_core(activation: Tensor, ranking: Ranking, alpha: float, norm: Tensor) -> Tensor:
    """The neurons each token names.

    Parameters
    ----------
    activation : (N, F).
    ranking : ``magnitude`` ranks |a_j|, ``contribution`` |a_j| times the norm of what neuron j
        writes, ``positive`` a_j and never names a_j <= 0; ``active`` names every a_j > 0.
    norm : (F,), norm of each column of the down projection.

    Returns
    -------
    bool, (N, F). NaN has no rank and is an error.
    """
    if not len(activation) or ranking == "active":
        return activation > 0
    count = top_count(activation, alpha)
    score = activation.float()
    check_scores(score, "the feed-forward activation")
    if ranking == "positive":
        return topk_mask(score, count) & (score > 0)
    score = score.abs() if ranking == "magnitude" else score.abs() * norm
    return topk_mask(score, count)


def sentence_core(votes: Tensor, strength: Tensor, norm: Tensor, keep: int) -> Tensor:
    """The neurons named by most tokens.

    Parameters
    ----------
    votes : (..., F), tokens that named each neuron. strength : (..., F), sum of |a_j| over them.
    norm : (..., F), norm of what each neuron writes; decides where no token was seen.
    keep : neurons kept, the same for every row.

    Returns
    -------
    bool, (..., F). Ties in votes go to the larger strength, then norm, then the lower index.
    """
    shape = votes.shape

    def below_one(x: Tensor) -> Tensor:
        x = x.double()
        return x / (x.amax(-1, keepdim=True) * (1 + 1e-9) + 1e-300)

    # Integer votes, then a fraction, then a fraction of what fp64 still tells apart of that.
    key = votes.double() + (below_one(strength) + below_one(norm) * 1e-7) / (1 + 2e-7)
    return topk_mask(key.reshape(-1, shape[-1]), keep).view(shape)


def contains(votes: Tensor, core: Tensor) -> Tensor:
    """Mean share of a token's named neurons that lie in a core, over the last axis; 0 without any.

    Parameters
    ----------
    votes : (..., F). core : bool (..., F).
    """
    return (votes * core).sum(-1) / votes.sum(-1).clamp_min(1)


def chord_elbow(values: Tensor) -> int:
    """Where a sorted curve bends: the index farthest from the chord of its first and last point.

    The lowest index among equals, and 0 for a curve of fewer than three points or a flat one.

    Parameters
    ----------
    values : (n,), monotone.
    """
    if len(values) < 3:
        return 0
    values = values.double()
    chord = torch.linspace(0, 1, len(values), dtype=torch.float64, device=values.device)
    # Distance to the chord is proportional to the vertical one.
    off = (values - (values[0] + (values[-1] - values[0]) * chord)).abs()
    return int(off.argmax()) if float(off.max()) > 1e-9 * float(values.abs().max()) else 0


@dataclass(eq=False)
class Tally:
    """What the tokens of some prompts named in one layer.

    Parameters
    ----------
    votes : (B, E, F) float32, tokens that named each neuron.
    strength : (B, E, F) float32, sum of |a_j| over tokens.
    """

    votes: Tensor
    strength: Tensor

    @classmethod
    def empty(cls, rows: int, experts: int, neurons: int, device: torch.device) -> "Tally":
        """No token yet."""
        shape = (rows, experts, neurons)
        return cls(torch.zeros(shape, device=device), torch.zeros(shape, device=device))

    def add(
        self,
        row: int,
        expert: int,
        activation: Tensor,
        ranking: Ranking,
        alpha: float,
        norm: Tensor,
    ) -> None:
        """Take in (N, F) activations of one row's tokens."""
        if len(activation):
            named = token_core(activation, ranking, alpha, norm)
            self.votes[row, expert] += named.sum(0)
            self.strength[row, expert] += activation.float().abs().sum(0)

    def clear(self, rows: Tensor) -> None:
        """Forget what these rows (bool, (B,)) named."""
        self.votes[rows] = 0
        self.strength[rows] = 0
