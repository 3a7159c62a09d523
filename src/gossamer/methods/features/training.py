"""Trainer: gradient steps on a dictionary, with latents kept alive and atoms kept at norm 1.

One trainer serves every selection rule, and several trainers can share one stream of rows.
Shapes: R = rows, D = input width, M = latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import sqrt

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import Rule, TopK, combine
from gossamer.models import Progress

__all__ = ["Recipe", "Trainer", "geometric_median", "train"]

_SAMPLE = 8192


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a dictionary is trained; the defaults are those of arXiv 2406.04093, app. A.

    Parameters
    ----------
    steps : optimizer updates.
    batch_size : rows per update.
    lr : peak learning rate; None: 2e-4 / sqrt(M / 2^14).
    warmup : first updates of linearly rising rate; None: 5 % of the steps, at most 1000.
    decay : last share of the updates, over which the rate falls linearly to 0.
    aux_k : dead latents that model the error, a row; None: D / 2; 0: no auxiliary loss.
    aux_coefficient : weight of the auxiliary loss.
    dead_after : rows without firing after which a latent is dead; None: 5 % of all rows, at
        most 10 million.
    tied : the encoder starts as the transposed atoms.
    seed : of the first atoms.
    """

    steps: int
    batch_size: int
    lr: float | None = None
    warmup: int | None = None
    decay: float = 0.2
    aux_k: int | None = None
    aux_coefficient: float = 1 / 32
    dead_after: int | None = None
    tied: bool = True
    seed: int = 0

    def resolved(self, d_in: int, d_sae: int) -> "Recipe":
        """The recipe with every open value filled in."""
        rows = self.steps * self.batch_size
        return replace(
            self,
            lr=2e-4 / sqrt(d_sae / 2**14) if self.lr is None else self.lr,
            warmup=min(1000, self.steps // 20) if self.warmup is None else self.warmup,
            aux_k=max(1, d_in // 2) if self.aux_k is None else self.aux_k,
            dead_after=min(10_000_000, max(1, rows // 20))
            if self.dead_after is None
            else self.dead_after,
        )

    def rate(self, step: int) -> float:
        """Share of the peak rate at an update, counted from 0."""
        assert self.warmup is not None
        rising = (step + 1) / (self.warmup + 1)
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, rising, falling)


def geometric_median(rows: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows, (R, D) to (D,): Weiszfeld's method.

    Parameters
    ----------
    tolerance : stops when the point moves by less than this share of its distance to the rows.
    """
    point = rows.mean(0)
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(rows - point, dim=1)
        weights = 1 / distance.clamp_min(1e-12)
        moved = (weights @ rows) / weights.sum()
        step = torch.linalg.vector_norm(moved - point)
        point = moved
        if step <= tolerance * distance.mean():
            break
    return point


class Trainer:
    """Trains one dictionary on rows it is handed, batch after batch.

    Inputs are scaled so that their mean norm is sqrt(D); :meth:`finish` folds the scale away.

    Parameters
    ----------
    sample : (R, D) rows that set the scale and the first ``b_dec`` (their geometric median).
    width : M. rule : which latents stay. recipe : how to train.

    Raises
    ------
    GossamerError
        If the sample is all zeros.
    """

    def __init__(self, sample: Tensor, *, width: int, rule: Rule, recipe: Recipe) -> None:
        d_in = sample.shape[1]
        norm = float(torch.linalg.vector_norm(sample.float(), dim=1).mean())
        if not norm > 0:
            raise GossamerError("all activations are zero or NaN; choose another module")
        self.scale = sqrt(d_in) / norm
        self.recipe = recipe.resolved(d_in, width)
        made = Dictionary.random(d_in, width, rule, seed=recipe.seed, tied=recipe.tied)
        self.dictionary = made.to(sample.device).train()
        with torch.no_grad():
            self.dictionary.b_dec.copy_(geometric_median(sample.float() * self.scale))
        self.done = 0
        self.fvu = float("nan")
        self.since_fired = torch.zeros(width, dtype=torch.int64, device=sample.device)
        # eps 6.25e-10 is the paper's: gradients of rare latents are far below the usual 1e-8.
        self._adam = torch.optim.Adam(
            self.dictionary.parameters(), eps=6.25e-10, betas=(0.9, 0.999), fused=True
        )

    def dead(self) -> Tensor:
        """Indices of the latents that no row has fired for too long."""
        assert self.recipe.dead_after is not None
        return (self.since_fired >= self.recipe.dead_after).nonzero()[:, 0]

    def aux_loss(self, pre: Tensor, error: Tensor) -> Tensor:
        """How badly the dead latents alone model the error of the others; 0 without dead ones.

        Their top ``aux_k`` pre-activations, where positive, reconstruct the detached error
        without ``b_dec``; the squared miss is a share of the error's variance.

        Parameters
        ----------
        pre : (R, M). error : (R, D), x minus its reconstruction.
        """
        dead, aux_k = self.dead(), self.recipe.aux_k
        if not len(dead) or not aux_k:
            return pre.new_zeros(())
        codes = TopK(min(aux_k, len(dead)))(pre[:, dead])
        target = error.detach()
        miss = (target - combine(codes, self.dictionary.W_dec[dead])).square().sum()
        return (miss / (target - target.mean(0)).square().sum()).nan_to_num(0.0, 0.0, 0.0)

    def loss(self, rows: Tensor) -> Tensor:
        """The objective on scaled (R, D) rows; also counts who fired."""
        made = self.dictionary
        pre = made.pre_activations(rows)
        codes = made.rule(pre)
        error = rows - combine(codes, made.W_dec) - made.b_dec
        spread = (rows - rows.mean(0)).square().sum().clamp_min(1e-12)
        squared = error.square().sum()
        self.fvu = float(squared.detach() / spread)
        penalty = made.rule.penalty(codes, made.W_dec.norm(dim=1))
        main = squared if penalty is None else squared + penalty
        self.since_fired += len(rows)
        self.since_fired[codes.fired()] = 0
        return main / spread + self.recipe.aux_coefficient * self.aux_loss(pre, error)

    def step(self, rows: Tensor) -> None:
        """One update on (R, D) rows as the source gives them."""
        made, atoms = self.dictionary, self.dictionary.W_dec
        self._adam.zero_grad(set_to_none=True)
        with torch.enable_grad():
            self.loss(rows.to(atoms.dtype) * self.scale).backward()
        assert atoms.grad is not None
        assert self.recipe.lr is not None
        with torch.no_grad():
            # Growth along an atom would be undone below, yet would fill Adam's moments.
            atoms.grad -= (atoms.grad * atoms).sum(1, keepdim=True) * atoms
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        for group in self._adam.param_groups:
            group["lr"] = self.recipe.lr * self.recipe.rate(self.done)
        self._adam.step()
        with torch.no_grad():
            atoms.div_(torch.linalg.vector_norm(atoms, dim=1, keepdim=True))
        self.done += 1

    def finish(self) -> Dictionary:
        """The dictionary for unscaled inputs, in eval mode; the trainer ends here."""
        self.dictionary.fold_input_scale(self.scale)
        return self.dictionary.eval().requires_grad_(False)


def train(
    batches: Iterator[Tensor],
    *,
    width: int,
    rule: Rule,
    recipe: Recipe,
    progress: Progress | None = None,
) -> Dictionary:
    """Train a dictionary on a stream of (batch_size, D) rows.

    Parameters
    ----------
    batches : at least ``recipe.steps`` of them.
    """
    head = list(islice(batches, max(1, min(recipe.steps, _SAMPLE // recipe.batch_size))))
    trainer = Trainer(torch.cat(head), width=width, rule=rule, recipe=recipe)
    for rows in islice(chain(head, batches), recipe.steps):
        trainer.step(rows)
        if progress is not None:
            progress(trainer.done, recipe.steps, f"dictionary, FVU {trainer.fvu:.3f}")
    return trainer.finish()
