"""Training of the denoising autoencoder, with any form of layer.

Loss: half the squared error, summed over features, mean over the batch.
Shapes: N = samples, F = features, H = hidden units, B = batch.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from gossamer.core import GossamerError
from gossamer.methods.training.sparse_autoencoder.layers import (
    Descent,
    Layer,
    MaskedLayer,
    StoredLayer,
    initial,
)
from gossamer.models import Progress

__all__ = ["Form", "Network", "Plan", "network", "train"]

Form = Literal["stored", "masked"]


@dataclass(frozen=True)
class Plan:
    """How to train.

    Parameters
    ----------
    epochs, batch_size : full batches, in an order drawn anew every epoch.
    zeta : share of connections replaced after every epoch but the last.
    noise : standard deviation of the noise on the input, drawn once for every sample.
    dropout : share of hidden units silenced, drawn anew for every batch.
    tanh : the output passes through tanh. rewire : whether connections change places at all.
    """

    epochs: int = 30
    batch_size: int = 100
    zeta: float = 0.2
    noise: float = 0.2
    dropout: float = 0.2
    tanh: bool = False
    rewire: bool = True
    descent: Descent = field(default_factory=Descent)


@dataclass
class Network:
    """An encoder (H, F) with sigmoid and a decoder (F, H)."""

    encoder: Layer
    decoder: Layer
    tanh: bool = False

    def step(self, x: Tensor, target: Tensor, plan: Plan, generator: Generator) -> float:
        """One update on a batch (F, B); returns its loss before the update."""
        hidden = self.encoder.forward(x).sigmoid_()
        slope = hidden * (1.0 - hidden)
        if plan.dropout > 0:
            drawn = torch.rand(hidden.shape, generator=generator)
            alive = (drawn >= plan.dropout).to(hidden).div_(1.0 - plan.dropout)
            hidden.mul_(alive)
            slope.mul_(alive)
        output = self.decoder.forward(hidden)
        if self.tanh:
            output.tanh_()
        delta = (output - target) if self.tanh else output.sub_(target)
        loss = float(torch.linalg.vector_norm(delta)) ** 2 / (2 * x.shape[1])
        if self.tanh:
            delta.mul_(1.0 - output.square())
        back = self.decoder.backward(delta).mul_(slope)
        self.decoder.update(delta, hidden, plan.descent)
        self.encoder.update(back, x, plan.descent)
        return loss


def network(
    features: int,
    hidden: int,
    count: int,
    generator: Generator,
    form: Form = "stored",
    tanh: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A network of ``count`` random connections in each of its two matrices."""
    kind = StoredLayer if form == "stored" else MaskedLayer
    encoder = initial((hidden, features), count, generator, dtype)
    decoder = initial((features, hidden), count, generator, dtype)
    return Network(kind(encoder), kind(decoder), tanh)


def train(
    net: Network,
    table: Tensor,
    plan: Plan,
    generator: Generator,
    progress: Progress | None = None,
) -> list[float]:
    """Train in place on a standardised table (N, F); returns the mean loss of every epoch.

    Raises
    ------
    GossamerError
        If the loss is no longer finite.
    """
    # Noise is drawn in float32 for every dtype, so that float64 follows the same course.
    noise = torch.randn(table.shape, generator=generator)
    noisy = noise.to(table.dtype).mul_(plan.noise).add_(table)
    del noise
    batch = min(plan.batch_size, len(table))
    losses: list[float] = []
    for epoch in range(plan.epochs):
        order = torch.randperm(len(table), generator=generator)
        total, batches = 0.0, len(table) // batch
        for chosen in order[: batches * batch].view(batches, batch):
            x, target = (t[chosen].t().contiguous() for t in (noisy, table))
            total += net.step(x, target, plan, generator)
        losses.append(total / batches)
        if not losses[-1] < float("inf"):
            raise GossamerError(
                f"training diverged in epoch {epoch + 1} of {plan.epochs} at lr "
                f"{plan.descent.lr}; give a smaller lr"
            )
        if plan.rewire and epoch + 1 < plan.epochs:
            net.encoder.rewire(plan.zeta, generator)
            net.decoder.rewire(plan.zeta, generator)
        if progress is not None:
            progress(epoch + 1, plan.epochs, "training the sparse autoencoder")
    return losses
