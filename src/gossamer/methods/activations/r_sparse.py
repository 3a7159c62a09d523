"""R-Sparse: channels that are not kept go through a low-rank stand-in of the matrix.

Together the many small inputs act like a bias that lives in few directions, so a truncated SVD
serves them at a fraction of the bytes. Shapes: O = outputs, I = inputs, R = rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, QuantileSketch, Site, check_count
from gossamer.methods.activations.base import Thresholded
from gossamer.methods.activations.calibration import OutputError, sketches_of, trial_data
from gossamer.methods.activations.gates import Gate, LowRank, Tap
from gossamer.methods.activations.levels import column_norms
from gossamer.models import Block, Inputs, SiteMap, Tokens

__all__ = ["ALPHAS", "RSparse", "low_rank", "search", "split_budget"]

ALPHAS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
SEARCH = (8, 256)  # sequences and tokens of each that shares are searched on


def split_budget(shape: tuple[int, int], sparsity: float, alpha: float) -> tuple[float, int]:
    """Share of channels kept and rank that together read ``1 - sparsity`` of a matrix.

    The low-rank path gets what ``1 - alpha`` of the budget pays, a whole number of ranks and at
    least one; the channels get all the rest, so the budget is met exactly.

    Parameters
    ----------
    shape : (O, I). alpha : share of the budget for channels, 0 to 1; 1 means no low-rank path.
    """
    rows, columns = shape
    budget = (1.0 - sparsity) * rows * columns
    if alpha == 1.0 or budget < rows + columns:
        return 1.0 - sparsity, 0
    rank = max(1, int((1.0 - alpha) * budget / (rows + columns)))
    rank = min(rank, rows, columns)
    return (budget - rank * (rows + columns)) / (rows * columns), rank


def low_rank(weight: Tensor, rank: int) -> LowRank:
    """U_r S_r and V_r^T of a matrix (O, I), found in float64, in the matrix's dtype."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    left = (u[:, :rank] * s[:rank]).to(weight.dtype).contiguous()
    return LowRank(left, vh[:rank].to(weight.dtype).contiguous())


