"""Interaction between blocks of a language model: bases of the residual stream, and their edges.

Jacobians of whole windows are too large to make, so they are asked: a random sign for every output
gives one gradient, whose outer product with itself is right on average.
Shapes: B = windows, T = tokens, D = hidden width, K = directions, K' = of the next layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.hooks import find_module, hidden_of, record, with_hidden
from gossamer.methods.features.interaction.basis import (
    SMALLEST,
    Basis,
    interaction_basis,
    pca_basis,
)
from gossamer.models import Inputs, Progress, Tokens

__all__ = ["stream_bases", "stream_edges"]

Batches = Sequence[Mapping[str, Any]]


def batches_of(data: Tokens | Inputs, model: nn.Module, windows: int = 8) -> Batches:
    """Keyword arguments of the model for all of the data, a few windows at a time."""
    return list(data.batches(windows, next(model.parameters()).device))


def _real(batch: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """Bool (B, T): which tokens are no padding."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
        return mask.bool()
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def _rows(model: nn.Module, path: str, batches: Batches) -> Tensor:
    found = []
    for batch in batches:
        hidden = record(model, (path,), batch)[path]
        found.append(hidden[_real(batch, hidden)].float())
    rows = torch.cat(found)
    if not bool(torch.isfinite(rows).all()):
        raise GossamerError(
            f"activations of {path!r} hold NaN or infinity; load the model in float32"
        )
    return rows


def _between(model: nn.Module, path: str, after: str, batch: Mapping[str, Any]) -> Any:
    """Activations of two modules, the first a leaf of the graph that makes the second."""
    leaf: list[Tensor] = []
    out: list[Tensor] = []

    def start(module: nn.Module, args: Any, output: Any) -> Any:
        leaf.append(hidden_of(output, path).detach().requires_grad_())
        return with_hidden(output, leaf[-1])

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        if leaf:
            out.append(hidden_of(output, after))

    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.callback(find_module(model, path).register_forward_hook(start).remove)
        stack.callback(find_module(model, after).register_forward_hook(stop).remove)
        model.eval()
        try:
            with torch.enable_grad():
                model(**batch)
        finally:
            for module, training in modes:
                module.training = training
    if not leaf or not out or not out[-1].requires_grad:
        raise GossamerError(f"{after!r} does not follow from {path!r}; name modules in order")
    return leaf[-1], out[-1]


def _listening(
    model: nn.Module, path: str, after: str, basis: Basis, batches: Batches, draws: int, seed: int
) -> Tensor:
    """M' (D, D): mean over tokens of JᵀJ, J of all the next layer's features in a window."""
    generator = torch.Generator().manual_seed(seed)
    total: Tensor | None = None
    tokens = 0
    for batch in batches:
        leaf, out = _between(model, path, after, batch)
        real = _real(batch, out)
        for _ in range(draws):
            signs = 1.0 - 2.0 * torch.randint(
                2, (*out.shape[:2], basis.into.shape[1]), generator=generator
            )
            source = (signs.double().to(out.device) * real[..., None]) @ basis.into.T
            (grad,) = torch.autograd.grad(out, leaf, source.to(out.dtype), retain_graph=True)
            flat = grad[real].double()
            total = flat.T @ flat if total is None else total + flat.T @ flat
        tokens += draws * int(real.sum())
    assert total is not None
    return total / tokens


def stream_bases(
    model: nn.Module,
    paths: Sequence[str],
    data: Tokens | Inputs,
    *,
    draws: int = 8,
    smallest: float = SMALLEST,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Basis]:
    """Local interaction bases of modules' outputs, from the last backwards; the last gets PCA's.

    Parameters
    ----------
    paths : modules in the order they run, such as consecutive blocks.
    draws : random signs per window; more make M' less noisy.
    progress : called with layers done, layers in all, and what runs.
    """
    batches = batches_of(data, model)
    bases = [pca_basis(_rows(model, paths[-1], batches), smallest)]
    for done, (path, after) in enumerate(_pairs(paths), 1):
        m = _listening(model, path, after, bases[0], batches, draws, seed)
        bases.insert(0, interaction_basis(_rows(model, path, batches), m, smallest))
        if progress is not None:
            progress(done, len(paths) - 1, f"basis of {path}")
    return bases


def _pairs(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Neighbours, the last first."""
    yield from zip(reversed(paths[:-1]), reversed(paths[1:]), strict=True)


def stream_edges(
    model: nn.Module,
    path: str,
    after: str,
    basis: Basis,
    following: Basis,
    data: Tokens | Inputs,
    *,
    seed: int = 0,
) -> Tensor:
    """Mean squared interactions of two modules' features, (K', K), one gradient a feature.

    Random signs over the outputs' tokens stand for the sum over them.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(following.into.shape[1], basis.into.shape[1], dtype=torch.float64)
    tokens = 0
    for batch in batches_of(data, model, 64):
        leaf, out = _between(model, path, after, batch)
        real = _real(batch, out)
        for feature, direction in enumerate(following.into.T):
            signs = 1.0 - 2.0 * torch.randint(2, out.shape[:2], generator=generator)
            source = (signs.double().to(out.device) * real)[..., None] * direction
            (grad,) = torch.autograd.grad(out, leaf, source.to(out.dtype), retain_graph=True)
            total[feature] += (grad[real].double() @ basis.back.T).square().sum(0).cpu()
        tokens += int(real.sum())
    return total / tokens
