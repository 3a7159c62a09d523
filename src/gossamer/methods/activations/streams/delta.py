"""Delta layers: a linear layer receives what changed since the last frame and integrates.

x̂_t = q round(x_t / q);  Δ_t = x̂_t - s_{t-1}, zero where |Δ_t| < θ;  s_t = s_{t-1} + Δ_t;
z_t = z_{t-1} + W Δ_t with z_{-1} = b and s_{-1} = 0. What follows acts on z_t as before.
Small changes that were not sent stay in x̂ - s, so errors do not add up.
Shapes: N streams, T frames, I = input entries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name

from gossamer.core import GossamerError

__all__ = ["DeltaLayer", "delta_layers", "multiply_adds", "quantise"]

Linear = nn.Linear | nn.Conv1d | nn.Conv2d
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def delta_layers(model: nn.Module) -> dict[str, Linear]:
    """Layers that can compute with changes, by path: linear layers and convolutions.

    Raises
    ------
    GossamerError
        If there are none, or a convolution pads with other values than zeros.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, _KINDS)}
    if not found:
        raise GossamerError(
            f"{type(model).__name__} has no linear layer or convolution to send changes to"
        )
    for name, module in found.items():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode != "zeros":
            raise GossamerError(
                f"{name} pads with {module.padding_mode}; changes can be integrated with zeros only"
            )
    return found


def quantise(x: Tensor, quantum: float) -> Tensor:
    """Round to multiples of ``quantum``; gradients pass as if nothing happened (straight through).

    Parameters
    ----------
    quantum : 0 leaves x as it is.
    """
    if quantum == 0:
        return x
    rounded = torch.round(x / quantum) * quantum
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _product(layer: Linear, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's linear map without bias, with another weight of its shape."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    convolve: Callable[..., Tensor] = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return convolve(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def multiply_adds(layer: Linear, active: Tensor) -> int:
    """Multiply-adds that the active inputs of a layer cause.

    An input entry of a convolution meets one weight for every output it reaches; entries at the
    border reach fewer.

    Parameters
    ----------
    active : bool, shaped like the layer's input (N, ...).
    """
    if isinstance(layer, nn.Linear):
        return int(active.sum()) * layer.out_features
    # Ones as weights: every output counts the active entries it meets, over its group.
    ones = torch.ones_like(layer.weight[: layer.groups])
    return int(
        _product(layer, active.to(ones.dtype), ones).double().sum()
        * (layer.out_channels // layer.groups)
    )


class DeltaLayer:
    """What a linear layer does in the place of its forward while deltas are at work.

    Streaming, one call is one frame and the state waits for the next; :meth:`reset` begins a new
    clip. With ``length`` set, one call is T frames of N clips, flattened as (N T, ...), which
    leaves no state and carries gradients: for training.

    Parameters
    ----------
    layer : the linear layer; its weights are read at every call.
    quantum : q, 0 for none. threshold : θ, changes below it wait.
    refresh : after so many frames z is computed anew from s, against drift; 0 never.

    Attributes
    ----------
    size : summed |Δ| over entries divided by their number, of the last clip in training.
    done, dense : multiply-adds caused by non-zero changes, and those of dense layers;
        ``later_`` counts without the first frame. sent, entries : non-zero changes, of all.
    """

    def __init__(
        self, layer: Linear, *, quantum: float, threshold: float = 0.0, refresh: int = 0
    ) -> None:
        self.layer, self.quantum, self.threshold = layer, quantum, threshold
        self.refresh = refresh
        self.length: int | None = None
        self.size: Tensor | None = None
        self.counting = False
        self.reset()
        self.clear()

    def reset(self) -> None:
        """Forget the stream: the next frame is a clip's first."""
        self._sent: Tensor | None = None
        self._sum: Tensor | None = None
        self._frame = 0

    def clear(self) -> None:
        """Set the counters to zero."""
        self.done = self.dense = self.later_done = self.later_dense = 0
        self.sent = self.entries = 0

    def __call__(self, input: Tensor) -> Tensor:
        if self.length is not None:
            return self._clip(input, self.length)
        return self._step(input)

    def _step(self, x: Tensor) -> Tensor:
        seen = quantise(x, self.quantum)
        sent = torch.zeros_like(seen) if self._sent is None else self._sent
        if sent.shape != seen.shape:
            raise GossamerError(
                f"a frame of shape {tuple(seen.shape)} follows one of {tuple(sent.shape)}; call "
                "reset() before a new clip"
            )
        delta = self._change(seen, sent)
        self._sent = sent + delta
        self._count(delta, first=self._frame == 0)
        whole = self.refresh > 0 and self._frame % self.refresh == 0
        part = self._integrand(self._sent if whole or self._sum is None else delta)
        self._sum = part if whole or self._sum is None else self._sum + part
        self._frame += 1
        return self._biased(self._sum)

    def _clip(self, x: Tensor, length: int) -> Tensor:
        seen = quantise(x, self.quantum).unflatten(0, (-1, length))
        if self.threshold == 0:
            delta = torch.diff(seen, dim=1, prepend=torch.zeros_like(seen[:, :1]))
        else:
            sent, changes = torch.zeros_like(seen[:, 0]), []
            for frame in seen.unbind(1):
                changes.append(self._change(frame, sent))
                sent = sent + changes[-1]
            delta = torch.stack(changes, 1)
        self.size = delta.abs().mean()
        parts = self._integrand(delta.flatten(0, 1)).unflatten(0, (-1, length))
        return self._biased(parts.cumsum(1).flatten(0, 1))

    def _change(self, seen: Tensor, sent: Tensor) -> Tensor:
        delta = seen - sent
        return delta if self.threshold == 0 else delta.masked_fill(delta.abs() < self.threshold, 0)

    def _integrand(self, delta: Tensor) -> Tensor:
        return _product(self.layer, delta, self.layer.weight)

    def _biased(self, total: Tensor) -> Tensor:
        bias = self.layer.bias
        if bias is None:
            return total
        if isinstance(self.layer, nn.Linear):
            return total + bias
        return total + bias.view(-1, *[1] * (self.layer.weight.dim() - 2))

    def _count(self, delta: Tensor, *, first: bool) -> None:
        if not self.counting:
            return
        self.sent, self.entries = self.sent + int((delta != 0).sum()), self.entries + delta.numel()
        done = multiply_adds(self.layer, delta != 0)
        dense = multiply_adds(self.layer, torch.ones_like(delta, dtype=torch.bool))
        self.done, self.dense = self.done + done, self.dense + dense
        if not first:
            self.later_done, self.later_dense = self.later_done + done, self.later_dense + dense

    def install(self) -> Callable[[], None]:
        """Take the place of the layer's forward; calling what is returned gives it back."""
        own: Any = vars(self.layer).get("forward")
        self.layer.forward = self.__call__

        def back() -> None:
            if own is None:
                vars(self.layer).pop("forward", None)
            else:
                self.layer.forward = own

        return back
