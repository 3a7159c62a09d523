"""Toy beds: rows made from known atoms, so that a dictionary can be marked.

Superposition: more true atoms than dimensions, few active at a time, some common and some rare.
Hierarchy: specific atoms that only occur with a general one. Shared: two models' views of the
same atoms, some of them private to one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["Heard", "Hierarchy", "Shared", "Superposition"]

# Far from the seeds of dictionaries: with a common seed, a dictionary's first atoms and the true
# ones would be the same draw, and the answer would be given away before training. Below 2^32,
# because torch's CPU generator drops the higher bits of a seed.
_ATOMS, _ROWS = 0x5EED0000, 0x3A7D0000


def _directions(count: int, wide: int, seed: int) -> Tensor:
    """(count, wide) random unit directions."""
    generator = torch.Generator().manual_seed(_ATOMS + seed)
    return nn.functional.normalize(torch.randn(count, wide, generator=generator), dim=1)


@dataclass(frozen=True)
class Superposition:
    """x = sum_i c_i d_i + noise with c_i ~ Bernoulli(p_i) (0.5 + |N(0, 1)|), p_i falling as 1/i.

    Parameters
    ----------
    d_in : D, width of a row. atoms : G, number of true atoms, unit norm, random directions.
    active : mean number of atoms in a row. noise : standard deviation added to each channel.
    signed : every c_i is negative half of the time, so that an atom has two meanings.
    orthogonal : true atoms are at right angles; needs G <= D.
    seed : of the atoms; the rows have their own.
    """

    d_in: int = 32
    atoms: int = 96
    active: float = 5.0
    noise: float = 0.01
    signed: bool = False
    orthogonal: bool = False
    seed: int = 0

    def true_atoms(self) -> Tensor:
        """(G, D), unit norm."""
        atoms = _directions(self.atoms, self.d_in, self.seed)
        return torch.linalg.qr(atoms.T).Q.T.contiguous() if self.orthogonal else atoms

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
        return self.rows_of(self.true_atoms(), size, seed)

    def rows_of(self, atoms: Tensor, size: int, seed: int = 0) -> Iterator[Tensor]:
        """Batches of this bed's codes shown by other atoms (G, any width)."""
        for codes, noise in self.codes(size, atoms.shape[1], seed):
            yield codes @ atoms + self.noise * noise

    def codes(self, size: int, wide: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless codes (size, G) with standard normal noise (size, wide) to go with them."""
        rates = self.rates()
        generator = torch.Generator().manual_seed(_ROWS + 1_000_003 * self.seed + seed)
        while True:
            on = torch.rand(size, self.atoms, generator=generator) < rates
            amount = 0.5 + torch.randn(size, self.atoms, generator=generator).abs()
            if self.signed:
                amount *= 1 - 2 * torch.randint(2, amount.shape, generator=generator)
            noise = torch.randn(size, wide, generator=generator)
            yield on * amount, noise


@dataclass(frozen=True)
class Hierarchy:
    """General and specific atoms: a child occurs only where its parent does.

    Parents occur independently; while one is on, each of its children is on with the rate given.
    Amounts and noise are those of :class:`Superposition`.

    Parameters
    ----------
    d_in : D. parents : P. children : C of each parent; the true atoms are P (1 + C), parents
        first, then the children of the first parent, and so on.
    rate : of a parent. child_rate : of a child, given its parent.
    seed : of the atoms.
    """

    d_in: int = 64
    parents: int = 10
    children: int = 5
    rate: float = 0.15
    child_rate: float = 0.15
    noise: float = 0.01
    seed: int = 0

    def true_atoms(self) -> Tensor:
        """(P (1 + C), D), unit norm."""
        return _directions(self.parents * (1 + self.children), self.d_in, self.seed)

    def labelled(self, size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (size, D) rows with which atoms are on, bool (size, P (1 + C))."""
        atoms = self.true_atoms()
        generator = torch.Generator().manual_seed(_ROWS + 1_000_003 * self.seed + seed)
        p, c = self.parents, self.children
        while True:
            parent = torch.rand(size, p, generator=generator) < self.rate
            child = torch.rand(size, p, c, generator=generator) < self.child_rate
            child &= parent[:, :, None]
            on = torch.cat([parent, child.flatten(1)], 1)
            amount = 0.5 + torch.randn(size, len(atoms), generator=generator).abs()
            noise = torch.randn(size, self.d_in, generator=generator)
            yield (on * amount) @ atoms + self.noise * noise, on

    def batches(self, size: int, seed: int = 0) -> Iterator[Tensor]:
        """Endless (size, D) batches of fresh rows; equal for equal seeds."""
        for rows, _ in self.labelled(size, seed):
            yield rows


@dataclass(frozen=True)
class Heard:
    """Superposition of which a model hears every second atom: rows and gradients of its loss.

    The gradient of a row is the sum of the heard atoms that occur in it, each with a sign of its
    own; rows and gradients stand side by side, (2 D,).
    """

    bed: Superposition = Superposition()

    def batches(self, size: int, seed: int = 0) -> Iterator[Tensor]:
        """Endless (size, 2 D) batches of fresh rows; equal for equal seeds."""
        atoms = self.bed.true_atoms()
        heard = torch.arange(len(atoms)) % 2 == 1
        generator = torch.Generator().manual_seed(_ROWS + 7 * self.bed.seed + seed)
        for codes, noise in self.bed.codes(size, self.bed.d_in, seed):
            signs = 1 - 2 * torch.randint(2, codes.shape, generator=generator)
            gradient = ((codes != 0) * heard * signs).float() @ atoms
            yield torch.cat([codes @ atoms + self.bed.noise * noise, gradient], 1)


@dataclass(frozen=True)
class Shared:
    """Two sites that show one code through atoms of their own, some atoms at one site only.

    Rows are the two sites' (D,) side by side: (2 D,).

    Parameters
    ----------
    bed : the code, and D. private : share of the atoms that only the first site shows, and as
        many that only the second shows, spread evenly over rates.
    """

    bed: Superposition = Superposition()
    private: float = 0.1

    def owners(self) -> Tensor:
        """(G,): 0 for atoms both sites show, 1 and 2 for those of one site alone."""
        every = round(1 / self.private)
        place = torch.arange(self.bed.atoms) % every
        return torch.where(place == every // 2, 1, torch.where(place == every - 1, 2, 0))

    def true_atoms(self) -> Tensor:
        """(G, 2 D): the first site's atom and the second's, zero where a site does not show it."""
        bed, owner = self.bed, self.owners()
        first = bed.true_atoms() * (owner != 2)[:, None]
        second = replace(bed, seed=bed.seed + 7919).true_atoms() * (owner != 1)[:, None]
        return torch.cat([first, second], 1)

    def batches(self, size: int, seed: int = 0) -> Iterator[Tensor]:
        """Endless (size, 2 D) batches of fresh rows; equal for equal seeds."""
        return self.bed.rows_of(self.true_atoms(), size, seed)
