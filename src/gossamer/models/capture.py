"""Capture: one pass of a model's own forward records what every block is called with.

No block computes in that pass: each is replaced by a recorder that hands the hidden states on.
Blocks are later called with exactly what the model prepared for them (masks, rotary tables,
positions), so nothing about an architecture's forward is rebuilt here.
Shapes: B sequences, T tokens, H hidden size.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gossamer.core import UnsupportedModel
from gossamer.models.data import Inputs, Tokens
from gossamer.models.sites import SiteMap
from gossamer.models.spool import Spool, Stored

__all__ = ["Tape", "evaluating", "hidden_of", "record"]

# A cache filled in the recording would be read in the replay.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


class _Hidden:
    """Marks the place of the hidden states among a block's arguments."""


class _Stop(Exception):  # noqa: N818 - no error, a way out
    """Ends a forward pass behind the last block."""


@dataclass
class _Call:
    """A block's arguments: leaves of a tree, tensors among them spooled."""

    leaves: list[Any]
    tree: Any


class Tape:
    """What a model calls its blocks with, batch by batch, and the hidden states on their way.

    Attributes
    ----------
    hidden : per batch, where the (B, T, H) input of the next block is stored.
    valid : per batch, (B, T) bool of real tokens, or None when all are.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.hidden: list[Stored] = []
        self.valid: list[Tensor | None] = []
        self._calls: list[list[_Call]] = []
        self._loaded: dict[Stored, Tensor] = {}

    def __len__(self) -> int:
        return len(self.hidden)

    def add(self, hidden: Stored, valid: Tensor | None, calls: list[_Call]) -> None:
        """Append a batch."""
        self.hidden.append(hidden)
        self.valid.append(valid)
        self._calls.append(calls)

    def call(self, batch: int, block: int, module: nn.Module, hidden: Tensor) -> Any:
        """Run a block on hidden states with the arguments recorded for it and this batch."""
        call = self._calls[batch][block]
        places = {leaf for leaf in call.leaves if isinstance(leaf, Stored)}
        # Batches without padding share their arguments; then nothing is read again.
        self._loaded = {p: t for p, t in self._loaded.items() if p in places}
        for place in places - self._loaded.keys():
            self._loaded[place] = self.spool.read(place)
        found = {_Hidden: hidden, **self._loaded}
        leaves = [found[x] if x is _Hidden or isinstance(x, Stored) else x for x in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.tree)
        return module(*args, **kwargs)


def hidden_of(output: Any) -> Tensor:
    """The hidden states among a block's outputs: the output itself, or its first part."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and put every module's mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def record(
    model: nn.Module,
    sites: SiteMap,
    data: Tokens | Inputs,
    batch_size: int,
    spool: Spool,
    progress: Callable[[int], None] | None = None,
) -> Tape:
    """Fill a tape from the model's own forward; the model is as before afterwards.

    Raises
    ------
    UnsupportedModel
        If the model skips or repeats a block, or changes hidden states between blocks.
    """
    tape = Tape(spool)
    recorder = _Recorder(model, sites, spool)
    base = model.get_submodule(sites.base)
    names = inspect.signature(base.forward).parameters
    cached = hasattr(getattr(base, "config", None), "use_cache")
    options = {"use_cache": False} if cached else {}
    device = next(base.parameters()).device
    with recorder.attached():
        for index, batch in enumerate(data.batches(batch_size, device)):
            if "position_ids" not in names:
                batch.pop("position_ids", None)
            with suppress(_Stop):
                base(**batch, **options)
            mask = batch.get("attention_mask")
            valid = None if mask is None or bool(mask.all()) else mask.bool().cpu()
            hidden, calls = recorder.finish()
            tape.add(hidden, valid, calls)
            if progress is not None:
                progress(index + 1)
    return tape


class _Recorder:
    """Stands in for the blocks during the recording."""

    def __init__(self, model: nn.Module, sites: SiteMap, spool: Spool) -> None:
        self._blocks = [model.get_submodule(path) for path in sites.blocks]
        self._forwards = [block.forward for block in self._blocks]
        self._spool = spool
        self._rest: tuple[Any, ...] | None = None
        self._shape_known = False
        self._before: dict[tuple[int, int], tuple[Tensor, Stored]] = {}
        self._start()

    def _start(self) -> None:
        self._first: Stored | None = None
        self._passed: Tensor | None = None
        self._calls: list[_Call] = []
        self._now: dict[tuple[int, int], tuple[Tensor, Stored]] = {}
        self._seen: dict[int, tuple[Tensor, Stored]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the recorder in the blocks' place; undone on any exit."""
        own = [vars(block).get("forward") for block in self._blocks]
        try:
            for index, block in enumerate(self._blocks):
                block.forward = self._stand_in(index)
            yield
        finally:
            for block, forward in zip(self._blocks, own, strict=True):
                if forward is not None:
                    block.forward = forward
                else:
                    vars(block).pop("forward", None)

    def _stand_in(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._take(index, args, kwargs)

        return forward

    def _take(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(self._calls):
            raise UnsupportedModel(
                f"the model runs block {index} where block {len(self._calls)} was expected; "
                "only models that run each block once, in order, can be calibrated"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._first is None:
            self._first = self._spool.put(hidden.contiguous())
        elif hidden is not self._passed:
            raise UnsupportedModel(f"the model changes hidden states before block {index}")
        for name in _CACHES:
            if name in kwargs:
                kwargs[name] = None
        leaves, tree = pytree.tree_flatten((args, kwargs))
        kept = [self._keep(index, i, leaf, hidden) for i, leaf in enumerate(leaves)]
        self._calls.append(_Call(kept, tree))
        if len(self._calls) == len(self._blocks):
            raise _Stop
        if not self._shape_known:
            # Whether blocks return a tensor or a tuple is learned from one real call.
            output = self._forwards[index](*args, **kwargs)
            self._rest = None if isinstance(output, Tensor) else tuple(output[1:])
            self._shape_known = True
        self._passed = hidden
        return hidden if self._rest is None else (hidden, *self._rest)

    def _keep(self, index: int, position: int, leaf: Any, hidden: Tensor) -> Any:
        """Spool a tensor argument once, however many blocks and batches share it."""
        if leaf is hidden:
            return _Hidden
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._seen:
            old = self._before.get((index, position))
            same = old is not None and _same(old[0], leaf)
            self._seen[id(leaf)] = (leaf, old[1] if same and old else self._spool.put(leaf))
        self._now[index, position] = self._seen[id(leaf)]
        return self._seen[id(leaf)][1]

    def finish(self) -> tuple[Stored, list[_Call]]:
        """What one batch recorded; the recorder is ready for the next."""
        if self._first is None or len(self._calls) != len(self._blocks):
            raise UnsupportedModel(
                f"the model ran {len(self._calls)} of its {len(self._blocks)} blocks; "
                "only models that run every block can be calibrated"
            )
        result = self._first, self._calls
        self._before = self._now
        self._start()
        return result


def _same(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and a.stride() == b.stride() and torch.equal(a, b)
