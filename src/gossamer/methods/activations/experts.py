"""The hidden units of stacked experts, which no module boundary shows.

transformers keeps a layer's experts in two stacked parameters and may run them through fused
grouped products, so the input of the down projection cannot be hooked. While a gate sits there
the stack runs expert by expert, as its plain definition does. Shapes: N = tokens, E = experts.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name

from gossamer.core import GossamerError
from gossamer.methods.activations.positions import Positions

__all__ = ["Mask", "Where", "hook_down"]

# (activation, its dense rows, its counted rows) to what goes on.
Mask = Callable[[Tensor, Any, Any], Tensor]


Where = Literal["down", "neurons", "up"]


class _Forward:
    """Handle of a replaced forward; ``remove`` puts the class's own back.

    Attributes
    ----------
    expert : the expert that runs now.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.__dict__.get("forward")
        self.expert = 0

    def put(self, forward: Callable[..., Tensor]) -> "_Forward":
        """Replace the forward."""
        self.module.__dict__["forward"] = forward
        return self

    def remove(self) -> None:
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before


def _split(module: Any, inner: Tensor) -> tuple[Tensor, Tensor]:
    """(activated gate, up) of an expert's first product."""
    gate, up = inner.chunk(2, dim=-1)
    return module.act_fn(gate), up


def _check_layout(module: Any, where: Where) -> None:
    if module.has_bias or module.is_transposed or not module.has_gate:
        raise GossamerError(
            f"experts of {type(module).__name__} have biases, transposed weights or no gate; "
            "their hidden units cannot be masked: choose roles without experts"
        )
    if where != "down":
        probe = torch.linspace(-2, 2, 8, device=module.down_proj.device)
        value, up = _split(module, probe[None])
        if not torch.equal(value * up, module._apply_gate(probe[None])):
            raise GossamerError(
                f"experts of {type(module).__name__} gate their hidden units in a way of their "
                "own; gate the input of their down projection instead"
            )


def hook_down(
    module: Any,
    mask: Mask,
    positions: Positions,
    counting: Callable[[], bool],
    where: Where = "down",
) -> _Forward:
    """Mask something of every expert's hidden units.

    Parameters
    ----------
    module : a stack with ``gate_up_proj`` (E, 2F, H) and ``down_proj`` (E, H, F).
    mask : (activation (n, F), dense rows, counted rows) to the masked activation.
    where : the input of the down projection, the activated gate before it is multiplied, or
        what the up projection gives.

    Raises
    ------
    GossamerError
        For a stack of another layout: with biases, transposed, or without a gate.
    """
    _check_layout(module, where)
    handle = _Forward(module)

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden, dtype=torch.float32)
        dense = positions.dense(hidden)
        counted = positions.counted(hidden) if counting() else None
        for expert in top_k_index.unique().tolist():
            handle.expert = expert
            token, slot = torch.where(top_k_index == expert)
            inner = F.linear(hidden[token], module.gate_up_proj[expert])
            rows = (
                None if dense is None else dense[token],
                None if counted is None else counted[token],
            )
            if where == "down":
                inner = mask(module._apply_gate(inner), *rows)
            else:
                value, up = _split(module, inner)
                if where == "neurons":
                    value = mask(value, *rows)
                else:
                    up = mask(up, *rows)
                inner = value * up
            part = F.linear(inner, module.down_proj[expert])
            out.index_add_(0, token, (part * top_k_weights[token, slot, None]).float())
        return out.to(hidden.dtype)

    return handle.put(forward)
