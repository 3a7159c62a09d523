"""Rewinding: one training of many that begin at the same point, each under a sparser mask."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.core.saved import taking
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.decide import prune_to
from gossamer.methods.training.sparsifier.saving import check_state
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier
from gossamer.methods.training.sparsifier.trained import SparselyTrained
from gossamer.methods.training.tickets.point import Point

if TYPE_CHECKING:
    from gossamer.methods.training.imp import IMP

__all__ = ["Rewinding", "TicketTrained"]


class TicketTrained(SparselyTrained):
    """A trained ticket.

    Attributes
    ----------
    ticket : what ``method.attach(model, optimizer, state=ticket)`` takes to train it once more:
        the masks and the point every round began at; None after loading.
    rounds : what was noted of every training.
    """

    ticket: dict[str, Any] | None = None
    rounds: tuple[dict[str, float], ...] = ()


class Rewinding(Sparsifier):
    """Keeps the masks of one round, remembers the point to rewind to, and prunes at the end.

    Attributes
    ----------
    round : 0 is the dense training. updates : done in this round, those before the point included:
        a loop goes on with batch number ``updates``.
    point : what is rewound to; None before its update.
    """

    result: ClassVar[type[SparselyTrained]] = TicketTrained
    own_state: ClassVar[Mapping[str, type]] = {"round": int, "warnings": list, "rewinds": bool}

    def __init__(
        self,
        method: "IMP",
        model: nn.Module,
        optimizer: Any,
        *,
        before: Mapping[str, Tensor] | None = None,
        masters: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        loss: StartLoss | None = None,
        scheduler: Any = None,
    ) -> None:
        self.round = 0
        self.point: Point | None = None
        self.scheduler = scheduler
        self._masters = dict(masters or {})
        self._rewinds = False
        super().__init__(
            method, model, optimizer, before=before, masters=masters, state=state, loss=loss
        )
        if self.sharded:
            self.remove()
            raise GossamerError(
                f"{method.key()} rewinds whole weights, these are sharded over processes (FSDP); "
                "replicate the model with DistributedDataParallel"
            )
        self._remember()

    @property
    def _imp(self) -> "IMP":
        return cast("IMP", self.method)

    # -- one update -------------------------------------------------------------------------

    def _remember(self) -> None:
        if self.point is None and self.updates == self._imp.rewind_step:
            self.point = Point.of(self.model, self._masters)

    def _before_update(self, *args: Any) -> None:
        super()._before_update(*args)
        if self.point is not None and not self.point.optimizer:
            self.point.complete(self.optimizer, self.scheduler)

    def step(self) -> bool:
        """Hold the masks after an update; remember the point if this is its update."""
        changed = super().step()
        self._remember()
        return changed

    # -- from round to round ----------------------------------------------------------------

    @torch.no_grad()
    def next_round(self) -> dict[str, Any]:
        """End the round: prune by magnitude, and say how the next one begins.

        Returns
        -------
        ``attach(model, optimizer, state=...)`` with it rewinds model, optimizer, schedule and
        random state, and masks them. The hooks are off; the weights are the round's until then.

        Raises
        ------
        GossamerError
            If the round was not trained to its end, or was the last.
        """
        if self._stepped:
            self.step()
        if self.updates != self.method.steps:
            raise GossamerError(
                f"round {self.round} was trained for {self.updates} of {self.method.steps} "
                "updates; train from sparsifier.updates to method.steps in every round"
            )
        if self.round == self._imp.rounds:
            raise GossamerError(f"round {self.round} is the last; call finish()")
        assert self.point is not None
        masks, self.quotas = prune_to(
            self.method,
            self.layers,
            self.held,
            self._removed,
            self._imp.sparsity_of(self.round + 1),
        )
        self._note_floors()
        self._set(masks)
        self.remove()
        self.round += 1
        return self._begins()

    def _begins(self) -> dict[str, Any]:
        """The state with which this round begins."""
        return {**self.state_dict(), "updates": self._imp.rewind_step, "rewinds": True}

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Sparsifier.state_dict`, with the round and the point."""
        point = self.point and {f.name: getattr(self.point, f.name) for f in fields(self.point)}
        return {
            **super().state_dict(),
            "round": self.round,
            "point": point,
            "warnings": list(self.warnings),
            "rewinds": False,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the middle of a round, or begin the next where :meth:`next_round` says so."""
        check_state(state, self.method, self.held, self.own_state)
        self.round = int(state["round"])
        with taking():
            self.point = Point(**state["point"]) if state["point"] else None
        self.warnings = list(state["warnings"])
        self._rewinds = bool(state["rewinds"])
        super().load_state_dict(state)
        if self.method.pattern.fixed_sparsity is None and str(self.method.pattern) != "model":
            self.quotas = self.method.quotas(self.layers, self._imp.sparsity_of(self.round))

    def _take(self, removed: Mapping[str, Tensor]) -> None:
        if self._rewinds:
            if self.point is None:
                raise GossamerError(
                    "the state has no point to rewind to; pass that of next_round()"
                )
            self.point.rewind(self.model, self.optimizer, self.scheduler, self._masters)
        super()._take(removed)

    # -- reading ----------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes held beside the model and the optimizer, by purpose."""
        return {
            **super().memory(),
            "the point to rewind to": self.point.size() if self.point else 0,
        }

    def _remarks(self) -> tuple[str, ...]:
        imp, flops = self._imp, self.flops
        dense = 3.0 * flops.forward(flops.sizes) * imp.steps
        return (
            f"{self.round + 1} trainings, each after the first rewound to update "
            f"{imp.rewind_step} of {imp.steps}, took {flops.total / dense:.2f} times the "
            "operations of one dense training",
        )

    def finish(self) -> TicketTrained:
        """End the last training; the ticket is kept beside what was trained."""
        if self._stepped:
            self.step()
        if self.round < self._imp.rounds:
            self.warnings.append(
                f"ended after round {self.round} of {self._imp.rounds}: the sparsity is "
                f"{self.sparsity:.4f}; see next_round, or find_ticket, which trains all rounds"
            )
        ticket = self._begins() if self.point is not None else None
        work = cast(TicketTrained, super().finish())
        work.ticket = ticket
        return work
