"""Heads: what every attention head of a model writes, and what the model does without one.

A head's output is its slice of the output projection's input, times its columns of the matrix.
Shapes: N = examples, T = tokens, L = blocks, H = heads, E = width of a head, D = hidden width,
V = vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Site
from gossamer.methods.features.hooks import find_module, input_of, record, with_input
from gossamer.models import find_sites

__all__ = [
    "ablated",
    "ablation_effects",
    "head_count",
    "head_inputs",
    "head_outputs",
    "output_sites",
]


def output_sites(model: nn.Module) -> tuple[Site, ...]:
    """The attention output projection of every block.

    Raises
    ------
    GossamerError
        If the model has none.
    """
    found = find_sites(model).select("attention.o")
    if not found:
        raise GossamerError(
            f"{type(model).__name__} has no attention output projection; its heads cannot be told "
            "apart"
        )
    return found


def head_count(model: nn.Module) -> int:
    """H, as the model's configuration says."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise GossamerError(
            f"{type(model).__name__}'s configuration names no num_attention_heads; its heads "
            "cannot be told apart"
        )
    return heads


def head_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the heads hand to their output projections: (L, N, T, H, E), from one forward pass."""
    sites, heads = output_sites(model), head_count(model)
    found = record(model, tuple(f"{site.module}:in" for site in sites), inputs)
    shape = inputs[next(iter(inputs))].shape[:2]
    rows = [found[f"{site.module}:in"].float() for site in sites]
    return torch.stack([row.reshape(*shape, heads, -1) for row in rows])


@torch.no_grad()
def head_outputs(model: nn.Module, inputs: Mapping[str, Tensor], at: int = -1) -> Tensor:
    """What every head writes to the residual stream at one position: (N, L H, D).

    Parameters
    ----------
    at : the position; the last one is where the answer is predicted.
    """
    written = []
    for site, given in zip(output_sites(model), head_inputs(model, inputs), strict=True):
        weight = site.weight(model).float().unflatten(1, (given.shape[2], -1))
        written.append(torch.einsum("nhe,dhe->nhd", given[:, at], weight))
    return torch.cat(written, dim=1)


@contextmanager
def ablated(model: nn.Module, heads: Tensor, means: Tensor) -> Iterator[None]:
    """While open, some heads say the same whatever they see.

    Parameters
    ----------
    heads : bool (L, H), those that are silenced.
    means : (L, H, E) or (L, T, H, E), what they hand to the output projection instead.
    """
    with ExitStack() as stack:
        for block, site in enumerate(output_sites(model)):
            if not bool(heads[block].any()):
                continue
            hook = _Silence(heads[block], means[block], site.module)
            module = find_module(model, site.module)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _Silence:
    """A pre-hook of an output projection that overwrites the slices of some heads."""

    def __init__(self, heads: Tensor, means: Tensor, path: str) -> None:
        self.heads, self.means, self.path = heads, means, path

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = input_of(args, kwargs, self.path)
        split = given.unflatten(-1, (len(self.heads), -1)).clone()
        means = self.means.to(split)
        split[..., self.heads, :] = means[..., self.heads, :].expand(*split.shape[:-2], -1, -1)
        return with_input(args, kwargs, split.flatten(-2))


@torch.no_grad()
def ablation_effects(model: nn.Module, ids: Tensor, corrupted: Tensor, right: Tensor) -> Tensor:
    """What each head is worth for a task, (L, H): the loss of log odds when it alone is ablated.

    An ablated head hands over, at every position, its mean over the corrupted twins. The log odds
    are those of all right next tokens against all others, in nats, averaged over the examples.

    Parameters
    ----------
    ids, corrupted : int64 (N, T). right : bool (N, V).
    """
    means = head_inputs(model, {"input_ids": corrupted}).mean(1)
    dense = _log_odds(model, ids, right)
    effects = torch.zeros(len(means), means.shape[2], dtype=torch.float64)
    for block, head in torch.ones_like(effects).nonzero().tolist():
        only = torch.zeros_like(effects, dtype=torch.bool)
        only[block, head] = True
        with ablated(model, only, means):
            effects[block, head] = dense - _log_odds(model, ids, right)
    return effects


def _log_odds(model: nn.Module, ids: Tensor, right: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[:, -1].double()
    good = logits.masked_fill(~right, -torch.inf).logsumexp(1)
    bad = logits.masked_fill(right, -torch.inf).logsumexp(1)
    return float((good - bad).mean())
