"""Trainer: gradient steps on a dictionary, with latents kept alive and atoms kept at norm 1.

One trainer serves every selection rule, and several trainers can share one stream of rows.
Shapes: R = rows, D = input width, M = latents.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import isnan, sqrt
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.checkpoint import Checkpoint
from gossamer.methods.features.distributed import Parallel, agree, own_file
from gossamer.methods.features.objective import Layout, Terms, objective
from gossamer.methods.features.optimizer import DictionaryAdam
from gossamer.methods.features.rules import Rule
from gossamer.methods.features.stream import Stream
from gossamer.models import Progress

__all__ = ["Recipe", "Trainer", "geometric_median", "sample_size", "train"]

_SAMPLE = 8192
# A GPU runs ahead of the host; asking it who is dead, or how it goes, makes it wait. Windows of
# dead latents are far longer than this many steps.
_GLANCE = 16


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


def _first(sample: Tensor) -> Tensor:
    """The first process's sample, for all; every process gives one of the same shape."""
    same = sample.contiguous().clone()
    dist.broadcast(same, 0)
    return same


def _scale(rows: Tensor, what: str) -> float:
    """What gives rows a mean norm of sqrt(D)."""
    norm = float(torch.linalg.vector_norm(rows.float(), dim=1).mean())
    if not norm > 0:
        raise GossamerError(f"all {what} are zero or NaN; choose another module")
    return sqrt(rows.shape[1]) / norm


