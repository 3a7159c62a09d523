"""Training an adapter: Adam with two drops of the rate; a prompt's label map follows it.

Shapes: N samples, F features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError
from gossamer.methods.training.reprogrammed.adapters import LinearProbe
from gossamer.methods.training.reprogrammed.examples import Examples
from gossamer.methods.training.reprogrammed.host import Host
from gossamer.methods.training.reprogrammed.labels import greedy_map, votes
from gossamer.models import Progress
from gossamer.models.fit import undisturbed

__all__ = ["AdapterPlan", "train_probe", "train_prompt"]


@dataclass(frozen=True)
class AdapterPlan:
    """How an adapter is trained; see :class:`~gossamer.Reprogramming`."""

    epochs: int
    lr: float
    batch_size: int
    remap_every: int
    seed: int

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0: a tenth from half on, then from 72 % on."""
        drops = sum(epoch >= share * self.epochs for share in (0.5, 0.72))
        return self.lr * 0.1**drops


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, so that running statistics stay; no parameter takes gradients."""
    with undisturbed(model), torch.enable_grad():
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


def _update(loss: Tensor, optimizer: torch.optim.Optimizer, plan: AdapterPlan, epoch: int) -> float:
    value = float(loss.detach())
    if not isfinite(value):
        raise GossamerError(f"the loss is {value} in epoch {epoch + 1}; lower lr ({plan.lr:g})")
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = plan.rate(epoch)
    optimizer.step()
    return value


def train_probe(
    host: Host, examples: Examples, plan: AdapterPlan, progress: Progress | None = None
) -> tuple[float, ...]:
    """Train a linear head on features that are computed once; mean loss of every epoch."""
    probe = host.adapter
    assert isinstance(probe, LinearProbe)
    device = probe.linear.weight.device
    with _frozen(host.model), torch.no_grad():
        found = [host.run(v)[0].float() for v, _ in examples.batches(plan.batch_size, device)]
    features = Examples({"x": torch.cat(found)}, examples.labels.to(device), examples.names)
    optimizer = torch.optim.Adam(probe.parameters(), lr=plan.lr)
    generator = torch.Generator().manual_seed(plan.seed)
    losses: list[float] = []
    with torch.enable_grad():
        for epoch in range(plan.epochs):
            total = 0.0
            for values, labels in features.batches(plan.batch_size, device, generator):
                loss = cross_entropy(probe.linear(values["x"]), labels)
                total += len(labels) * _update(loss, optimizer, plan, epoch)
            losses.append(total / len(features))
            if progress is not None:
                progress(epoch + 1, plan.epochs, f"probe, loss {losses[-1]:.3f}")
    return tuple(losses)


def train_prompt(
    host: Host, examples: Examples, plan: AdapterPlan, progress: Progress | None = None
) -> tuple[float, ...]:
    """Train a prompt; the label map is found anew as epochs begin. Mean loss of every epoch."""
    prompt = host.adapter
    device = next(prompt.parameters()).device
    optimizer = torch.optim.Adam(prompt.parameters(), lr=plan.lr)
    generator = torch.Generator().manual_seed(plan.seed)
    losses: list[float] = []
    with _frozen(host.model):
        for epoch in range(plan.epochs):
            if plan.remap_every and epoch % plan.remap_every == 0:
                remap(host, examples, plan.batch_size)
            total = 0.0
            for values, labels in examples.batches(plan.batch_size, device, generator):
                loss = cross_entropy(prompt.leave(*host.run(values)), labels)
                total += len(labels) * _update(loss, optimizer, plan, epoch)
            losses.append(total / len(examples))
            if progress is not None:
                progress(epoch + 1, plan.epochs, f"prompt, loss {losses[-1]:.3f}")
    return tuple(losses)


@torch.no_grad()
def remap(host: Host, examples: Examples, batch_size: int) -> None:
    """Give every class of the task the source class that the network gives its samples now."""
    prompt = host.adapter
    device = next(prompt.parameters()).device
    counts: Tensor | None = None
    for values, labels in examples.batches(batch_size, device):
        _, logits = host.run(values)
        part = votes(logits, labels, len(examples.names), by_probability=host.text)
        counts = part if counts is None else counts + part
    assert counts is not None
    prompt.get_buffer("labels").copy_(greedy_map(counts))
