"""What gates need from data: quantiles of their score, and the error trial gates cause."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from gossamer.core import QuantileSketch, Stat
from gossamer.methods.activations.gates import Gate, Gates, See, Tap
from gossamer.methods.activations.positions import Positions
from gossamer.models import Block, Inputs, SiteMap, Tokens
from gossamer.models.capture import evaluating

__all__ = [
    "BlockError",
    "OutputError",
    "active_experts",
    "observed",
    "outputs",
    "sketch_of",
    "sketches_of",
    "strangeness",
    "token_loss",
    "trial_data",
    "up_rms",
]

TRIAL_SEQUENCES, TRIAL_LENGTH = 4, 128


def active_experts(model: Any, sites: SiteMap) -> float:
    """Share of a layer's experts that run for one token."""
    count = max((site.expert + 1 for site in sites.sites if site.expert is not None), default=0)
    if not count:
        return 1.0
    return model.config.get_text_config().num_experts_per_tok / count


def observed(
    model: nn.Module, block: Block, sees: Iterable[tuple[Tap, See]], *, ups: bool = False
) -> None:
    """Run a block once over its calibration inputs and show the real rows of each tap."""
    positions = Positions(dense_prefix=0)
    gates = Gates(model, positions)
    try:
        for tap, see in sees:
            gates.observe(tap, see, ups=ups)
        for batch in block.batches():
            positions.begin(mask=batch.valid, shape=batch.valid.shape)
            block.run(batch)
    finally:
        gates.remove()


def sketches_of(model: nn.Module, block: Block, taps: Iterable[Tap]) -> dict[str, QuantileSketch]:
    """Quantiles of the score of every tap over the calibration tokens, by name.

    Those of |x| come from the driver where it has them; all others take one run of the block.
    """
    found: dict[str, QuantileSketch] = {}
    sees: list[tuple[Tap, See]] = []
    for tap in taps:
        known = [block.stats.get(site.name, {}).get(Stat.INPUT_QUANTILES) for site in tap.sites]
        parts = [part for part in known if part is not None]
        if tap.weight is None and not tap.ups and len(parts) == len(known):
            merged = QuantileSketch(tap.features, parts[0].counts.device)
            for part in parts:
                merged.counts += part.counts
                merged.tokens += part.tokens
            found[tap.name] = merged
        else:
            sketch, see = _sketching(model, tap)
            found[tap.name] = sketch
            sees.append((tap, see))
    if sees:
        observed(model, block, sees)
    return found


def sketch_of(model: nn.Module, block: Block, tap: Tap) -> QuantileSketch:
    """Quantiles of the score of one tap: see :func:`sketches_of`."""
    return sketches_of(model, block, [tap])[tap.name]


def _sketching(model: nn.Module, tap: Tap) -> tuple[QuantileSketch, See]:
    # The driver's sketch is of |x| over all channels; weights change the order.
    weight = tap.weight
    device = next(model.parameters()).device if weight is None else weight.device
    sketch = QuantileSketch(tap.features, device)

    def see(rows: Tensor, expert: int | None) -> None:
        sketch.update(rows if weight is None else rows * weight)

    return sketch, see


def up_rms(model: nn.Module, block: Block, tap: Tap) -> Tensor | None:
    """Root mean square of what each neuron's activated gate is multiplied with: (F,) float32.

    None for an MLP without a gate matrix. Of experts, over the rows of all of them.
    """
    if not tap.ups:
        return None
    sums, count = torch.zeros(tap.features, dtype=torch.float64), 0

    def see(rows: Tensor, expert: int | None) -> None:
        nonlocal sums, count
        sums = sums.to(rows.device) + rows.float().square().sum(0)
        count += len(rows)

    observed(model, block, [(tap, see)], ups=True)
    return (sums / max(1, count)).sqrt().float()


def trial_data(
    data: Tokens | Inputs, sequences: int = TRIAL_SEQUENCES, length: int = TRIAL_LENGTH
) -> Tokens | Inputs:
    """The part of the calibration data that trials run on: its first 4 x 128 tokens by default."""
    if isinstance(data, Inputs):
        return Inputs({name: value[:sequences] for name, value in data.values.items()})
    ids = data.input_ids[:sequences, :length]
    mask = data.attention_mask[:sequences, :length]
    rows = mask.any(1)
    return Tokens(ids[rows], mask[rows]) if bool(rows.any()) else data