class Trainer:
    """Trains one dictionary on rows it is handed, batch after batch.

    Inputs are scaled so that their mean norm is sqrt(D), and so are the targets of a transcoder
    and each site of a crosscoder; :meth:`finish` folds the scales away.

    Parameters
    ----------
    sample : (R, all columns) rows that set the scale and the first ``b_dec`` (their geometric
        median).
    width : M. rule : which latents stay. recipe : how to train.
    layout : which columns are read, reconstructed, and the loss's gradient; None: all are read.
    sites : widths of the sites of a crosscoder, whose columns together are what is read.
    skip : a transcoder adds a linear map of its input.
    compute : dtype of the matrices while training; masters are float32. None: bfloat16 on a
        GPU for rules that gather, else float32.
    parallel : the processes that train this dictionary together; None: this one alone.

    Raises
    ------
    GossamerError
        If the sample is all zeros, or widths do not add up.
    """

    def __init__(
        self,
        sample: Tensor,
        *,
        width: int,
        rule: Rule,
        recipe: Recipe,
        layout: Layout | None = None,
        sites: tuple[int, ...] = (),
        skip: bool = False,
        compute: torch.dtype | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.parallel = parallel
        sample = sample if parallel is None else _first(sample)
        layout = Layout(sample.shape[1]) if layout is None else layout
        if sum(layout) != sample.shape[1] or (sites and sum(sites) != layout.reads):
            raise GossamerError(
                f"rows have {sample.shape[1]} columns; the layout {tuple(layout)} and the sites "
                f"{sites} name others"
            )
        self.layout, self.recipe = layout, recipe.resolved(layout.reads, width)
        x, target, _ = layout.split(sample)
        parts = x.split(sites, dim=1) if sites else (x,)
        scales = [_scale(part, "activations") for part in parts]
        self.scale = scales[0]
        self.site_scale = self._spread(scales, parts) if sites else None
        self.target_scale = self.scale if target is None else _scale(target, "targets")
        made = Dictionary.random(
            layout.reads,
            width,
            rule,
            seed=recipe.seed,
            tied=recipe.tied,
            d_out=layout.target or None,
            skip=skip,
        )
        self.dictionary = made.to(sample.device).train()
        x, target, _ = self.split(sample)
        with torch.no_grad():
            self.dictionary.b_dec.copy_(geometric_median(x if target is None else target))
        if parallel is not None:
            self.dictionary = parallel.local(self.dictionary).train()
        self.done = 0
        # One more place takes the padding of codes.
        latents = self.dictionary.d_sae
        self._silent = torch.zeros(latents + 1, dtype=torch.int64, device=sample.device)
        self._dead = torch.empty(0, dtype=torch.int64, device=sample.device)
        self._fvu = torch.full((), float("nan"), device=sample.device)
        self._glance = _GLANCE if sample.is_cuda else 1
        if compute is None:
            compute = torch.bfloat16 if sample.is_cuda and rule.gathers else torch.float32
        # eps 6.25e-10 is the paper's: gradients of rare latents are far below the usual 1e-8.
        self._adam = DictionaryAdam(
            {n: p for n, p in self.dictionary.named_parameters() if p.requires_grad},
            unit=("W_dec",),
            betas=(0.9, 0.999),
            eps=6.25e-10,
            compute=compute,
            total=None if parallel is None else parallel.total,
        )

    @staticmethod
    def _spread(scales: list[float], parts: tuple[Tensor, ...]) -> Tensor:
        """The sites' scales relative to the first, a number for every column."""
        made = [part.new_full((part.shape[1],), s) for s, part in zip(scales, parts, strict=True)]
        return torch.cat(made).float() / scales[0]

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows of the source as scaled input, scaled target or None, and gradient or None."""
        x, target, gradient = self.layout.split(rows.float())
        x = x * self.scale
        if self.site_scale is not None:
            x = x * self.site_scale
        return x, None if target is None else target * self.target_scale, gradient

    @property
    def since_fired(self) -> Tensor:
        """(M,), rows since each latent last fired."""
        return self._silent[:-1]

    @property
    def fvu(self) -> float:
        """Share of the last batch's variance that was not explained."""
        return float(self._fvu)

    def dead(self) -> Tensor:
        """Indices of the latents that no row has fired for too long."""
        assert self.recipe.dead_after is not None
        return (self.since_fired >= self.recipe.dead_after).nonzero()[:, 0]

    def terms(
        self, rows: Tensor, target: Tensor | None = None, gradient: Tensor | None = None
    ) -> Terms:
        """The objective on scaled (R, D) rows; also counts who fired."""
        assert self.recipe.aux_k is not None
        if self.recipe.aux_k and self.done % self._glance == 0:
            self._dead = self.dead()
        measure = objective if self.parallel is None else self.parallel.objective
        terms = measure(
            self.dictionary,
            rows,
            aux_k=self.recipe.aux_k,
            aux_coefficient=self.recipe.aux_coefficient,
            dead=self._dead,
            target=target,
            gradient=gradient,
        )
        self._fvu = terms.fvu
        values, indices = terms.codes
        fired = indices.where((indices >= 0) & (values.detach() != 0), len(self._silent) - 1)
        count = len(rows)
        if self.parallel is not None:
            marks = torch.zeros_like(self._silent, dtype=torch.bool)
            marks.index_fill_(0, fired.reshape(-1), True)
            marks, count = self.parallel.fired(marks, count)
            fired = marks.nonzero()[:, 0]
        self._silent += count
        self._silent.index_fill_(0, fired.reshape(-1), 0)
        return terms

    def loss(self, rows: Tensor) -> Tensor:
        """The loss on scaled (R, D) rows; also counts who fired."""
        return self.terms(rows).loss

    def step(self, rows: Tensor) -> None:
        """One update on (R, all columns) rows as the source gives them."""
        assert self.recipe.lr is not None
        self._adam.zero_grad()
        if self.parallel is not None:
            rows = self.parallel.rows(rows)
        with torch.enable_grad():
            self.terms(*self.split(rows)).loss.backward()
        if self.parallel is not None:
            self.parallel.reduce(self._adam.parameters)
            self.parallel.track(self.dictionary.rule)
        self._adam.step(self.recipe.lr * self.recipe.rate(self.done))
        self.done += 1

    def glance(self) -> str | None:
        """What a progress bar says, now and then on a GPU, or None in between.

        Raises
        ------
        GossamerError
            If the training has diverged.
        """
        if self.done % self._glance and self.done != self.recipe.steps:
            return None
        if isnan(fvu := self.fvu) and self.done:
            raise GossamerError(
                f"the error is NaN after {self.done} of {self.recipe.steps} steps; lower lr, now "
                f"{self.recipe.lr:.2g}, and look for NaN in the activations"
            )
        return f"dictionary, FVU {fvu:.3f}"

    # -- checkpoints -----------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, the rows apart."""
        rule = {f"rule.{n}": value for n, value in self.dictionary.rule.named_buffers()}
        own = {"done": torch.tensor(self.done), "silent": self._silent, "dead": self._dead}
        return {**self._adam.state(), **rule, **own, "fvu": self._fvu}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave, to the bit."""
        self._adam.load(state)
        for name, value in self.dictionary.rule.named_buffers():
            value.copy_(state[f"rule.{name}"])
        self.done = int(state["done"])
        self._silent.copy_(state["silent"])
        self._dead = state["dead"].to(self._silent.device)
        self._fvu = state["fvu"].to(self._silent.device)

    def finish(self) -> Dictionary:
        """The dictionary for unscaled inputs, in eval mode; the trainer ends here."""
        self._adam.release()
        made = self.dictionary if self.parallel is None else self.parallel.whole(self.dictionary)
        if self.site_scale is not None:
            with torch.no_grad():
                made.W_enc.mul_(self.site_scale[:, None])
                made.W_dec.div_(self.site_scale)
                made.b_dec.div_(self.site_scale)
        other = None if not self.layout.target else self.target_scale
        made.fold_input_scale(self.scale, other)
        return made.eval().requires_grad_(False)


def sample_size(recipe: Recipe) -> int:
    """Batches that set the scale and the first bias."""
    return max(1, min(recipe.steps, _SAMPLE // recipe.batch_size))


def _sample(batches: Iterator[Tensor], recipe: Recipe) -> tuple[Tensor, Iterator[Tensor]]:
    """Rows that set the scale, and the stream as if they had not been read."""
    count = sample_size(recipe)
    if isinstance(batches, Stream):
        return batches.peek(count), batches
    head = list(islice(batches, count))
    return torch.cat(head), chain(head, batches)


def train(
    batches: Iterator[Tensor],
    *,
    width: int,
    rule: Rule,
    recipe: Recipe,
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
    every: int = 1000,
    **options: Any,
) -> Dictionary:
    """Train a dictionary on a stream of (batch_size, D) rows.

    Parameters
    ----------
    batches : at least ``recipe.steps`` of them; ``ActivationSource.batches`` can be resumed.
    checkpoint : file that the run is saved to and taken up from; it is removed at the end.
    every : updates between two saves; what a kill loses at most.
    options : ``layout``, ``sites``, ``skip``, ``compute`` and ``parallel`` of :class:`Trainer`.

    Raises
    ------
    GossamerError
        If the training diverges, or the checkpoint is of another run or cannot be written.
    """
    sample, rest = _sample(batches, recipe)
    trainer = Trainer(sample, width=width, rule=rule, recipe=recipe, **options)
    if checkpoint is not None and trainer.parallel is not None:
        checkpoint = own_file(checkpoint)
    saved = None if checkpoint is None else Checkpoint.of(checkpoint, batches, trainer)
    if saved is not None:
        saved.resume()
        if trainer.parallel is not None:
            agree(trainer.done, saved.path)
    for rows in islice(rest, recipe.steps - trainer.done):
        trainer.step(rows)
        if (text := trainer.glance()) is not None and progress is not None:
            progress(trainer.done, recipe.steps, text)
        if saved is not None and trainer.done % every == 0 and trainer.done < recipe.steps:
            saved.save()
    made = trainer.finish()
    if saved is not None:
        saved.remove()
    return made
