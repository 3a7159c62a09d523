"""PST: prune while fine-tuning, by magnitude plus a score that learns in thin matrices.

A full matrix of scores would be as large as the weights. Magnitude is known for free; what the task
adds to it is of low rank, plus one number for each row and column.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.core import NM, Card, GossamerError, Pattern, Site, Unstructured, check_count
from gossamer.core.budget import check_number
from gossamer.core.schedule import Window
from gossamer.methods.tuning.base import Adapter, Tuner, Tuning
from gossamer.methods.tuning.masked.adapter import Masked, quota
from gossamer.methods.tuning.masked.linear import Scales

__all__ = ["PST"]


@dataclass(frozen=True, kw_only=True)
class PST(Tuning):
    """Fine-tune to a sparse model by training a low-rank update and a low-rank score.

    With the frozen W of each matrix, W' = W + β U V is what is pruned and
    S = |W'| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ) says how: the largest S of each matrix stay, and gradients
    pass straight through that choice to the scores. ``finish`` folds M ∘ W' into the model.

    Parameters
    ----------
    sparsity : share of every tuned matrix removed in the end; None takes the pattern's, or 0.8.
    pattern : what competes: ``layer`` (the whole matrix), ``row``, or N:M.
    rank, score_rank : r₁ of U V, r₂ of A B. Trained numbers of an (O, I) matrix:
        (r₁ + r₂ + 1)(O + I).
    beta : factor of the update. alpha1, alpha2 : factors of the low-rank and of the row and column
        score; 0 leaves a part out, both 0 leave magnitude pruning with a low-rank update.
    initial_warmup, final_warmup : shares of the updates at the start without removal and at the
        end at the full sparsity; cubic in between.
    every : updates between choices of masks; 1 as in the paper.
    roles, head, steps, lr, batch_size, seed : see :class:`~gossamer.methods.tuning.base.Tuning`.

    Source: arXiv 2205.11005, §3; defaults of its code.

    Departs from the paper: masks are chosen once an update instead of in every forward pass, which
    is the same for ``every=1``; exact counts, ties to the lower index; matrices outside the blocks
    (classifier, pooler) stay dense; N:M and rows as well.

    Examples
    --------
    ::

        tuner = PST(sparsity=0.8, steps=len(batches)).attach(model)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
        print(tuner.finish().report())
    """

    card: ClassVar[Card] = Card(
        title="Parameter-Efficient Sparsity for Large Language Models Fine-Tuning",
        year=2022,
        arxiv="2205.11005",
        system="pst",
        family="tuning",
        when="during training",
        masks="dynamic",
        site="linear weight",
        score="|W + β U V| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ), learned",
        pattern="unstructured by layer or row, N:M",
        budget="the same share of every matrix",
        schedule="cubic between two warm-ups",
        update="low-rank, folded",
        kernel="masked dense",
        departs="masks chosen once an update; matrices outside the blocks stay dense",
    )
    example: ClassVar[Mapping[str, Any]] = {
        "steps": 3,
        "batch_size": 3,
        "lr": 1e-2,
        "rank": 2,
        "score_rank": 2,
    }

    sparsity: float | None = None
    pattern: Pattern = Unstructured(per="layer")
    rank: int = 8
    score_rank: int = 8
    alpha1: float = 1.0
    alpha2: float = 1.0
    beta: float = 1.0
    initial_warmup: float = 0.1
    final_warmup: float = 0.3
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, Unstructured | NM) or str(self.pattern) == "model":
            raise GossamerError(
                f"pst takes no pattern {self.pattern}; it takes layer, row, or N:M such as 2:4"
            )
        fixed = self.pattern.fixed_sparsity
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.8 if fixed is None else fixed)
        elif fixed is not None and abs(self.sparsity - fixed) > 1e-9:
            raise GossamerError(
                f"pattern {self.pattern} fixes the sparsity at {fixed:g}; got {self.sparsity}: "
                "leave the sparsity out or choose another pattern"
            )
        for name in ("rank", "score_rank", "every"):
            check_count(name, getattr(self, name), 1)
        for name in ("alpha1", "alpha2", "beta"):
            check_number(name, getattr(self, name))
        if self.beta == 0:
            raise GossamerError("beta is 0, so the update would never learn; give another number")
        for name in ("initial_warmup", "final_warmup"):
            value = check_number(name, getattr(self, name))
            if not 0 <= value < 1:
                raise GossamerError(f"{name} is {value!r}; it is a share of the updates, 0 to 1")
        try:
            self.schedule()
        except GossamerError:
            raise GossamerError(
                f"initial_warmup {self.initial_warmup:g} and final_warmup {self.final_warmup:g} "
                f"leave none of {self.steps} updates to prune in; lower one or give more steps"
            ) from None

    def schedule(self) -> Window:
        """Sparsity over the updates."""
        assert self.sparsity is not None
        return Window(self.sparsity, self.steps, self.initial_warmup, 1.0 - self.final_warmup)

    def adapter(self, site: Site, weight: Tensor, generator: torch.Generator) -> Adapter:
        """M ∘ (W + β U V) with its scores."""
        try:
            self.pattern.check_shape(site.shape)
        except GossamerError as error:
            raise GossamerError(f"{site.name}: {error}") from None
        for name in ("rank", "score_rank"):
            if getattr(self, name) > min(site.shape):
                raise GossamerError(
                    f"{name} is {getattr(self, name)}, and {site.name} of shape {site.shape} has "
                    f"no more than rank {min(site.shape)}; give less"
                )
        return Masked(
            weight,
            site.name,
            rank=self.rank,
            score_rank=self.score_rank,
            scales=Scales(self.beta, self.alpha1, self.alpha2),
            generator=generator,
        )

    def refresh(self, adapter: Adapter, weight: Tensor, updates: int) -> bool:
        """Choose the mask anew at every ``every``-th update and at the last."""
        assert isinstance(adapter, Masked)
        if updates % self.every and updates != self.steps:
            return False
        adapter.choose(weight, self.pattern, self.schedule().at(updates).sparsity)
        return True

    def remarks(self, tuner: Tuner) -> tuple[str, ...]:
        """Which matrices the floor of one weight a group keeps from the full sparsity."""
        assert self.sparsity is not None
        floored = [
            name
            for name, site in tuner.sites.items()
            if (1.0 - self.sparsity) * (site.shape[1] if str(self.pattern) == "row" else site.size)
            < 0.5
        ]
        if not floored:
            return ()
        kept = quota(tuner.sites[floored[0]].shape, self.pattern, self.sparsity)[1].keep
        return (f"{len(floored)} matrices would be emptied; each group keeps {kept}",)
