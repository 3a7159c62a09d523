"""Structured: a code is a sparse part plus a low-rank part that all latents share.

Shapes: R = rows, M = latents, K = rank of the shared part.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count
from gossamer.methods.features.rules.base import Batch, Codes, Rule, Step

__all__ = ["Structured"]

_LEAST = 1e-3


class Structured(Rule):
    """z = S + L with S = ReLU(a) and L = (a U) Vᵀ of rank K, for pre-activations a.

    S is made sparse by λ Σ s^p, with p falling from 1 to ``last_power`` over the run and λ scaled
    in every batch so that the penalty keeps the value it has at p = 1; atoms have norm 1. L is
    kept low in rank by a bound of its nuclear norm, ½ (‖a U‖² / R + ‖V‖²) for L / sqrt(R).

    Every latent of a row has a value, so :meth:`forward` names them all; :meth:`parts` tells the
    sparse part and the shared one apart.

    Parameters
    ----------
    latents : M. rank : K, 1 to M.
    coefficient : λ, >= 0, beside the squared error of a row. nuclear : weight of the bound.
    last_power : p at the end, above 0, at most 1.
    rows : of the whole run; over the first 5 % λ rises, from there p falls.

    Source: arXiv 2503.08980, §5; the split of a code into the two parts is our reading.
    """

    architecture = "structured"
    running_rows: Tensor

    def __init__(
        self,
        latents: int,
        *,
        rank: int = 8,
        coefficient: float = 0.0,
        nuclear: float = 0.0,
        last_power: float = 0.5,
        rows: int = 1,
    ) -> None:
        super().__init__()
        check_count("rank", rank, 1)
        if rank > latents:
            raise GossamerError(f"rank is {rank}; {latents} latents allow at most {latents}")
        for name, value in (("coefficient", coefficient), ("nuclear", nuclear)):
            if not 0 <= value < float("inf"):
                raise GossamerError(f"{name} is {value!r}; give a number, at least 0")
        if not 0 < last_power <= 1:
            raise GossamerError(f"last_power is {last_power!r}; give a number above 0, at most 1")
        self.rank, self.coefficient, self.nuclear = rank, coefficient, nuclear
        self.last_power, self.rows = last_power, rows
        generator = torch.Generator().manual_seed(latents)
        # Not zero: a product of two zero matrices has no gradient.
        self.shared_in = nn.Parameter(
            torch.randn(latents, rank, generator=generator) / latents**0.5
        )
        self.shared_out = nn.Parameter(0.1 * torch.randn(latents, rank, generator=generator))
        self.register_buffer("running_rows", torch.zeros((), dtype=torch.int64))

    def parts(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """The sparse part and the low-rank part of a code, both (R, M)."""
        return pre.relu(), pre @ self.shared_in @ self.shared_out.T

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        sparse, shared = self.parts(pre)
        every = torch.arange(pre.shape[1], device=pre.device).expand(pre.shape)
        return Codes(sparse + shared, every)

    def power(self) -> float:
        """p in force."""
        done = (int(self.running_rows) / max(1, self.rows) - 0.05) / 0.95
        return 1 - (1 - self.last_power) * min(1.0, max(0.0, done))

    def penalty(self, step: Step) -> Tensor:
        rows = len(step.pre)
        self.running_rows += rows
        rising = min(1.0, int(self.running_rows) / max(1.0, 0.05 * self.rows))
        sparse = step.pre.relu()
        # Values near zero would pull without bound; below the least they pull no more.
        raised = sparse.clamp_min(_LEAST).pow(self.power()).sum()
        level = sparse.detach().sum() / raised.detach().clamp_min(1e-12)
        factors = (step.pre @ self.shared_in).square().sum() + rows * self.shared_out.square().sum()
        return self.coefficient * rising * level * raised + 0.5 * self.nuclear * factors

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Structured":
        return cls(config["d_sae"], rank=config["rank"])
