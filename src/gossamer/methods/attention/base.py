"""The protocol of sparse attention at inference.

A method plans a *selector*; at every attention call of every layer the selector looks at the
call and returns a *key index*: which keys each query reads. An *executor* runs the index. The
three know nothing of each other's insides, so any selector meets any executor that can run its
index. A selector that scores keys is an estimate, cut by a budget, at a unit (token, page,
block); one that goes by position, such as a window, needs neither.

State belongs to the call's cache, not to the selector: selectors are shared by all layers and
sequences, and beam search reorders caches behind their back.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor, nn

from gossamer.core import GossamerError, Method, unknown
from gossamer.methods.attention.applied import Selector, SparseAttention
from gossamer.methods.attention.executor import Backend
from gossamer.models import Progress, Tokens, as_tokens, context_length

__all__ = ["AttentionMethod", "Selector", "SparseAttention"]


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method):
    """Base of the methods that restrict which keys a query reads.

    Parameters
    ----------
    backend : ``reference`` is the definition, ``window`` reads only what is kept and fails where
        it cannot, ``auto`` takes what the cost rule of :func:`choose` says and reports it.
    length : tokens at which a sparsity is solved; None means the length of the data.
    """

    backend: Backend = "auto"
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend not in get_args(Backend):
            raise unknown("attention backend", self.backend, get_args(Backend))
        if self.length is not None and self.length < 1:
            raise GossamerError(f"length is {self.length}; give a number of tokens, at least 1")

    @abstractmethod
    def plan(self, model: nn.Module, data: Any, length: int) -> Selector:
        """Decide what can be decided before the first call."""

    @abstractmethod
    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Selector:
        """The selector whose :meth:`Selector.state` was stored."""

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> SparseAttention:
        """Install the method in a decoder.

        Parameters
        ----------
        data : only its length is read here, unless :meth:`plan` says otherwise.

        Raises
        ------
        GossamerError
            If the model is no causal decoder, or the pattern cannot reach the sparsity.
        """
        length = _length(self.length, data, model)
        resolved = replace(self, length=length)
        return SparseAttention(resolved, model, self.plan(model, data, length), length)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> SparseAttention:
        return SparseAttention(self, model, self.replan(meta, tensors), int(meta["length"]))


def _length(given: int | None, data: Any, model: nn.Module) -> int:
    """Tokens to solve for: the field, the data's length, or 1024 clipped to the context."""
    if given is not None:
        return given
    if isinstance(data, Tokens):
        return data.length
    if data is not None:
        return as_tokens(data, model).length
    return min(1024, context_length(model) or 1024)
