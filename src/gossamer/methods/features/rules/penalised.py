"""Rules whose sparsity a penalty brings about: ReLU with L1, JumpReLU, Gated.

Shapes: R = rows, M = latents, D = input width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.rules.base import Batch, Codes, Rule, Step, combine, pack

__all__ = ["Gated", "JumpReLU", "ReLU"]


class _Penalised(Rule):
    """Shared by the rules with a penalty: its weight, and the rows over which that rises.

    Parameters
    ----------
    coefficient : weight of the penalty beside the squared error (summed over D) of a row, for
        inputs scaled to a mean norm of sqrt(D); only training reads it.
    warmup : rows over which the weight rises linearly to its full value.
    """

    running_rows: Tensor

    def __init__(self, coefficient: float = 0.0, warmup: int = 0) -> None:
        super().__init__()
        if not 0 <= coefficient < float("inf"):
            raise GossamerError(f"coefficient is {coefficient!r}; give a number, at least 0")
        self.coefficient, self.warmup = coefficient, warmup
        self.register_buffer("running_rows", torch.zeros((), dtype=torch.int64))

    def weight(self, rows: int) -> Tensor:
        """The weight in force for a batch of so many rows, which count from here on."""
        self.running_rows += rows
        return self.coefficient * (self.running_rows / max(1, self.warmup)).clamp_max(1.0)


class ReLU(_Penalised):
    """Every positive pre-activation stays; the penalty sum_i z_i ‖d_i‖ makes them few.

    Source: arXiv 2309.08600.
    """

    architecture = "standard"

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        values = pre.relu()
        return pack(values, values.detach() > 0)

    def penalty(self, step: Step) -> Tensor:
        norms = step.batch.atoms.norm(dim=1)[step.codes.indices.clamp_min(0)]
        return self.weight(len(step.pre)) * (step.codes.values * norms).sum()


class _Jump(torch.autograd.Function):
    """a [a > t], with the straight-through derivative by t of a window of width ``width``."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        inside = (pre - threshold).abs() < ctx.width / 2
        by_threshold = -(threshold / ctx.width) * inside * grads[0]
        return grads[0] * (pre > threshold), by_threshold.sum(0), None


class _Count(torch.autograd.Function):
    """[a > t]; its derivative by t is the window's, that by a is zero."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        inside = (pre - threshold).abs() < ctx.width / 2
        return None, -(inside * grads[0]).sum(0) / ctx.width, None


class JumpReLU(_Penalised):
    """A pre-activation stays, unchanged, where it exceeds its latent's own learned threshold.

    The thresholds have a derivative only through a window around them: of the codes,
    -(t / e) [|a - t| < e / 2], and of the count of codes, -(1 / e) [|a - t| < e / 2], for a
    window of width e. The count sends no gradient to the pre-activations.

    Parameters
    ----------
    latents : M. target : mean number of latents of a row that the penalty steers to.
    coefficient : weight of (L0 / target - 1)² in a row's loss.
    bandwidth : e, width of the window, in units of inputs with a mean norm of sqrt(D).
        Thresholds never fall below e / 2, or silent latents would lie inside the window.
    initial : first threshold.

    Source: arXiv 2407.14435, §3 and app. J (target L0). A file may hold thresholds of any rule
    that ends as one number a latent.
    """

    architecture = "jumprelu"

    def __init__(
        self,
        latents: int,
        *,
        target: float | None = None,
        coefficient: float = 10.0,
        bandwidth: float = 0.0,
        initial: float = 0.1,
        warmup: int = 0,
        signed: bool = False,
    ) -> None:
        super().__init__(coefficient, warmup)
        if target is not None and not 0 < target <= latents:
            raise GossamerError(f"target is {target!r}; {latents} latents allow 0 to {latents}")
        if not 0 <= bandwidth < float("inf"):
            raise GossamerError(f"bandwidth is {bandwidth!r}; give a width, at least 0")
        self.target, self.bandwidth, self.signed = target, bandwidth, signed
        self.threshold = nn.Parameter(torch.full((latents,), float(initial)))

    def limits(self) -> Tensor:
        """(M,), the thresholds in force; below half the window the derivative passes unchanged."""
        raised = self.threshold.clamp_min(self.bandwidth / 2)
        return self.threshold + (raised - self.threshold).detach()

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        limits = self.limits()
        size = pre.detach()
        if not self.training or not self.bandwidth:
            return pack(pre, (size.abs() if self.signed else size) > limits)
        # Latents just below their threshold take part with value 0, for the thresholds' sake.
        near = size > limits.detach() - self.bandwidth / 2
        return pack(_jump(pre, limits, self.bandwidth), near)

    def penalty(self, step: Step) -> Tensor | None:
        if self.target is None:
            return None
        count = _count(step.pre, self.limits(), self.bandwidth).sum() / len(step.pre)
        rows = len(step.pre)
        return self.weight(rows) * rows * (count / self.target - 1).square()

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        self.threshold.copy_(self.limits() / scale)
        self.bandwidth /= scale

    def config(self) -> dict[str, Any]:
        return {"signed": True} if self.signed else {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "JumpReLU":
        return cls(config["d_sae"], signed=bool(config.get("signed", False)))


def _jump(pre: Tensor, threshold: Tensor, width: float) -> Tensor:
    value = _Jump.apply(pre, threshold, width)
    assert isinstance(value, Tensor)
    return value


def _count(pre: Tensor, threshold: Tensor, width: float) -> Tensor:
    value = _Count.apply(pre, threshold, width)
    assert isinstance(value, Tensor)
    return value


class Gated(_Penalised):
    """One half of the encoder decides which latents speak, the other how loud.

    With u = (x - b_dec) W_enc: the gate p = u + b_gate opens where p > 0, the magnitude is
    ReLU(exp(r_mag) u + b_mag). The gate is trained by an L1 penalty on ReLU(p) and by asking
    that ReLU(p) reconstructs through atoms held fixed, so the codes themselves do not shrink.

    Parameters
    ----------
    latents : M.
    auxiliary : the reconstruction through fixed atoms; without it nothing opens a gate.

    Source: arXiv 2404.16014, §3.2.
    """

    architecture = "gated"
    encoder_bias = False

    def __init__(
        self, latents: int, *, coefficient: float = 0.0, warmup: int = 0, auxiliary: bool = True
    ) -> None:
        super().__init__(coefficient, warmup)
        self.auxiliary = auxiliary
        self.b_gate = nn.Parameter(torch.zeros(latents))
        self.b_mag = nn.Parameter(torch.zeros(latents))
        self.r_mag = nn.Parameter(torch.zeros(latents))

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        loud = (self.r_mag.exp() * pre + self.b_mag).relu()
        opened = (pre.detach() + self.b_gate.detach() > 0) & (loud.detach() > 0)
        return pack(loud, opened)

    def penalty(self, step: Step) -> Tensor:
        gate = (step.pre + self.b_gate).relu()
        total = self.weight(len(gate)) * gate.sum()
        if not self.auxiliary:
            return total
        codes = pack(gate, gate.detach() > 0)
        atoms, offset = step.batch.atoms.detach(), step.batch.offset.detach()
        # What the codes were asked to give: the error plus what they gave.
        target = step.error + combine(step.codes, step.batch.atoms) + step.batch.offset
        return total + (target.detach() - combine(codes, atoms) - offset).square().sum()

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        self.b_gate.div_(scale)
        self.b_mag.div_(scale)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Gated":
        return cls(config["d_sae"])
