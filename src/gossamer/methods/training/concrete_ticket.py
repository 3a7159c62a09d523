"""Concrete Ticket Search: learn before training which weights to keep, then train those.

Every weight gets a logit; noisy masks between 0 and 1 drawn from the logits stand before the frozen
weights, and Adam makes the masked network do what the dense one does.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, unknown
from gossamer.methods.training.at_start.scored import AtStart, untouched
from gossamer.methods.training.base import SparselyTrained, Sparsifier, StartLoss
from gossamer.methods.training.sparsifier.layers import Layer, plain_module
from gossamer.methods.training.sparsifier.trained import copy_of
from gossamer.methods.training.tickets.balance import Balance
from gossamer.methods.training.tickets.looking import SearchData
from gossamer.methods.training.tickets.objectives import Objectives
from gossamer.methods.training.tickets.rounds import kept_as_it_was
from gossamer.methods.training.tickets.search import Found, Plan, concrete_search
from gossamer.methods.training.tickets.searched import Searched
from gossamer.models import Inputs, Progress, Tokens, as_tokens
from gossamer.models.fit import FitPlan, batches, fit, in_float32, meeting

__all__ = ["ConcreteTicket"]


@dataclass(frozen=True, kw_only=True)
class ConcreteTicket(AtStart):
    """Find a ticket by optimising a Concrete relaxation of its masks, then train it.

    Logits α, at first log(κ / (1 - κ)) for a density κ, draw masks m = σ((α + log u - log(1 - u)) /
    (2/3)) anew at every step; the network computes with m ⊙ θ in evaluation mode, θ frozen. Adam
    lowers 100 times the objective plus GradBalance's pull towards 1.1 times the budget, its rate a
    tenth over the last 12 % of the steps. The largest logits, exactly as many as the sparsity
    leaves, are the ticket.

    ``attach(model, optimizer, data=batches)`` searches on batches of a loop's own, see
    :class:`~gossamer.methods.training.tickets.looking.SearchData`; objectives ``kl`` and
    ``features`` need no labels. ``apply`` searches on the first batches of the training, or on
    ``search_data``.

    Parameters
    ----------
    objective : ``kl`` the divergence of the masked network's outputs from the dense one's (reverse,
        the masked one first); ``task`` its loss; ``ratio`` that loss over the dense one, less 1;
        ``norm`` the negative norm of its gradient; ``features`` the squared difference of
        standardised outputs of every layer; ``gradients`` that of every layer's gradient.
    search : length of the search as a share of the training's updates, 0 < search <= 1; the paper
        takes 0.125, 0.5 and 1.
    search_lr : Adam's on the logits. The paper takes the training's, SGD's 0.1; ``lr`` here is
        AdamW's, which is of another scale.
    balance : ``gradbalance``, ``lagrange`` (the multiplier climbs by gradient ascent), or ``none``.
    rewind : share of the updates ``apply`` trains densely before the search, which then starts from
        those weights; 0 searches the untrained network.

    Source: arXiv 2512.07142, algorithm 1; GradBalance; objectives.

    Departs from the paper: updates in place of epochs; features are outputs of the masked layers,
    not of activation functions; 100 scales every objective, which only ``lagrange`` feels; under
    other patterns than ``model`` the search still lets all layers compete; processes of a
    distributed training search alone, and rank 0's masks are taken.
    """

    keeper: ClassVar[type[Sparsifier]] = Searched
    starts_from: ClassVar = "data"
    card: ClassVar[Card] = Card(
        title="Winning the Lottery by Preserving Network Training Dynamics with Concrete Ticket "
        "Search",
        year=2025,
        arxiv="2512.07142",
        system="concrete_ticket",
        family="training",
        when="before training",
        start="sparse to sparse",
        masks="static",
        site="linear weight, convolution",
        score="learned logits of binary Concrete masks",
        pattern="unstructured, constant fan-in, N:M, block",
        budget="sparsity; GradBalance, then one competition of all layers",
        schedule="a search before the first update, or after a few dense ones",
        update="training under the mask",
        kernel="masked dense",
        departs="features of the masked layers; one scale of all objectives; updates, not epochs",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 4, "batch_size": 3, "search": 0.5}

    objective: Objectives = "kl"
    search: float = 0.5
    search_lr: float = 0.1
    balance: Balance = "gradbalance"
    rewind: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("objective", Objectives), ("balance", Balance)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        self._positive("search_lr", "a number above 0")
        self._positive("search", "a share of the training's updates, 0 < search <= 1")
        if self.search > 1.0:
            raise GossamerError(
                f"search is {self.search:g}; it is a share of the training's updates, "
                "0 < search <= 1"
            )
        if not isinstance(self.rewind, int | float) or not 0.0 <= self.rewind < 1.0:
            raise GossamerError(f"rewind is {self.rewind!r}; it is a share, 0 <= rewind < 1")
        if self.rewind_step >= self.steps:
            raise GossamerError(
                f"rewind {self.rewind:g} searches after update {self.rewind_step} of {self.steps}, "
                "which leaves nothing to train; give a smaller share"
            )

    def _positive(self, name: str, cure: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or not isfinite(value) or value <= 0:
            raise GossamerError(f"{name} is {value!r}; give {cure}")

    @property
    def rewind_step(self) -> int:
        """Dense updates before the search, in ``apply``."""
        return round(self.rewind * self.steps)

    @property
    def search_steps(self) -> int:
        """Steps of the search."""
        return max(1, round(self.search * self.steps))

    # -- searching --------------------------------------------------------------------------

    def search_masks(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> Found | None:
        """Search; None where nothing is to be removed.

        Raises
        ------
        GossamerError
            If there are no batches to search on.
        """
        if self.final_sparsity == 0.0:
            return None
        if not isinstance(loss, SearchData):
            raise GossamerError(
                f"{self.key()} searches on batches; attach with data=, a list or a loader of them"
            )
        plan = Plan(
            self.final_sparsity,
            self.search_steps,
            self.objective,
            self.balance,
            self.search_lr,
            self.seed,
        )
        with untouched(model), torch.enable_grad():
            return concrete_search(model, layers, loss, plan)

    def ranked(
        self, found: Found | None, layers: tuple[Layer, ...], model: nn.Module
    ) -> dict[str, Tensor]:
        """The logits as scores, negative if inverted; zeros where no search was needed."""
        if found is None:
            return {
                layer.name: torch.zeros_like(layer.view(model.get_parameter(layer.parameter)))
                for layer in layers
            }
        return {n: -logits if self.invert else logits for n, logits in found.logits.items()}

    def scores(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> dict[str, Tensor]:
        """The logits of a search."""
        return self.ranked(self.search_masks(model, layers, loss), layers, model)

    def first_loss(self, samples: Tokens | Inputs) -> StartLoss | None:
        """The batches of the training, in its order."""
        return SearchData(_InOrder(samples, self.plan()))

    # -- at work ----------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        undo: bool = False,
        masters: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        loss: StartLoss | None = None,
        data: Iterable[Any] | SearchData | None = None,
    ) -> Sparsifier:
        """Search on the weights the model has, then keep the masks: see ``SparseTraining.attach``.

        Parameters
        ----------
        data : batches to search on, or :class:`SearchData` for a loss of one's own. loss : the same
            under the name other methods before training have for it.
        state : goes on without another search.
        """
        if data is not None:
            loss = data if isinstance(data, SearchData) else SearchData(data)
        before = copy_of(plain_module(model)) if undo else None
        return Searched(
            self, model, optimizer, before=before, masters=masters, state=state, loss=loss
        )

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        undo: bool = True,
        progress: Progress | None = None,
        search_data: Any = None,
    ) -> SparselyTrained:
        """Search, then train sparsely in place with AdamW.

        Parameters
        ----------
        model : with a loss of its own. Weights in half precision are trained in float32.
        data : training text or tokens, see :func:`gossamer.models.as_tokens`, or ``Inputs``.
        undo : keep a copy of the weights so that ``restore`` works.
        search_data : the same for the search, where it is not to see the training's first batches;
            without labels for objectives ``kl`` and ``features``.

        Raises
        ------
        GossamerError
            If the data cannot be used or training diverges; the model is then as it was.
        """
        samples = _read(data, model)
        looked = samples if search_data is None else _read(search_data, model)
        seen = _Samples(_InOrder(looked, self.plan()), progress=progress)
        made: list[Searched] = []

        def watch(optimizer: Any) -> Any:
            kept = before if undo else None
            done = 0

            def begin() -> None:
                made.append(Searched(self, model, optimizer, before=kept, loss=seen))
                made[0].begin_at(self.rewind_step)

            def after() -> None:
                nonlocal done
                done += 1
                if made:
                    made[0].step()
                elif done == self.rewind_step:
                    begin()

            if self.rewind_step == 0:
                begin()
            return after

        with kept_as_it_was(model, made) as before, in_float32(model):
            losses = fit(
                model, samples, self.plan(), watch=watch, progress=progress, what=self.key()
            )
            work = made[0].finish()
        work.losses = losses
        return work


def _read(data: Any, model: nn.Module) -> Tokens | Inputs:
    return data if isinstance(data, Inputs) else as_tokens(data, model)


class _Samples(SearchData):
    """Samples of a training, which may not fit the model."""

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        with meeting(model, batch, "a batch"):
            return super().logits(model, batch)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with meeting(model, batch, "a batch"):
            return super().loss(model, batch)


class _InOrder:
    """Batches in the order a training takes them, as often as wanted."""

    def __init__(self, samples: Tokens | Inputs, plan: FitPlan) -> None:
        self.samples = samples
        self.plan = plan

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return batches(self.samples, self.plan)
