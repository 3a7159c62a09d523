"""Meeting a model's attention where it happens: torch's own fused function.

Masked-diffusion models (LLaDA, Dream) bring their own code, which reads none of transformers'
tables, but it calls ``scaled_dot_product_attention``. A torch function mode, open while the model
runs, sees those calls, in the order of the layers. Nothing is patched, and no other model sees it.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.core import GossamerError
from gossamer.methods.attention.diffusion.blocks import everything
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout

__all__ = ["AttentionCalls", "bidirectional_layout", "met"]

Attend = Callable[[Call, Layout, int], Tensor]

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_FUSED = nn.functional.scaled_dot_product_attention


class AttentionCalls(TorchFunctionMode):
    """While open, fused attention calls go to ``attend``, numbered from 0.

    Attributes
    ----------
    count : calls met so far.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend, self.count = attend, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _FUSED:
            return func(*args, **kwargs)
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        call, layout = met(**given)
        layer, self.count = self.count, self.count + 1
        return self._attend(call, layout, layer)

    def __enter__(self) -> Self:
        self.count = 0
        return super().__enter__()


def met(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Call, Layout]:
    """A fused attention call as ours; arguments as torch names them.

    Key-value heads that several query heads share are repeated: the choice is each head's own.

    Raises
    ------
    GossamerError
        If the call is causal, attends to another sequence, or its mask is more than padding.
    """
    if is_causal or query.shape[2] != key.shape[2]:
        kind = "a causal mask" if is_causal else f"{query.shape[2]} queries, {key.shape[2]} keys"
        raise GossamerError(
            f"a bidirectional model attends over the whole sequence at every step; this call has "
            f"{kind}: switch caches off, and give a masked-diffusion model"
        )
    if enable_gqa and query.shape[1] != key.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    call = Call(query, key, value, scale=scale, dropout=dropout_p)
    return call, bidirectional_layout(query, attn_mask)


def bidirectional_layout(query: Tensor, mask: Tensor | None = None) -> Layout:
    """The layout of a call in which every token sees every real token.

    Parameters
    ----------
    query : (B, H, Q, D). mask : (B or 1, 1, Q or 1, Q), bool or additive, or None.

    Raises
    ------
    GossamerError
        If the mask differs by query or by head.
    """
    batch, _, length, _ = query.shape
    padding = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = seen.expand(batch, *seen.shape[1:]) if seen.dim() == 4 else seen
        same = seen.dim() == 4 and seen.shape[1] == 1 and bool((seen == seen[:, :, :1]).all())
        if not same or seen.shape[3] != length:
            raise GossamerError(
                f"an attention mask of shape {tuple(mask.shape)} is more than padding; give one "
                "that hides the same keys from every query"
            )
        padding = None if bool(seen.all()) else seen[:, 0, 0]
    return Layout(
        batch, length, length, rule=everything, padding=padding, causal=False, device=query.device
    )
