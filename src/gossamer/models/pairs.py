"""Pairs of inputs and labels, checked against a classifier.

Shapes: N samples, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.models.fit import meeting

__all__ = ["labelled_pair"]


@torch.no_grad()
def labelled_pair(data: Any, model: nn.Module, who: str) -> tuple[Tensor, Tensor]:
    """A pair of inputs (N, ...) and labels int64 (N,), on the model's device.

    Parameters
    ----------
    model : inputs to logits (N, C). who : asks, for the message.

    Raises
    ------
    GossamerError
        If it is no such pair, inputs are not finite, or a label is no class of the model.
    """
    pair = isinstance(data, tuple | list) and len(data) == 2
    if not pair or not all(isinstance(part, Tensor) for part in data):
        raise GossamerError(
            f"{who} takes a pair of tensors, inputs and labels; got {type(data).__name__}"
        )
    device = next(model.parameters()).device
    x, y = (part.to(device) for part in data)
    if len(x) != len(y) or not len(x) or y.dim() != 1 or y.is_floating_point():
        raise GossamerError(
            f"inputs are (N, ...), labels whole numbers (N,); got {tuple(x.shape)} and "
            f"{y.dtype} {tuple(y.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise GossamerError("inputs hold NaN or infinity; fill or drop those samples")
    modes = [(module, module.training) for module in model.modules()]
    try:
        with meeting(model, {"inputs": x[:1]}):
            classes = model.eval()(x[:1]).shape[-1]
    finally:
        for module, mode in modes:
            module.training = mode
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise GossamerError(
            f"labels go from {int(y.min())} to {int(y.max())}; the model has {classes} classes"
        )
    return x, y.long()