class BlockError:
    """Distance of a block's output from dense under trial gates; a context manager.

    L2 norm over the last quarter of the positions, averaged over batch and channels.
    """

    def __init__(
        self, model: nn.Module, block: Block, dense_prefix: int, dense_share: float = 0.0
    ) -> None:
        self.block = block
        self.positions = Positions(dense_prefix, dense_share)
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


def outputs(
    model: nn.Module, data: Tokens | Inputs, batch_size: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a model gives for data, batch by batch, with the rows that are real.

    Yields
    ------
    (B, ..., C) logits, or hidden states of a model without a head, and a bool (B, ...).
    """
    names = signature(model.forward).parameters
    device = next(model.parameters()).device
    for batch in data.batches(batch_size, device):
        found: Any = model(**{name: value for name, value in batch.items() if name in names})
        values = found.logits if hasattr(found, "logits") else found[0]
        mask = batch.get("attention_mask")
        whole = torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
        yield values, whole if mask is None or mask.shape != whole.shape else mask.bool()


@contextmanager
def _gating(
    model: nn.Module, sites: SiteMap, gates: Iterable[Gate], positions: Positions
) -> Iterator[Gates]:
    work, watch = Gates(model, positions), []
    try:
        watch = positions.watch(model.get_submodule(sites.base))
        work.set(gates)
        with evaluating(model), torch.no_grad():
            yield work
    finally:
        work.remove()
        for handle in watch:
            handle.remove()


class OutputError:
    """How far trial gates move the whole model from dense.

    Mean KL divergence of the predictions in nats; for a model without a head the squared
    distance of its hidden states, relative to their size.

    Parameters
    ----------
    data : few tokens: the dense predictions are held in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        dense_prefix: int,
        dense_share: float = 0.0,
    ) -> None:
        self.model, self.sites, self.data = model, sites, data
        self.positions = Positions(dense_prefix, dense_share)
        self.headed = hasattr(model, "lm_head") or bool(sites.head)
        with evaluating(model), torch.no_grad():
            self.dense = [self._form(values, real) for values, real in outputs(model, data)]

    def _form(self, values: Tensor, real: Tensor) -> Tensor:
        rows = values[real].float()
        return log_softmax(rows, dim=-1) if self.headed else rows

    def __call__(self, gates: Iterable[Gate]) -> float:
        """The error with these gates at work and all else dense."""
        total, count = 0.0, 0.0
        with _gating(self.model, self.sites, gates, self.positions):
            batches = outputs(self.model, self.data)
            for dense, (values, real) in zip(self.dense, batches, strict=True):
                ours = self._form(values, real)
                if self.headed:
                    total += float((dense.exp() * (dense - ours)).sum())
                    count += len(dense)
                else:
                    total += float((ours - dense).square().sum())
                    count += float(dense.square().sum())
        return max(0.0, total / max(count, 1e-30))


def token_loss(
    model: nn.Module,
    sites: SiteMap,
    data: Tokens,
    gates: Iterable[Gate] = (),
    dense_prefix: int = 1,
    batch_size: int = 4,
) -> tuple[float, dict[str, float]]:
    """Loss of a causal language model under gates, and the share of channels each removed.

    Returns
    -------
    Mean negative log-probability in nats of every real token but the first of its row, and by
    gate the share over the masked tokens.
    """
    total, count = 0.0, 0
    with _gating(model, sites, gates, Positions(dense_prefix)) as work, work.counting() as counts:
        for (values, real), ids in zip(
            outputs(model, data, batch_size), data.input_ids.split(batch_size), strict=True
        ):
            wanted = real[:, 1:] & real[:, :-1]
            targets = ids.to(values.device)[:, 1:][wanted]
            total += float(cross_entropy(values[:, :-1][wanted].float(), targets, reduction="sum"))
            count += len(targets)
    shares = {name: int(c[0]) / max(1, int(c[1])) for name, c in counts.items()}
    return total / max(1, count), shares


def strangeness(model: Any, sites: SiteMap, data: Tokens | Inputs) -> str | None:
    """A warning when the model predicts the calibration tokens no better than chance.

    Ids of another tokenizer fit into the vocabulary as a rule; only the model can tell.
    """
    if isinstance(data, Inputs) or not sites.head or data.input_ids.shape[1] < 2:
        return None
    size = getattr(model.get_submodule(sites.head), "out_features", 0)
    if size < 2:
        return None
    loss, _ = token_loss(model, sites, data)
    if loss < log(size):
        return None
    return (
        f"the model predicts the calibration tokens at {loss:.2f} nats each, no better than "
        f"chance ({log(size):.2f}); were they made by another model's tokenizer?"
    )
