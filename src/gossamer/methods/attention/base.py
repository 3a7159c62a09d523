"""The protocol of sparse attention at inference.

A method plans a *selector*; at every attention call of every layer the selector looks at the
call and returns a *key index*: which keys each query reads. An *executor* runs the index. The
three know nothing of each other's insides, so any selector meets any executor that can run its
index. A selector that scores keys is an estimate, cut by a budget, at a unit (token, page,
block); one that goes by position, such as a window, needs neither.

Methods for the prompt and methods for decoding combine: ``FlexPrefill() + Quest()``.

State belongs to the call's cache, not to the selector: selectors are shared by all layers and
sequences, and beam search reorders caches behind their back.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from gossamer.core import GossamerError, Method, check_count
from gossamer.methods.attention.applied import SparseAttention, attention_shape
from gossamer.methods.attention.executors import check_backend
from gossamer.methods.attention.layout import PHASES, Phase
from gossamer.methods.attention.selector import Selector
from gossamer.models import Progress, Tokens, as_tokens, context_length

if TYPE_CHECKING:
    from gossamer.methods.attention.prefill_decode import PrefillDecode

__all__ = ["AttentionMethod", "Selector", "SparseAttention"]


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method):
    """Base of the methods that restrict which keys a query reads.

    Parameters
    ----------
    backend : ``auto`` holds the pattern by the cheapest executor that a stated rule finds;
        ``fastest`` measures once per kind of call, selection included, and runs full attention
        where that is faster; a name runs that executor and fails where it cannot.
    length : tokens at which a sparsity is solved and pairs are counted; None means the length of
        the data.
    dense_layers : first layers that keep full attention.
    min_length : calls that know fewer keys keep full attention.
    """

    phases: ClassVar[frozenset[Phase]] = PHASES
    """Phases the method makes sparse; in the others attention is full."""
    full: ClassVar[Mapping[str, Any]] = {}
    """Parameters at which nothing is removed, for the contract checks."""
    chunked: ClassVar[str] = ""
    """Why a prompt given in chunks differs from one given at once, if it does."""
    peeks: ClassVar[str] = ""
    """Why the choice for a query depends on later queries of the same call, if it does."""
    selects: ClassVar[bool] = True
    """Keys are chosen by looking at them, so the choice must beat chance and a window."""

    backend: str = "auto"
    length: int | None = None
    dense_layers: int = 0
    min_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)
        if self.length is not None and self.length < 1:
            raise GossamerError(f"length is {self.length}; give a number of tokens, at least 1")
        check_count("dense_layers", self.dense_layers, 0)
        check_count("min_length", self.min_length, 0)

    @abstractmethod
    def plan(self, model: nn.Module, data: Any, length: int) -> Selector:
        """Decide what can be decided before the first call."""

    def planned(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> Selector:
        """:meth:`plan`, telling how far it is: for methods whose plan takes its time."""
        return self.plan(model, data, length)

    @abstractmethod
    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Selector:
        """The selector whose :meth:`Selector.state` was stored."""

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> SparseAttention:
        """Install the method in a decoder.

        Parameters
        ----------
        data : only its length is read, unless :meth:`plan` says otherwise. A method that looks at
            the keys is also measured on the first of it, for the report.

        Raises
        ------
        GossamerError
            If the model is no causal decoder, or the pattern cannot reach the sparsity.
        """
        tokens = None if data is None else as_tokens(data, model)
        length = _length(self.length, tokens, model)
        resolved = replace(self, length=length)
        selector = resolved.planned(model, data, length, progress)
        work = SparseAttention(resolved, model, selector, length)
        if tokens is None or not work.measured_only:
            return work
        try:
            work.measure(Tokens(tokens.input_ids[:1], tokens.attention_mask[:1]))
        except BaseException:
            work.restore()
            raise
        return work

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> SparseAttention:
        made, here = meta.get("shape"), attention_shape(model)
        if made not in (None, here):
            raise GossamerError(
                f"this {self.key()} plan was made for a model of {made}; {type(model).__name__} "
                f"has {here}: apply the method anew"
            )
        work = SparseAttention(self, model, self.replan(meta, tensors), int(meta["length"]))
        work.remember(meta.get("measured", ()))
        return work

    def __add__(self, other: "AttentionMethod") -> "PrefillDecode":
        """This method for the prompt, the other for decoding.

        Raises
        ------
        GossamerError
            If this one does not act on prompts or the other does not act on decoding.
        """
        from gossamer.methods.attention.prefill_decode import PrefillDecode

        return PrefillDecode(prefill=self, decode=other)


def _length(given: int | None, data: Tokens | None, model: nn.Module) -> int:
    """Tokens to solve for: the field, the data's length, or 1024 clipped to the context."""
    if given is not None:
        limit = context_length(model)
        if limit is not None and given > limit:
            raise GossamerError(
                f"length {given} is over the model's limit of {limit} tokens; give at most {limit}"
            )
        return given
    if data is not None:
        return data.length
    return min(1024, context_length(model) or 1024)
