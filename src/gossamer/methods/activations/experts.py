"""The hidden units of stacked experts, which no module boundary shows.

transformers keeps a layer's experts in two stacked parameters and may run them through fused
grouped products, so the input of the down projection cannot be hooked. While a gate sits there
the stack runs expert by expert, as its plain definition does. Shapes: N = tokens, E = experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name

from gossamer.core import GossamerError
from gossamer.methods.activations.positions import Positions

__all__ = ["Mask", "hook_down"]

# (activation, its dense rows, its counted rows) to what goes on.
Mask = Callable[[Tensor, Any, Any], Tensor]


class _Forward:
    """Handle of a replaced forward; ``remove`` puts the class's own back."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self.module, self.before = module, module.__dict__.get("forward")
        module.__dict__["forward"] = forward

    def remove(self) -> None:
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before


def hook_down(
    module: Any, mask: Mask, positions: Positions, counting: Callable[[], bool]
) -> _Forward:
    """Mask the input of every expert's down projection.

    Parameters
    ----------
    module : a stack with ``gate_up_proj`` (E, 2F, H) and ``down_proj`` (E, H, F).
    mask : (activation (n, F), dense rows, counted rows) to the masked activation.

    Raises
    ------
    GossamerError
        For a stack of another layout: with biases, transposed, or without a gate.
    """
    if module.has_bias or module.is_transposed or not module.has_gate:
        raise GossamerError(
            f"experts of {type(module).__name__} have biases, transposed weights or no gate; "
            "their hidden units cannot be masked: choose roles without experts.down"
        )

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden, dtype=torch.float32)
        dense = positions.dense(hidden)
        counted = positions.counted(hidden) if counting() else None
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            inner = module._apply_gate(F.linear(hidden[token], module.gate_up_proj[expert]))
            inner = mask(
                inner,
                None if dense is None else dense[token],
                None if counted is None else counted[token],
            )
            part = F.linear(inner, module.down_proj[expert])
            out.index_add_(0, token, (part * top_k_weights[token, slot, None]).float())
        return out.to(hidden.dtype)

    return _Forward(module, forward)
