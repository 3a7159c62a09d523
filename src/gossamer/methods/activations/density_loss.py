"""Density loss: fine-tune a few parameters and count, differentiably, how many units speak.

Added to the task's loss, the share of non-zero hidden activations falls while the frozen model is
adapted. Shapes: I = hidden units.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import ROLES, Card, GossamerError, Method, check_count, unknown
from gossamer.methods.activations.training.adapters import LowRank
from gossamer.methods.activations.training.fatrelu import FATReLU
from gossamer.methods.activations.training.hidden import (
    HiddenPenalty,
    activation_functions,
    measure_activity,
)
from gossamer.methods.activations.training.loop import Training, as_trainable, fit, take
from gossamer.methods.activations.training.trained import TrainedModel, as_data, keep_weights
from gossamer.models import Progress, SiteMap, find_sites

__all__ = ["DensityLoss", "soft_density"]

_MEASURED = 64


def soft_density(activation: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Mean over units of a² / (a² + ε): near 1 for a unit that speaks, 0 for a zero.

    Parameters
    ----------
    activation : (..., I) in fp32; in fp16, ε and small squares are 0.
    epsilon : above 0; the term is ½ at |a| = sqrt(ε).

    Returns
    -------
    (...), between 0 and 1.

    Source: arXiv 2402.01911, §3.
    """
    square = activation.square()
    return (square / (square + epsilon)).mean(-1)


@dataclass(frozen=True, kw_only=True)
class DensityLoss(Method):
    """Fine-tune low-rank updates on the task's loss plus the density of hidden activations.

    :meth:`term` gives the loss term alone, for any other training loop. ``apply`` freezes the
    model, trains rank-r updates of its matrices and its task head, and merges them. With weight 0
    this is plain low-rank fine-tuning, the baseline.

    Parameters
    ----------
    weight : of the density term; 0 leaves it out.
    epsilon : of the soft count, see :func:`soft_density`.
    roles : matrices that get low-rank updates: ``attention``, ``mlp``, or full role names.
    rank : of the updates.
    head : names of modules trained in full where the model has them.
    steps, lr, batch_size, seed : of the fine-tuning.
    tolerance : entries up to this size count as zero in the report; None: exact zeros behind
        ReLU, and sqrt(epsilon) behind functions that make none.

    Source: arXiv 2402.01911, §3.

    Departs from the paper: the vector that enters the down projection is counted, which for gated
    MLPs includes the up projection; padding is left out; adapters are low-rank updates of plain
    code; without its later variant that skips whole blocks (ADA).
    """

    card: ClassVar[Card] = Card(
        title="From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density "
        "in Transformers",
        year=2024,
        arxiv="2402.01911",
        system="density_loss",
        family="activations",
        when="during training",
        masks="dynamic",
        site="hidden activation that enters the down projection",
        score="a² / (a² + ε)",
        pattern="any hidden unit, per token",
        budget="emergent, by the weight of the term",
        schedule="constant",
        update="low-rank updates and the task head, merged",
        kernel="masked dense",
        departs="padding not counted; gated product counted; plain low-rank updates; no ADA",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 3, "batch_size": 3, "lr": 1e-2, "rank": 2}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the sparsity emerges in training and is no parameter",
        "exact sparsity": "the sparsity emerges in training and is no parameter",
        "sparsity range": "the sparsity emerges in training and is no parameter",
        "encoders": "training needs a model with a loss of its own, on data with labels",
    }

    weight: float = 1.0
    epsilon: float = 1e-7
    roles: tuple[str, ...] = ("attention", "mlp")
    rank: int = 8
    head: tuple[str, ...] = ("classifier", "score")
    steps: int = 200
    lr: float = 3e-4
    batch_size: int = 8
    seed: int = 0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("weight", 0.0), ("tolerance", 0.0)):
            value = getattr(self, name)
            if value is not None and (not isfinite(value) or value < least):
                raise GossamerError(f"{name} is {value!r}; give a number, at least 0")
        if not isfinite(self.epsilon) or self.epsilon <= 0:
            raise GossamerError(f"epsilon is {self.epsilon!r}; give a number above 0")
        check_count("rank", self.rank, 1)
        known = (*ROLES, *dict.fromkeys(role.partition(".")[0] for role in ROLES))
        for role in self.roles:
            if role not in known:
                raise unknown("role", role, known)
        self.plan()

    def plan(self) -> Training:
        """The training."""
        return Training(steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=self.seed)

    def term(self, model: nn.Module) -> HiddenPenalty:
        """The density of a transformers model's hidden units, for a training loop of one's own.

        Examples
        --------
        ::

            with DensityLoss().term(model) as density:
                for batch in batches:
                    loss = model(**batch).loss + weight * density()
        """
        return HiddenPenalty(model, lambda rows: soft_density(rows, self.epsilon))

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> TrainedModel:
        """Fine-tune the model in place.

        Parameters
        ----------
        model : a transformers model with a loss of its own, in float32.
        data : see :func:`gossamer.models.as_tokens`; ``Inputs`` with labels for classifiers.
        """
        as_trainable(model)
        samples = as_data(data, model)
        sites = find_sites(model)
        chosen = [site for site in sites.select(self.roles) if site.expert is None]
        head = dict(self._head(model))
        with ExitStack() as stack:
            touched = {site.name: site.weight(model) for site in chosen}
            stack.callback(keep_weights({**touched, **head}))
            adapters = LowRank(model, chosen, rank=self.rank, seed=self.seed)
            with ExitStack() as training:
                training.enter_context(adapters)
                density = training.enter_context(self.term(model)) if self.weight else None

                def term(step: int) -> Tensor | None:
                    return None if density is None else self.weight * density()

                losses = fit(
                    model,
                    samples,
                    self.plan(),
                    parameters=[*adapters.parameters(), *head.values()],
                    extra=term,
                    progress=progress,
                    what="density loss",
                )
            adapters.merge()
            few = take(samples, torch.arange(min(_MEASURED, len(samples))))
            tolerance = self._tolerance(model, sites)
            activity = measure_activity(model, few, tolerance=tolerance)
            share = sum(p.numel() for p in (*adapters.parameters(), *head.values()))
            notes = (
                f"shares are measured on the first {len(few)} samples of the training data",
                f"{share:,} parameters were trained, then merged into the weights",
            )
            return TrainedModel(
                self,
                model,
                stack.pop_all(),
                activity,
                tolerance=tolerance,
                losses=losses,
                notes=notes,
            )

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> TrainedModel:
        """Take a loaded model up again; its weights hold the merged updates."""
        activity = TrainedModel.activity_of(meta)
        return TrainedModel(self, model, ExitStack(), activity, tolerance=meta["tolerance"])

    def _head(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        for name, module in model.named_modules():
            if name in self.head:
                yield from ((f"{name}.{n}", p) for n, p in module.named_parameters())

    def _tolerance(self, model: nn.Module, sites: SiteMap) -> float:
        if self.tolerance is not None:
            return self.tolerance
        functions = activation_functions(model, sites).values()
        exact = all(isinstance(function, nn.ReLU | FATReLU) for function in functions)
        return 0.0 if exact else sqrt(self.epsilon)
