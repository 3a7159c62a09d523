"""Sparse model soups: prune, retrain several copies under one mask, average them, prune on.

Averaging the weights of copies with equal zeros keeps the zeros, costs nothing at inference, and
generalises better than each copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, Pattern, Unstructured, check_count, unknown
from gossamer.methods.weights.base import Allocation, OneShot, PrunedModel
from gossamer.methods.weights.retrain.batchnorm import recompute_batchnorm
from gossamer.methods.weights.retrain.cook import Cooked, Rule, cook, phases_of
from gossamer.methods.weights.retrain.loop import Plan, finetune
from gossamer.methods.weights.retrain.masks import parameter_masks
from gossamer.methods.weights.retrain.start import Successor, reattach_masks, starting
from gossamer.methods.weights.retrain.states import copy_of, put_back
from gossamer.models import Inputs, Progress, Tokens, as_tokens
from gossamer.models.fit import in_float32
from gossamer.models.loss import window_losses

__all__ = ["SparseSoups"]

Vary = Literal["order", "lr", "weight_decay"]


@dataclass(frozen=True, kw_only=True)
class SparseSoups(Method):
    """Prune in phases; in each, retrain copies that differ in one factor and go on from their mean.

    Parameters
    ----------
    sparsity : share of the prunable weights removed in the end; None takes the pattern's, or 0.5.
    pattern : of the masks; ``"model"`` lets all layers compete, as iterative magnitude pruning
        does. A pattern that fixes the sparsity, such as ``"2:4"``, holds in every phase.
    base : the method that makes the masks, by key.
    phases : prune-retrain-average cycles; each removes the same share of what is left.
    copies : retrained in every phase, at least 2.
    vary : the one factor that differs among them: the data's ``order``, ``lr``, or
        ``weight_decay``. The latter two go from half to twice their value, evenly in the logarithm.
    soup : ``uniform`` averages all copies; ``greedy`` those that lower the loss on validation
        data, so it is never worse there than the best copy.
    steps : optimizer updates of every copy in every phase.
    lr, weight_decay, batch_size : of AdamW; the rate restarts in every phase and falls to zero.
    validation : share of the windows that is not trained on, 0 < validation < 1; it gives the
        losses in the report, and what ``greedy`` chooses by.
    seed : of the first copy's order; copy i uses seed + i where the order varies.
    """

    card: ClassVar = Card(
        title="Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging",
        year=2023,
        arxiv="2306.16788",
        system="sparse_soups",
        family="weights",
        when="after training",
        site="linear weight",
        score="|w|, or that of any pruning method",
        pattern="unstructured, N:M, block, channels",
        budget="sparsity; any allocation of the base",
        schedule="phases of equal relative pruning, each retrained",
        update="retraining under the mask; the mean of the copies",
        departs="language models are retrained with AdamW on their own loss, the paper trains "
        "classifiers with SGD; the peak rate of every phase is the same, not adapted to how much "
        "the phase removed",
    )
    example: ClassVar = {"phases": 1, "copies": 2, "steps": 1, "batch_size": 2}
    exempt: ClassVar = {
        "dense at sparsity 0": "retraining changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to retrain on",
    }

    sparsity: float | None = None
    pattern: Pattern = Unstructured(per="model")
    allocation: Allocation = "uniform"
    base: str = "magnitude"
    phases: int = 3
    copies: int = 3
    vary: Vary = "order"
    soup: Rule = "uniform"
    steps: int = 100
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 8
    validation: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = self.pattern.fixed_sparsity
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.5 if fixed is None else fixed)
        check_count("phases", self.phases, 1)
        check_count("copies", self.copies, 2)
        check_count("steps", self.steps, 1)
        for name, kind in (("vary", Vary), ("soup", Rule)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        if self.vary == "weight_decay" and not self.weight_decay:
            raise GossamerError("weight_decay is 0, so it cannot vary; give a value above 0")
        if not isinstance(self.validation, int | float) or not 0 < self.validation < 1:
            raise GossamerError(
                f"validation is {self.validation!r}; it is a share of the windows, above 0, below 1"
            )
        for index in range(self.copies):
            self.plan(index)
        for share in self.schedule:
            self._start(share)

    @property
    def schedule(self) -> list[float]:
        """Sparsity of every phase."""
        assert self.sparsity is not None
        if self.pattern.fixed_sparsity is not None:
            return [self.sparsity] * self.phases
        return phases_of(self.sparsity, self.phases)

    def _start(self, sparsity: float) -> OneShot:
        seeded = None if "seed=" in self.base else self.seed
        return starting(self.base, sparsity, self.pattern, self.allocation, seeded)

    def plan(self, copy: int) -> Plan:
        """How one copy is retrained."""
        place = 2 * copy / (self.copies - 1) - 1
        values = {"lr": self.lr, "weight_decay": self.weight_decay, "seed": self.seed}
        if self.vary == "order":
            values["seed"] = self.seed + copy
        else:
            values[self.vary] = getattr(self, self.vary) * 2.0**place
        return Plan(steps=self.steps, batch_size=self.batch_size, **values)  # type: ignore[arg-type]

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        undo: bool = True,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Successor:
        """Cook the soup in place.

        Parameters
        ----------
        data : training text or tokens, see :func:`gossamer.models.as_tokens`, or ``Inputs`` with
            labels; the last windows validate.
        undo : keep a copy of the dense weights so that ``restore`` works.
        batch_size : windows run at once while measuring.

        Raises
        ------
        GossamerError
            If the data has fewer than two windows, a layer cannot take the pattern, or training
            diverges; the model is then as it was.
        """
        tokens = data if isinstance(data, Inputs) else as_tokens(data, model)
        train, held = self._split(tokens)
        before = copy_of(model)
        try:
            with in_float32(model):
                work, cooked = self._cycles(model, train, held, batch_size, progress)
        except BaseException:
            put_back(model, before)
            raise
        notes = [self._sentence(i, share, c) for i, (share, c) in enumerate(cooked)]
        facts = {"phases": [_plain(share, c) for share, c in cooked]}
        return Successor(self, work, before=before if undo else None, notes=notes, facts=facts)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Successor:
        """Take up the stored masks of a loaded model; its weights are the soup."""
        work = reattach_masks(model, meta, tensors)
        return Successor(self, work, notes=meta["notes"], facts=meta["facts"])

    def _split(self, tokens: Tokens | Inputs) -> tuple[Any, Any]:
        count = len(tokens)
        held = max(1, round(self.validation * count))
        if count - held < 1:
            raise GossamerError(
                f"the data has {count} window; soups need at least 2, one of them to validate on"
            )
        if isinstance(tokens, Tokens):
            return tokens.slice(count - held), tokens.slice(count - held, count)
        parts = (slice(0, count - held), slice(count - held, count))
        train, last = (Inputs({k: v[p] for k, v in tokens.values.items()}) for p in parts)
        return train, last

    def _cycles(
        self, model: nn.Module, train: Any, held: Any, batch_size: int, progress: Progress | None
    ) -> tuple[PrunedModel, list[tuple[float, Cooked]]]:
        cooked: list[tuple[float, Cooked]] = []
        works: list[PrunedModel] = []
        for phase, share in enumerate(self.schedule):
            work = self._start(share).apply(model, train, undo=False, batch_size=batch_size)
            work.forget()
            if works:
                _check_nested(works[-1], work)
            masks = parameter_masks(work)
            works.append(work)

            def retrain(copy: int, phase: int = phase, masks: Any = masks) -> None:
                what = f"phase {phase + 1} of {self.phases}, copy {copy + 1} of {self.copies}"
                finetune(model, train, masks, self.plan(copy), progress=progress, what=what)

            found = cook(
                model,
                masks,
                self.copies,
                retrain,
                lambda: -window_losses(model, held, batch_size=batch_size).mean,
                rule=self.soup,
                refresh=lambda: recompute_batchnorm(model, train, batch_size=max(2, batch_size)),
            )
            cooked.append((share, found))
        return works[-1], cooked

    def _sentence(self, phase: int, share: float, cooked: Cooked) -> str:
        lowest, highest = -max(cooked.members), -min(cooked.members)
        return (
            f"phase {phase + 1} of {self.phases} at {share:.1%}: validation loss of the copies "
            f"{lowest:.4f} to {highest:.4f}, of the soup of {len(cooked.chosen)} {-cooked.soup:.4f}"
        )


def _check_nested(past: PrunedModel, work: PrunedModel) -> None:
    """Weights removed in one phase are zero; a mask that keeps them would train them back."""
    for name in work.masks:
        back = int((work.selection(name).mask() & ~past.selection(name).mask()).sum())
        if back:
            raise GossamerError(
                f"{name}: the next phase keeps {back:,} weights that the last one removed; "
                "use a base whose score of a zero weight is lowest, or phases=1"
            )


def _plain(share: float, cooked: Cooked) -> dict[str, Any]:
    def figure(value: float) -> float | None:
        return -value if isfinite(value) else None

    return {
        "sparsity": share,
        "members": [figure(v) for v in cooked.members],
        "soup": figure(cooked.soup),
        "chosen": list(cooked.chosen),
    }
