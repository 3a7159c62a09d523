"""Is a ticket more than a number of weights per layer, or more than a mask?

A ticket whose masks train as well after shuffling them within layers knows layer shares and no
weights; one that trains as well from weights drawn anew has no need of rewinding.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gossamer.methods.training.at_start.sanity import shuffled
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier
from gossamer.methods.training.tickets.rewinding import TicketTrained

if TYPE_CHECKING:
    from gossamer.methods.training.imp import IMP

__all__ = ["CHECKS", "ticket_checks"]

CHECKS = ("found", "shuffled", "drawn anew")


def ticket_checks(
    work: TicketTrained,
    build: Callable[[int], nn.Module],
    run: Callable[[nn.Module, Callable[[nn.Module, Any], Sparsifier]], float],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Train a ticket as found, with masks shuffled within layers, and from weights drawn anew.

    Parameters
    ----------
    work : what ``find_ticket`` or ``apply`` gave, not loaded from a file.
    build : seed to an untrained network. run : trains a network under what the function it is
        given attaches to it and an optimizer, from update ``sparsifier.updates`` on, and returns a
        figure, such as the accuracy.

    Returns
    -------
    The figure for each of :data:`CHECKS`. The first two go on from the point of rewinding, the
    third trains from the start.
    """
    method: IMP = work.method  # type: ignore[assignment]
    ticket = work.ticket
    assert ticket is not None, "a loaded ticket has no point to rewind to"
    looked = build(seed)
    sparsifier = method.attach(
        looked, torch.optim.SGD(looked.parameters(), lr=0.1), state=ticket_from(ticket)
    )
    moved = {**ticket, "masks": shuffled(sparsifier, seed)}
    sparsifier.remove()

    def under(state: dict[str, Any]) -> Callable[[nn.Module, Any], Sparsifier]:
        return lambda net, optimizer: method.attach(net, optimizer, state=state)

    return {
        "found": run(build(seed), under(ticket)),
        "shuffled": run(build(seed), under(moved)),
        "drawn anew": run(build(seed + 1_000_003), under(ticket_from(ticket))),
    }


def ticket_from(ticket: dict[str, Any]) -> dict[str, Any]:
    """The masks of a ticket for the weights that a model has, to be trained from the start."""
    return {**ticket, "updates": 0, "rewinds": False}
