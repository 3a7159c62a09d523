"""A selector: what chooses the keys each query reads."""

from abc import ABC, abstractmethod
from typing import ClassVar

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.models import State

__all__ = ["Selector"]


class Selector(ABC):
    """Chooses the keys each query reads. Shared by all layers and sequences; holds no state.

    Attributes
    ----------
    stateful : calls carry ``state``, ``step``, ``cache`` and ``hidden``.
    observes : :meth:`observe` is called where attention stays full, to keep the state current.
    evicts : the cache gives up keys: memory is saved too.
    """

    stateful: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    evicts: ClassVar[bool] = False

    @abstractmethod
    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        """The kept pairs of one call.

        Parameters
        ----------
        call : queries, keys and values of the layer. layout : where they stand.
        layer : index of the layer.
        """

    def observe(self, call: Call, layout: Layout, layer: int) -> None:  # noqa: B027
        """See a call that stays full: a prompt that precedes sparse decoding, a dense layer."""

    def after(self, call: Call, layout: Layout, layer: int) -> None:  # noqa: B027
        """See a call, full or not, once its attention is done: the place to shrink its cache."""

    def owns(self, call: Call, layer: int) -> bool:
        """Whether only the selector can run a call, whatever its phase: its cache gave up keys."""
        return False

    def weighable(self, call: Call, layout: Layout, layer: int) -> bool:
        """Whether full attention may run a call instead, where it is faster.

        Not where the cache gave up keys, or is to give up what this call does not choose.
        """
        return True

    def holds(self, length: int, layer: int) -> tuple[int, ...] | None:
        """Keys each key-value head still holds of a text, just after an eviction.

        None where that depends on the input, or where nothing is given up.
        """
        return None

    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int] | None:
        """Pairs kept, and pairs the layer itself reads, for one sequence of a length.

        None where that depends on the input; the report then shows what was measured.

        Parameters
        ----------
        own : the layer's own sliding window, or None.
        """
        return None

    def simulated(self, backend: str, length: int) -> bool:
        """Whether a prompt of ``length`` tokens would run under a dense mask."""
        return True

    @abstractmethod
    def state(self) -> State:
        """What :meth:`AttentionMethod.replan` needs."""

    def notes(self) -> tuple[str, ...]:
        """Facts for the report, in sentences."""
        return ()