@dataclass(frozen=True, kw_only=True)
class RSparse(Thresholded):
    """Gate inputs by |x_j| |W[:, j]| and send the removed ones through U_r S_r V_r^T.

    Parameters
    ----------
    sparsity : share of every matrix's weights not read, the low-rank factors counted as read.
    alpha : share of what is read that goes to channels, the rest to the low-rank path; 1 gates
        by |x_j| with no such path, which is TEAL. None searches one for every matrix.
    evaluations : of the search: the whole model on 8 x 256 calibration tokens each time.

    The score is WINA's. Stacked experts, and matrices whose budget pays for less than one rank,
    have no low-rank path: their channels are gated by |x_j| alone.

    Source: arXiv 2504.19449, §3.

    Departs from the paper: ranks are whole and channels take the rest of the budget, computed from
    each matrix's own shape (grouped heads included); the search starts from equal shares, then
    changes a tenth of the matrices at a time, and lowers the divergence from dense; thresholds
    come from all the calibration data; every token but a short prefix is masked.
    """

    card: ClassVar[Card] = Card(
        title="R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference",
        system="r_sparse",
        year=2025,
        arxiv="2504.19449",
        family="activations",
        when="inference",
        masks="dynamic",
        site="input of every linear layer of a block",
        score="|x_j| ||W[:, j]||",
        pattern="any channel, per token, and a low-rank path for the rest",
        budget="weights read per matrix, split between channels and rank by search",
        schedule="calibrated once",
        update="low-rank path for removed channels",
        kernel="masked dense",
        departs="budgets exact from shapes; 20-evaluation search on divergence; prefix dense",
    )
    paper_dense: ClassVar[float | None] = 0.9
    sizes_too: ClassVar[bool] = True
    example: ClassVar[Mapping[str, object]] = {"evaluations": 4}

    alpha: float | None = None
    evaluations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not 0.0 <= self.alpha <= 1.0:
            raise GossamerError(f"alpha is {self.alpha!r}; it is a share of what is read, 0 to 1")
        if self.policy != "quantile":
            raise GossamerError(f"policy is {self.policy!r}; r_sparse calibrates a quantile")
        check_count("evaluations", self.evaluations, 1)

    def channel_weight(self, site: Site, weight: Tensor) -> Tensor:
        return column_norms(site, weight)

    def _sketches(
        self, model: nn.Module, block: Block, taps: tuple[Tap, ...]
    ) -> dict[str, QuantileSketch]:
        plain = sketches_of(model, block, [replace(tap, weight=None) for tap in taps])
        found = {f"{name} plain": sketch for name, sketch in plain.items()}
        return found | (sketches_of(model, block, taps) if self.alpha != 1.0 else {})

    def _gate(
        self,
        tap: Tap,
        share: float,
        sketches: Mapping[str, QuantileSketch],
        alpha: float = 1.0,
        whole: LowRank | None = None,
    ) -> Gate:
        """The gate of a place; without its factors (allocation's trials) it has no second path."""
        kept, rank = split_budget(tap.sites[0].shape, share, alpha)
        if rank == 0 or whole is None:
            return replace(tap, weight=None).gate(share, sketches[f"{tap.name} plain"])
        factors = LowRank(whole.left[:, :rank].contiguous(), whole.right[:rank].contiguous())
        return replace(tap.gate(1.0 - kept, sketches[tap.name]), low_rank=factors)

    def _facts(self, gates: list[Gate]) -> tuple[str, ...]:
        ranks = [g.low_rank.right.shape[0] for g in gates if g.low_rank is not None]
        if not ranks:
            return ("no matrix has a low-rank path: channels take all that is read",)
        alphas = [_alpha(gate) for gate in gates]
        how = "searched" if self.alpha is None else "given"
        fact = (
            f"alpha, {how}: {min(alphas):.2f} to {max(alphas):.2f}, mean "
            f"{sum(alphas) / len(alphas):.2f}; {len(ranks)} of {len(gates)} matrices have a "
            f"low-rank path, of rank {min(ranks)} to {max(ranks)}"
        )
        if len(ranks) < len(gates):
            fact += "; stacked experts and budgets below one rank have none"
        return (fact,)

    def _gates(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        taps: list[Tap],
        shares: Mapping[str, float],
        sketches: Mapping[str, QuantileSketch],
    ) -> list[Gate]:
        tried = ALPHAS if self.alpha is None else (self.alpha,)
        factors: dict[str, LowRank] = {}
        for tap in taps:
            # One decomposition serves every rank that can be asked for.
            rank = split_budget(tap.sites[0].shape, shares[tap.name], min(tried))[1]
            if rank and shares[tap.name] > 0 and tap.sites[0].expert is None:
                factors[tap.name] = low_rank(tap.sites[0].weight(model), rank)

        def gates(alphas: Mapping[str, float]) -> list[Gate]:
            return [
                self._gate(t, shares[t.name], sketches, alphas[t.name], factors.get(t.name))
                for t in taps
            ]

        names = [tap.name for tap in taps]
        if self.alpha is not None or not factors:
            return gates(dict.fromkeys(names, 1.0 if self.alpha is None else self.alpha))
        error = OutputError(model, sites, trial_data(data, *SEARCH), *self.dense)
        return gates(search(names, lambda alphas: error(gates(alphas)), self.evaluations))


def _alpha(gate: Gate) -> float:
    """Share of what a gate's layers read that goes to channels."""
    read = gate.size - gate.saved
    path = 0 if gate.low_rank is None else gate.low_rank.left.numel() + gate.low_rank.right.numel()
    return 1.0 - path / read if read else 1.0


def search(
    names: list[str], error: Callable[[Mapping[str, float]], float], evaluations: int
) -> dict[str, float]:
    """Shares per matrix with the least error among those tried; all ones is among them.

    Equal shares come first; every further trial is the best so far with a tenth of the matrices
    drawn anew, at least one. Few change at a time: with so few trials, a child that differs more
    wins by luck on the tokens searched on and loses on all others.
    """
    generator = torch.Generator().manual_seed(0)
    best, least = dict.fromkeys(names, 1.0), float("inf")
    for turn in range(evaluations):
        if turn < len(ALPHAS):
            child = dict.fromkeys(names, ALPHAS[turn])
        else:
            order = torch.randperm(len(names), generator=generator).tolist()
            child = dict(best)
            for index in order[: max(1, len(names) // 10)]:
                pick = int(torch.randint(len(ALPHAS), (1,), generator=generator))
                child[names[index]] = ALPHAS[pick]
        if (found := error(child)) < least:
            best, least = child, found
    return best
