"""Batch normalisation after averaging: the mean of running statistics is not the mean's statistics.

An averaged network sends other activations through its layers than any of its members, so its
running statistics are measured anew on training data.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core import check_count
from gossamer.methods.weights.retrain.loop import batch_of
from gossamer.models import Inputs, Tokens
from gossamer.models.fit import undisturbed

__all__ = ["batch_norms", "recompute_batchnorm"]


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Modules with running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module,
    data: Tokens | Inputs,
    *,
    batch_size: int = 8,
    forward: Callable[[nn.Module, dict[str, Tensor]], object] | None = None,
) -> int:
    """Measure the running statistics of all batch norms on data, as plain means over batches.

    Everything else runs in evaluation mode. Models without batch norm are left alone.

    Parameters
    ----------
    batch_size : samples a batch; a last batch of one sample, which has no variance, is left out.
    forward : runs the model on a batch; by default ``model(**batch)``.

    Returns
    -------
    Number of modules measured.
    """
    norms = batch_norms(model)
    if not norms:
        return 0
    check_count("batch_size", batch_size, 2)
    run = forward or (lambda net, batch: net(**batch))
    device = next(model.parameters()).device
    momenta = [norm.momentum for norm in norms]
    with undisturbed(model):
        model.eval()
        try:
            for norm in norms:
                norm.reset_running_stats()  # type: ignore[operator]
                norm.momentum = None  # type: ignore[assignment]
                norm.train()
            for rows in torch.arange(len(data)).split(batch_size):
                if len(rows) > 1 or len(data) == 1:
                    run(model, batch_of(data, rows, device))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum  # type: ignore[assignment]
    return len(norms)
