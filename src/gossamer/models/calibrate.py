"""Calibration: what the inputs of every matrix look like on data, block by block.

The model's own forward is recorded once; then each block in turn is measured, shown to a
visitor that may change it, and run again so that the next block sees what the changed one
produces. Resident memory is one block's statistics and one batch, whatever the number of blocks
and samples: hidden states between blocks lie in a temporary file.
Shapes: B sequences, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Site, Stat
from gossamer.models.capture import Tape, evaluating, hidden_of, record
from gossamer.models.collect import Collector
from gossamer.models.data import Inputs, Tokens
from gossamer.models.gradient import gradients
from gossamer.models.sites import SiteMap, find_sites
from gossamer.models.spool import Spool, Stored

__all__ = ["Block", "BlockBatch", "Progress", "Streamed", "stream"]

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all, and what is being done."""


@dataclass(frozen=True, eq=False)
class BlockBatch:
    """Input of a block for one batch.

    Parameters
    ----------
    hidden : (B, T, H). valid : (B, T) bool, True for real tokens. index : of the batch.
    """

    hidden: Tensor
    valid: Tensor
    index: int


@dataclass(eq=False)
class Block:
    """A block as a visitor of :func:`stream` sees it, before anything in it is changed.

    Attributes
    ----------
    index : of the block. module : the block itself. sites : its matrices.
    stats : site name to the statistics asked for; of the real tokens only.
    tokens : site name to the number of tokens measured; 0 for an expert no token reached.
    """

    index: int
    module: nn.Module
    sites: tuple[Site, ...]
    _tape: Tape
    stats: dict[str, dict[Stat, Any]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def batches(self) -> Iterator[BlockBatch]:
        """The block's inputs, read one batch at a time; only while it is visited."""
        places = zip(self._tape.hidden, self._tape.valid, strict=True)
        for index, (place, valid) in enumerate(places):
            hidden = self._tape.spool.read(place)
            if valid is None:
                valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
            yield BlockBatch(hidden, valid.to(hidden.device), index)

    def run(self, batch: BlockBatch, *, grad: bool = False) -> Tensor:
        """The block's output (B, T, H) as it is now, called as the model itself calls it.

        Parameters
        ----------
        grad : record the computation for a backward pass.
        """
        with torch.set_grad_enabled(grad):
            return hidden_of(self._tape.call(batch.index, self.index, self.module, batch.hidden))


@dataclass(frozen=True)
class Streamed:
    """What a calibration took.

    Parameters
    ----------
    unseen : sites of experts that no token reached, so that nothing was measured.
    stats_bytes : most bytes the statistics of one block took.
    batch_bytes : bytes of one batch of hidden states.
    spooled_bytes : bytes of the temporary file.
    """

    unseen: tuple[str, ...]
    stats_bytes: int
    batch_bytes: int
    spooled_bytes: int


def stream(
    model: nn.Module,
    data: Tokens | Inputs,
    needs: frozenset[Stat],
    visit: Callable[[Block], None],
    *,
    sites: SiteMap | None = None,
    batch_size: int = 8,
    recompute: bool = True,
    progress: Progress | None = None,
) -> Streamed:
    """Measure each block's inputs on data and show the block to a visitor, in order.

    Parameters
    ----------
    needs : statistics of every matrix's input, over real tokens; ``Stat.GRADIENT`` is measured
        on the unchanged model before the first block.
    visit : may change the block's weights in place.
    sites : those of :func:`find_sites`, when already known.
    recompute : run a visited block again, so that later blocks see the changed one's output;
        otherwise they see the original's, and each block runs once.

    Raises
    ------
    UnsupportedModel
        If the model does not run each block once, in order.
    GossamerError
        If activations are not finite or the temporary folder is full.
    """
    sites = sites or find_sites(model)
    batches = -(-len(data) // batch_size)
    known = needs - {Stat.GRADIENT}
    passes = bool(known or not recompute) + recompute
    steps = _Steps(progress, batches * (1 + passes * len(sites.blocks)) - recompute * batches)
    slopes = gradients(model, data, sites) if Stat.GRADIENT in needs else {}
    unseen: list[str] = []
    most = 0
    with evaluating(model), Spool() as spool:
        tape = record(model, sites, data, batch_size, spool, steps.part("recording inputs"))
        for index, path in enumerate(sites.blocks):
            block = Block(index, model.get_submodule(path), sites.in_block(index), tape)
            last = index == len(sites.blocks) - 1
            following: list[Stored] = []
            if known or not recompute:
                collector = Collector(model, block.sites, known)
                keep = not recompute and not last
                following = _measure(block, collector, keep, steps.part(f"measuring block {index}"))
                block.stats, block.tokens = collector.values(), collector.tokens()
                unseen += [n for n, count in block.tokens.items() if known and not count]
                most = max(most, collector.nbytes)
                del collector
            for name in block.stats.keys() & slopes.keys():
                block.stats[name] = {**block.stats[name], Stat.GRADIENT: slopes[name]}
            if not block.stats and slopes:
                block.stats = {s.name: {Stat.GRADIENT: slopes[s.name]} for s in block.sites}
            visit(block)
            if following:
                tape.hidden = following
            elif recompute and not last:
                _advance(block, steps.part(f"running block {index} again"))
        if unseen and progress is not None:
            progress(steps.done, steps.total, f"no token reached {_some(unseen)}")
        place = tape.hidden[0]
        batch = place.dtype.itemsize * torch.Size(place.shape).numel()
        return Streamed(tuple(unseen), most, batch, spool.nbytes)


class _Steps:
    """Counts batches over all passes."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def part(self, what: str) -> Callable[[int], None]:
        def step(_: int) -> None:
            self.done += 1
            if self._progress is not None:
                self._progress(self.done, self.total, what)

        return step


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _measure(
    block: Block, collector: Collector, keep: bool, step: Callable[[int], None]
) -> list[Stored]:
    """Run a block with hooks on its matrices; with ``keep``, spool its outputs."""
    outputs: list[Stored] = []
    tape = block._tape
    with collector.attached():
        for batch in block.batches():
            with collector.batch(tape.valid[batch.index]):
                output = block.run(batch)
            if keep:
                outputs.append(tape.spool.put(output.contiguous()))
            step(batch.index)
    return outputs


def _advance(block: Block, step: Callable[[int], None]) -> None:
    """Put a block's outputs in its inputs' place."""
    for batch in block.batches():
        output = block.run(batch)
        block._tape.spool.replace(block._tape.hidden[batch.index], output)
        step(batch.index)
