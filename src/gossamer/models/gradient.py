"""Gradients of a model's own loss with respect to every site, one batch at a time.

Shapes: O and I sides of a matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Accumulator, GossamerError, Site, Stat
from gossamer.models.capture import evaluating
from gossamer.models.data import Inputs, Tokens
from gossamer.models.sites import SiteMap

__all__ = ["gradients", "own_loss"]


def gradients(
    model: nn.Module, data: Tokens | Inputs, sites: SiteMap, *, batch_size: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and mean square of the loss gradient of every site's weights over batches.

    Parameters
    ----------
    batch_size : sequences per gradient; with 1 the mean square is the empirical Fisher
        information per sequence.

    Returns
    -------
    dict of str to (Tensor, Tensor)
        Site name to (mean g, mean g²), each (O, I) float32.

    Raises
    ------
    GossamerError
        If the model has no loss of its own on token ids.
    """
    owners = {
        (site.module, site.parameter): site.owner(model).get_parameter(site.parameter)
        for site in sites.sites
    }
    sums = {key: Stat.GRADIENT.accumulator(p.numel(), p.device) for key, p in owners.items()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles: list[Any] = []
    device = next(model.parameters()).device
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for key, parameter in owners.items():
            parameter.requires_grad_(True)
            take = _taker(sums[key])
            handles.append(parameter.register_post_accumulate_grad_hook(take))
        with evaluating(model), torch.enable_grad():
            for batch in data.batches(batch_size, device):
                own_loss(model, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites.sites:
        key = site.module, site.parameter
        shape = owners[key].shape
        mean, square = (_oriented(site, v.view(shape)) for v in sums[key].value())
        result[site.name] = mean, square
    return result


def _taker(accumulator: Accumulator) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        # Taken in and freed at once: never more than one weight's gradient is held.
        assert parameter.grad is not None
        accumulator.update(parameter.grad.reshape(1, -1))
        parameter.grad = None

    return take


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss a model of transformers computes itself; token ids are their own labels.

    Parameters
    ----------
    batch : keyword arguments of the model; padding and, where given, ``labels`` are respected.

    Raises
    ------
    GossamerError
        If the model computes none on this data.
    """
    if "labels" not in batch and "input_ids" in batch:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        batch = {**batch, "labels": labels}
    try:
        loss = model(**batch).loss
    except (AttributeError, TypeError):
        loss = None
    if loss is None:
        raise GossamerError(
            f"{type(model).__name__} computes no loss on this data; gradients need a causal "
            "language model, or inputs with labels"
        )
    return loss


def _oriented(site: Site, value: Tensor) -> Tensor:
    if site.expert is not None:
        value = value[site.expert]
    return value.T if site.transposed else value
