"""How far each layer moves the hidden states: layers that move them little can spare tokens.

Shapes: L = layers, B = batch, T = tokens, C = model width.
"""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models import Tokens, find_sites
from gossamer.models.capture import evaluating, hidden_of

__all__ = ["calm_layers", "profile_drift", "relative_drift"]


def relative_drift(before: Tensor, after: Tensor, real: Tensor | None = None) -> float:
    """Mean over tokens of |after - before| / |before|.

    Parameters
    ----------
    before, after : (B, T, C). real : bool, (B, T), tokens that count; None for all.
    """
    moved = (after - before).float().norm(dim=-1) / (before.float().norm(dim=-1) + 1e-8)
    return float(moved.mean() if real is None else moved[real].mean())


def calm_layers(drift: list[float], quantile: float) -> tuple[int, ...]:
    """Layers whose share of the total drift is at most the quantile of all shares.

    >>> calm_layers([4.0, 1.0, 2.0, 1.0], 0.5)
    (1, 3)
    """
    shares = torch.tensor(drift, dtype=torch.float64)
    shares = shares / shares.sum()
    edge = torch.quantile(shares, quantile)
    return tuple((shares <= edge).nonzero()[:, 0].tolist())


@torch.no_grad()
def profile_drift(model: nn.Module, tokens: Tokens) -> list[float]:
    """The drift of every block on some windows, one number per block."""
    drift: dict[int, list[float]] = {}
    device = next(model.parameters()).device
    real: list[Tensor | None] = [None]
    body = getattr(model, "base_model", model)
    with _watching(model, drift, real), evaluating(model):
        for batch in tokens.batches(1, device):
            mask = batch.get("attention_mask")
            real[0] = None if mask is None else mask.bool()
            body(**batch, use_cache=False)
    return [sum(drift[layer]) / len(drift[layer]) for layer in sorted(drift)]


@contextmanager
def _watching(model: nn.Module, drift: dict[int, list[float]], real: list[Tensor | None]) -> Any:
    handles: list[Any] = []

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            drift.setdefault(layer, []).append(relative_drift(before, hidden_of(out), real[0]))

        return hook

    try:
        for layer, path in enumerate(find_sites(model).blocks):
            block = model.get_submodule(path)
            handles.append(block.register_forward_hook(watch(layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
