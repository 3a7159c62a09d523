"""Toy superposition: rows made from known atoms, so that a dictionary can be marked.

The bed of the family's claims: more true atoms than dimensions, few active at a time, some
common and some rare.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Superposition"]

# Far from the seeds of dictionaries: with a common seed, a dictionary's first atoms and the true
# ones would be the same draw, and the answer would be given away before training. Below 2^32,
# because torch's CPU generator drops the higher bits of a seed.
_ATOMS, _ROWS = 0x5EED0000, 0x3A7D0000


@dataclass(frozen=True)
class Superposition:
    """x = sum_i c_i d_i + noise with c_i ~ Bernoulli(p_i) (0.5 + |N(0, 1)|), p_i falling as 1/i.

    Parameters
    ----------
    d_in : D, width of a row. atoms : G, number of true atoms, unit norm, random directions.
    active : mean number of atoms in a row. noise : standard deviation added to each channel.
    seed : of the atoms; the rows have their own.
    """

    d_in: int = 32
    atoms: int = 96
    active: float = 5.0
    noise: float = 0.01
    seed: int = 0

    def true_atoms(self) -> Tensor:
        """(G, D), unit norm."""
        generator = torch.Generator().manual_seed(_ATOMS + self.seed)
        return nn.functional.normalize(
            torch.randn(self.atoms, self.d_in, generator=generator), dim=1
        )

    def rates(self) -> Tensor:
        """(G,), how often each atom occurs; they sum to ``active`` and none exceeds 1."""
        weight = 1 / torch.arange(1, self.atoms + 1, dtype=torch.float64)
        low, high = 0.0, float(self.atoms) * self.active
        for _ in range(100):
            middle = (low + high) / 2
            if float((middle * weight).clamp_max(1).sum()) < self.active:
                low = middle
            else:
                high = middle
        return (high * weight).clamp_max(1).float()

    def batches(self, size: int, seed: int = 0) -> Iterator[Tensor]:
        """Endless (size, D) batches of fresh rows; equal for equal seeds."""
        atoms, rates = self.true_atoms(), self.rates()
        generator = torch.Generator().manual_seed(_ROWS + 1_000_003 * self.seed + seed)
        while True:
            on = torch.rand(size, self.atoms, generator=generator) < rates
            amount = 0.5 + torch.randn(size, self.atoms, generator=generator).abs()
            noise = torch.randn(size, self.d_in, generator=generator)
            yield (on * amount) @ atoms + self.noise * noise
