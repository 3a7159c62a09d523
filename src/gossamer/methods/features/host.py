"""HostPass: one forward pass of the model serves every source that reads from it.

Sources that share a pass ask for the same windows in the same order. The first to ask runs the
model up to the last module that any of them reads; the others find their activations waiting.
"""

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from gossamer.methods.features.hooks import record
from gossamer.models import Inputs, Tokens

__all__ = ["HostPass"]


Ticket = tuple[Any, ...]
"""The group of some windows, then rising numbers that say which."""


class _Waiting:
    """Activations of some windows, and who has not fetched them yet."""

    def __init__(self, found: dict[str, Tensor], sources: set[int]) -> None:
        self.found, self.sources = found, sources


class HostPass:
    """Forward passes of a model over windows, recorded for all sources at once.

    Parameters
    ----------
    model : a transformers model. data : the windows.

    Attributes
    ----------
    runs : forward passes so far.
    """

    def __init__(self, model: nn.Module, data: Any) -> None:
        self.model, self.data = model, data
        self.runs = 0
        self._paths: dict[int, tuple[str, ...]] = {}
        self._groups: dict[Hashable, set[int]] = {}
        self._waiting: dict[Ticket, _Waiting] = {}

    def join(self, paths: tuple[str, ...]) -> int:
        """A number for a source that reads these paths."""
        number = len(self._paths)
        self._paths[number] = paths
        return number

    def announce(self, source: int, group: Hashable) -> None:
        """Say that a source will ask for the windows of a group of tickets."""
        self._groups.setdefault(group, set()).add(source)

    def leave(self, source: int, group: Hashable) -> None:
        """Say that a source asks for no more windows of a group."""
        self._groups.get(group, set()).discard(source)
        for ticket, waiting in list(self._waiting.items()):
            if ticket[0] == group:
                self._drop(ticket, waiting, source)

    def _drop(self, ticket: Ticket, waiting: _Waiting, source: int) -> None:
        waiting.sources.discard(source)
        if not waiting.sources:
            self._waiting.pop(ticket, None)

    def batch(self, at: Tensor) -> dict[str, Any]:
        """Keyword arguments of the model for the windows at these places."""
        device = next(self.model.parameters()).device
        data = self.data
        if isinstance(data, Inputs):
            chosen = Inputs({name: value[at] for name, value in data.values.items()})
            return next(chosen.batches(len(at), device))
        if isinstance(data, Tokens):
            chosen = Tokens(data.input_ids[at], data.attention_mask[at])
            return next(chosen.batches(len(at), device))
        return data.batch(at, self.model, device)

    def fetch(self, source: int, ticket: Ticket, at: Tensor) -> dict[str, Tensor]:
        """Activations by path of the windows at these places.

        Parameters
        ----------
        ticket : which windows these are, in the words of all who share them.
        """
        for older in [t for t in self._waiting if t[0] == ticket[0] and t[1:] < ticket[1:]]:
            # Tickets of a group rise; whoever asks for a later one is past these.
            self._drop(older, self._waiting[older], source)
        waiting = self._waiting.get(ticket)
        if waiting is None:
            sources = self._groups.get(ticket[0], set()) | {source}
            paths = tuple(dict.fromkeys(p for s in sorted(sources) for p in self._paths[s]))
            found = record(self.model, paths, self.batch(at))
            self.runs += 1
            waiting = _Waiting(found, set(sources))
            self._waiting[ticket] = waiting
        self._drop(ticket, waiting, source)
        return {path: waiting.found[path] for path in self._paths[source]}
