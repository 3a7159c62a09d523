"""Gradual magnitude pruning: the smallest weights go while the network trains, fast at first.

Source: arXiv 1710.01878; the cubic schedule is :class:`gossamer.core.schedule.Window`.
"""

from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.core import Budget, GossamerError, Pattern, Selection
from gossamer.core.schedule import Window
from gossamer.core.scores import magnitude
from gossamer.methods.weights.convnets.sites import ConvSite
from gossamer.methods.weights.retrain.loop import Plan, batch_of, orders
from gossamer.methods.weights.retrain.masks import holding, mask_gradients
from gossamer.models import Inputs, Progress
from gossamer.models.fit import in_float32, undisturbed

__all__ = ["classification_loss", "gradual"]

_UPDATES = 50  # mask updates over the pruning window
_END = 0.75  # share of the steps after which the masks stand still


def classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of a classifier's outputs, or of their ``logits``.

    Computed here, because models of transformers write into their configuration when they do.

    Parameters
    ----------
    batch : keyword arguments of the model, and ``labels``: (N,) class numbers.

    Raises
    ------
    GossamerError
        If the outputs are no (N, classes) or the labels no class numbers.
    """
    labels = batch["labels"]
    found = model(**{name: value for name, value in batch.items() if name != "labels"})
    logits = getattr(found, "logits", found)
    numbers = labels.dim() == 1 and not labels.is_floating_point()
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not numbers:
        raise GossamerError(
            f"training takes a classifier with (N, classes) outputs and class numbers as labels; "
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return cross_entropy(logits.float(), labels)


def gradual(
    model: nn.Module,
    sites: tuple[ConvSite, ...],
    data: Inputs,
    *,
    sparsity: float,
    pattern: Pattern,
    plan: Plan,
    progress: Progress | None = None,
) -> list[float]:
    """Train a model in place while its sites become sparse, all of them alike.

    The sparsity rises cubically over the first three quarters of the steps, in at most 50
    updates of the masks; a weight once removed stays zero, and so do its Adam moments.

    Parameters
    ----------
    data : keyword arguments of the model, ``labels`` among them.
    plan : steps, batch size, peak learning rate, seed.

    Returns
    -------
    The loss before every update.

    Raises
    ------
    GossamerError
        If the loss stops being a number.
    """
    schedule = Window(sparsity, plan.steps, 0.0, _END)
    end = round(plan.steps * _END)
    every = max(1, -(-end // _UPDATES))
    starts = [*range(0, end, every), end]
    rows = list(orders(len(data), plan))
    device, losses = next(model.parameters()).device, []
    with undisturbed(model), in_float32(model), torch.enable_grad():
        torch.manual_seed(plan.seed)
        model.train()
        for parameter in model.parameters():
            parameter.grad = None
        trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
        optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=plan.weight_decay)
        for first, last in zip(starts, [*starts[1:], plan.steps], strict=True):
            masks = _masks(model, sites, pattern, schedule.at(first).sparsity)
            with holding(optimizer, model, masks) as pairs:
                for step in range(first, last):
                    for group in optimizer.param_groups:
                        group["lr"] = plan.lr * plan.rate(step)
                    loss = classification_loss(model, batch_of(data, rows[step], device))
                    losses.append(float(loss.detach()))
                    if not isfinite(losses[-1]):
                        raise GossamerError(
                            f"the loss is {losses[-1]} at step {step + 1} of {plan.steps}; lower "
                            f"the learning rate (lr is {plan.lr:g})"
                        )
                    loss.backward()
                    mask_gradients(pairs)
                    if plan.clip is not None:
                        nn.utils.clip_grad_norm_(trained, plan.clip)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if progress is not None:
                        done = schedule.at(first).sparsity
                        progress(step + 1, plan.steps, f"gradual pruning, sparsity {done:.1%}")
    return losses


def _masks(
    model: nn.Module, sites: tuple[ConvSite, ...], pattern: Pattern, sparsity: float
) -> dict[str, Tensor]:
    """Masks by parameter, in the parameters' own shape."""
    masks = {}
    for site in sites:
        kept = select(site.weight(model), pattern, sparsity).mask()
        masks[f"{site.module}.{site.parameter}"] = kept.view(*site.shape, 1, 1)
    return masks


def select(weight: Tensor, pattern: Pattern, sparsity: float) -> Selection:
    """The largest weights of a matrix (O, I), or blocks of them."""
    return pattern.select(magnitude(weight), Budget(sparsity=sparsity))
