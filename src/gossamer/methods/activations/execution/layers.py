"""Single layers on the gathered products, for models whose step does not run as one native call.

The gate's hook has already put zeros in the input; the layer skips the channels that are zero for
all rows. So every score and site that masks by zeros is served, whatever the model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.core import GossamerError
from gossamer.kernels.gather_gemv.native import linear_of
from gossamer.kernels.gather_gemv.op import run_linear
from gossamer.kernels.gather_gemv.rows import Rows, rows

__all__ = ["Replaced", "StandIn", "head_forward", "sparse_forward", "unchanged"]


class StandIn:
    """What runs in place of a module's own forward, with the same signature."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.__wrapped__ = module.forward
        self.run = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        # A copy would go on reading the weights of the model it was made from.
        raise GossamerError("an accelerated model cannot be copied; call decelerate() first")


class Replaced:
    """Handle of a replaced forward; ``remove`` puts the one before back."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.before = module, module.__dict__.get("forward")
        module.__dict__["forward"] = StandIn(module, forward)

    def remove(self) -> None:
        """Put back what was there; a second call does nothing."""
        if "forward" in self.module.__dict__:
            if self.before is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.before
            self.before = None


def _few(x: Tensor, most: int) -> int:
    """Rows of x if a kernel takes them, else 0."""
    count = x.shape[:-1].numel()
    return count if 1 <= count <= most and not torch.is_grad_enabled() else 0


def unchanged(module: nn.Module) -> Callable[[], bool]:
    """Tells whether a module's weight is still what it is now, where it is now."""
    weight: Any = module.weight
    place, tracked = weight.data_ptr(), not weight.is_inference()
    version = weight._version if tracked else 0

    def same() -> bool:
        return (
            module.weight is weight
            and weight.data_ptr() == place
            and (not tracked or weight._version == version)
        )

    return same


def sparse_forward(
    own: Callable[[Tensor], Tensor],
    layer: Rows,
    most: int,
    seen: Tensor | None = None,
    fresh: Callable[[], bool] = lambda: True,
) -> Callable[[Tensor], Tensor]:
    """A forward that skips the input channels that are zero, for up to ``most`` rows.

    Parameters
    ----------
    own : the module's own forward, for everything else, such as inputs of another width.
    fresh : whether the rows still hold the module's weight; without it ``own`` runs (on CPU).
    """
    out, wide = layer.out_features, layer.in_features
    zero = torch.zeros(1, device=layer.weight.device)
    if layer.weight.device.type == "cuda":

        def on_device(x: Tensor) -> Tensor:
            if x.shape[-1] != wide or not _few(x, most):
                return own(x)
            flat = x.reshape(-1, x.shape[-1])
            # The operator, not the function: compilers and graphs see one call.
            y = torch.ops.gossamer.axpy_gemv(
                flat, layer.weight, layer.scale, layer.bias, zero, None
            )
            return y.view(*x.shape[:-1], out)

        return on_device
    made = linear_of(layer, zero, seen)

    def forward(x: Tensor) -> Tensor:
        # A kernel would read beyond an input of another width.
        if x.shape[-1] != wide or not _few(x, most) or not fresh():
            return own(x)
        return run_linear(made, x.reshape(-1, x.shape[-1]), out).view(*x.shape[:-1], out)

    return forward


def head_forward(module: nn.Linear, most: int) -> Callable[[Tensor], Tensor]:
    """A forward of the head that reads it at full bandwidth where it lies, for a few rows."""
    layer = rows(module.weight, module.bias, major="output")
    made, place = linear_of(layer), layer.weight.data_ptr()

    def forward(x: Tensor) -> Tensor:
        # Weights that were moved or cast since are the module's own affair.
        if (
            x.shape[-1] != layer.in_features
            or not _few(x, most)
            or module.weight.data_ptr() != place
        ):
            return linear(x, module.weight, module.bias)
        found = run_linear(made, x.reshape(-1, x.shape[-1]), layer.out_features)
        return found.view(*x.shape[:-1], -1)

    return forward
