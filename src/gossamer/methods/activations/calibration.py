"""What gates need from data: quantiles of their score, and the error trial gates cause."""

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import QuantileSketch, Stat
from gossamer.methods.activations.gates import Gate, Gates, Tap
from gossamer.methods.activations.positions import Positions
from gossamer.models import Block, Inputs, SiteMap, Tokens

__all__ = ["BlockError", "active_experts", "sketch_of", "trial_data"]

TRIAL_SEQUENCES, TRIAL_LENGTH = 4, 128


def active_experts(model: Any, sites: SiteMap) -> float:
    """Share of a layer's experts that run for one token."""
    count = max((site.expert + 1 for site in sites.sites if site.expert is not None), default=0)
    if not count:
        return 1.0
    return model.config.get_text_config().num_experts_per_tok / count


def sketch_of(model: nn.Module, block: Block, tap: Tap) -> QuantileSketch:
    """Quantiles of the tap's score over the calibration tokens, from the driver if it has them."""
    if tap.weight is None:
        parts = [block.stats[site.name][Stat.INPUT_QUANTILES] for site in tap.sites]
        merged = QuantileSketch(tap.features, parts[0].counts.device)
        for part in parts:
            merged.counts += part.counts
            merged.tokens += part.tokens
        return merged
    # The driver's sketch is of |x| over all channels; weights change the order.
    weight = tap.weight
    positions = Positions(dense_prefix=0)
    gates = Gates(model, positions)
    sketch = QuantileSketch(tap.features, weight.device)
    try:
        gates.observe(tap, lambda rows: sketch.update(rows * weight))
        for batch in block.batches():
            positions.begin(mask=batch.valid, shape=batch.valid.shape)
            block.run(batch)
    finally:
        gates.remove()
    return sketch


def trial_data(data: Tokens | Inputs) -> Tokens | Inputs:
    """The part of the calibration data a greedy allocation tries its steps on: 4 x 128 tokens."""
    if isinstance(data, Inputs):
        return Inputs({name: value[:TRIAL_SEQUENCES] for name, value in data.values.items()})
    ids = data.input_ids[:TRIAL_SEQUENCES, :TRIAL_LENGTH]
    mask = data.attention_mask[:TRIAL_SEQUENCES, :TRIAL_LENGTH]
    rows = mask.any(1)
    return Tokens(ids[rows], mask[rows]) if bool(rows.any()) else data


class BlockError:
    """Distance of a block's output from dense under trial gates; a context manager.

    L2 norm over the last quarter of the positions, averaged over batch and channels.
    """

    def __init__(self, model: nn.Module, block: Block, dense_prefix: int) -> None:
        self.block = block
        self.positions = Positions(dense_prefix)
        self.gates = Gates(model, self.positions)
        self.batches = [(batch, self._tail(block.run(batch))) for batch in block.batches()]

    @staticmethod
    def _tail(output: Tensor) -> Tensor:
        return output[:, -max(1, output.shape[1] // 4) :].clone()

    @torch.no_grad()
    def __call__(self, gates: list[Gate]) -> float:
        """The error with these gates at work."""
        self.gates.set(gates)
        total, rows = 0.0, 0
        for batch, dense in self.batches:
            self.positions.begin(mask=batch.valid, shape=batch.valid.shape)
            off = (self._tail(self.block.run(batch)) - dense).float()
            off = off * batch.valid[:, -off.shape[1] :, None]
            total += float(torch.linalg.vector_norm(off, dim=1).mean(1).sum())
            rows += len(off)
        return total / rows

    def __enter__(self) -> "BlockError":
        return self

    def __exit__(self, *exc: object) -> None:
        self.gates.remove()
