"""IMP: train, prune the smallest weights, rewind to an early update, and again.

What is left in the end, with the weights it had early on, is a ticket: a sparse network that
trains as well as the dense one, where random ones of its size do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isfinite, log
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Pattern, Unstructured
from gossamer.methods.training.base import Change, SparseTraining, Sparsifier, check_share
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.layers import Allocation, plain_module
from gossamer.methods.training.sparsifier.trained import copy_of
from gossamer.methods.training.tickets.rewinding import Rewinding, TicketTrained
from gossamer.methods.training.tickets.rounds import Attach, kept_as_it_was, train_rounds
from gossamer.models import Inputs, Progress, as_tokens
from gossamer.models.fit import fit, in_float32

__all__ = ["IMP"]


@dataclass(frozen=True, kw_only=True)
class IMP(SparseTraining):
    """Find a winning ticket by iterative magnitude pruning with rewinding.

    Rounds of: train to the end, remove ``prune`` of the surviving weights by magnitude, put
    weights, optimizer state, learning-rate schedule, random state and order of data back to where
    they were after ``rewind`` of the updates. After r rounds (1 - prune)^r of the weights are left;
    the last round removes what is missing to ``sparsity``. The sparsity therefore says how many
    rounds there are, and each costs a training: 16 trainings for 96 % at ``prune=0.2``.

    ``apply`` trains all rounds with AdamW; ``find_ticket`` of
    :mod:`gossamer.methods.training.tickets.rounds` does with any loop; ``attach`` does one round,
    for those who loop themselves: ``sparsifier.next_round()`` gives the ``state`` to attach the
    next one with.

    Parameters
    ----------
    prune : share of the surviving weights that a round removes, between 0 and 1.
    rewind : share of the updates to go back to; 0 goes back to the start (the original ticket),
        which fails for larger networks.
    pattern : ``"model"`` lets all layers compete, as in the papers; biases and norms are never
        pruned. skip : ``"2"`` or another name of the last layer leaves it dense.
    steps : optimizer updates of one training, the first.

    Source: arXiv 1803.03635, §2 and appendix (iterative pruning with resetting); rewinding:
    arXiv 1912.05671, §2, algorithm 2.

    Departs from the paper: the last round prunes less where the sparsity asks for it; a layer that
    would be emptied keeps a weight.
    """

    patterns: ClassVar[tuple[str, ...]] = ("model", "layer", "row", "block")
    keeper: ClassVar[type[Sparsifier]] = Rewinding
    takes_shards: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        title="The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        year=2018,
        arxiv="1803.03635",
        family="training",
        when="during training",
        start="dense to sparse",
        masks="dynamic",
        site="linear weight, convolution",
        score="|w| after training",
        pattern="unstructured, constant fan-in, block",
        budget="sparsity; one competition of all layers",
        schedule="rounds, each a training; a fixed share of the survivors goes",
        update="training anew from an early point (rewinding, arXiv 1912.05671)",
        kernel="masked dense",
        departs="the last round stops at the sparsity; no layer is emptied",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 3, "prune": 0.5, "rewind": 0.4}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    pattern: Pattern = Unstructured(per="model")
    allocation: Allocation = "uniform"
    prune: float = 0.2
    rewind: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("prune", self.prune)
        if not 0.0 < self.prune < 1.0:
            raise GossamerError(
                f"prune is {self.prune!r}; a round removes a share of the survivors, 0 < prune < 1"
            )
        late = not isinstance(self.rewind, int | float) or not isfinite(self.rewind)
        if late or self.rewind < 0:
            raise GossamerError(f"rewind is {self.rewind!r}; it is a share, 0 <= rewind < 1")
        if self.rewind_step >= self.steps:
            raise GossamerError(
                f"rewind {self.rewind:g} goes back to update {self.rewind_step} of {self.steps}, "
                "which leaves nothing to train; give a smaller share, 0 <= rewind < 1"
            )

    @property
    def rewind_step(self) -> int:
        """Update whose result every round begins with."""
        return round(self.rewind * self.steps)

    @property
    def rounds(self) -> int:
        """How often is pruned; there is one training more."""
        return ceil(log(1.0 - self.final_sparsity) / log(1.0 - self.prune) - 1e-9)

    def sparsity_of(self, number: int) -> float:
        """Sparsity of a round's masks; round 0 is dense."""
        return min(1.0 - (1.0 - self.prune) ** number, self.final_sparsity)

    @property
    def initial_sparsity(self) -> float:
        return 0.0

    def sparsity_at(self, update: int) -> float:
        """Sparsity after so many updates, counted through all rounds."""
        later = (update - self.steps) // (self.steps - self.rewind_step) + 1
        return self.sparsity_of(min(max(later, 0), self.rounds))

    def change(self, update: int) -> Change | None:
        """Nothing within a round."""
        return None

    def attach(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        undo: bool = False,
        masters: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        loss: StartLoss | None = None,
        scheduler: Any = None,
    ) -> Rewinding:
        """One round: dense without a state, else what ``next_round`` or ``state_dict`` said.

        Parameters
        ----------
        state : of ``next_round()``, which rewinds, or of ``state_dict()`` in the middle of a round,
            which goes on with the weights the model has.
        scheduler : torch's learning-rate scheduler, rewound with the rest; a loop that sets rates
            itself goes on with those of update ``sparsifier.updates``.
        """
        before = copy_of(plain_module(model)) if undo else None
        return Rewinding(
            self,
            model,
            optimizer,
            before=before,
            masters=masters,
            state=state,
            loss=loss,
            scheduler=scheduler,
        )

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        undo: bool = True,
        progress: Progress | None = None,
        folder: str | Path | None = None,
    ) -> TicketTrained:
        """Train all rounds in place, with AdamW.

        Parameters
        ----------
        model : with a loss of its own. Weights in half precision are trained in float32.
        data : training text or tokens, see :func:`gossamer.models.as_tokens`, or ``Inputs``.
        undo : keep a copy of the weights so that ``restore`` works.
        folder : where the state between rounds lies; called again with it, goes on with the round
            that was interrupted. None keeps nothing.

        Raises
        ------
        GossamerError
            If the data cannot be used or training diverges; the model is then as it was.
        """
        samples = data if isinstance(data, Inputs) else as_tokens(data, model)
        each = self.steps - self.rewind_step
        whole = self.steps + self.rounds * each
        losses: list[float] = []

        def train(net: nn.Module, attach: Attach) -> float:
            done = attach.round and self.steps + (attach.round - 1) * each - attach.start

            def shown(step: int, _: int, what: str) -> None:
                if progress is not None:
                    progress(done + step, whole, what)

            found = fit(
                net,
                samples,
                self.plan(),
                done=attach.start,
                watch=lambda optimizer: attach(net, optimizer).step,
                progress=shown,
                what=f"{self.key()} round {attach.round} of {self.rounds}",
            )
            losses.extend(found)
            last = found[-max(1, self.steps // 10) :]
            return sum(last) / len(last)

        with kept_as_it_was(model) as before, in_float32(model):
            work = train_rounds(self, model, train, before if undo else None, folder)
        work.losses = tuple(losses)
        return work
