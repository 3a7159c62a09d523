"""Intervention: an explanation is right about a latent if pushing it makes the model say so.

Shapes: N = prompts, T = tokens, D = width of the module's output, V = vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.hooks import find_module, hidden_of, with_hidden
from gossamer.methods.features.interp.judges import Judge

__all__ = ["Strength", "find_strength", "intervention", "pushed"]


@dataclass(frozen=True)
class Strength:
    """How far to push.

    Parameters
    ----------
    value : times the direction. kl : mean divergence of the next token there, in nats.
    steps : strengths tried. hit : whether ``kl`` is as near the target as asked.
    """

    value: float
    kl: float
    steps: int
    hit: bool


@contextmanager
def pushed(model: nn.Module, hook: str, direction: Tensor, strength: float) -> Iterator[None]:
    """Inside, ``strength * direction`` is added to a module's output at every token."""

    def push(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output, hook)
        added = strength * direction.to(hidden.device, torch.float32)
        return with_hidden(output, (hidden.float() + added).to(hidden.dtype))

    handle = find_module(model, hook).register_forward_hook(push)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _next(model: nn.Module, ids: Tensor) -> Tensor:
    """(N, V) float64 log-probabilities of the token after each prompt."""
    return model(input_ids=ids).logits[:, -1].double().log_softmax(-1)


def find_strength(
    model: nn.Module,
    ids: Tensor,
    hook: str,
    direction: Tensor,
    *,
    target: float = 0.5,
    tolerance: float = 0.1,
    most: int = 10,
    start: float = 1.0,
) -> Strength:
    """The strength at which the next token's distribution moves by KL(clean ‖ pushed) = target.

    Two strengths that move it too little and too much are looked for, then narrowed by false
    position on log KL.

    Parameters
    ----------
    ids : (N, T) prompts of one length. direction : (D,).
    target : mean nats. tolerance : share of it. most : tries.

    Raises
    ------
    GossamerError
        For a target or tolerance not above 0.
    """
    if not target > 0 or not tolerance > 0:
        raise GossamerError(f"target {target!r} and tolerance {tolerance!r} must be above 0")
    clean = _next(model, ids)

    def moved(strength: float) -> float:
        with pushed(model, hook, direction, strength):
            new = _next(model, ids)
        return float((clean.exp() * (clean - new)).sum(-1).mean())

    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    best, at = None, start
    for step in range(1, most + 1):
        kl = max(moved(at), 1e-12)
        gap = math.log(kl / target)
        hit = abs(kl - target) <= tolerance * target
        tried = Strength(at, kl, step, hit)
        if hit:
            return tried
        if best is None or abs(gap) < abs(math.log(best.kl / target)):
            best = tried
        # The end that stays counts half the next time (Illinois), so that both ends close in.
        if gap < 0:
            low, high = (at, gap), None if high is None else (high[0], high[1] / 2)
        else:
            low, high = None if low is None else (low[0], low[1] / 2), (at, gap)
        if low is None or high is None:
            # Small pushes act by their square; far extrapolation meets another regime.
            at *= min(3.0, max(1 / 3, math.exp(-gap / 2)))
        else:
            at = (low[0] * high[1] - high[0] * low[1]) / (high[1] - low[1])
    assert best is not None
    return replace(best, steps=most)


@torch.no_grad()
def _continued(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """(N, tokens) greedy continuations."""
    made = ids
    cache = None
    for _ in range(tokens):
        part = made if cache is None else made[:, -1:]
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        made = torch.cat([made, out.logits[:, -1:].argmax(-1)], 1)
    return made[:, ids.shape[1] :]


def intervention(
    judge: Judge,
    explanation: str,
    model: nn.Module,
    ids: Tensor,
    hook: str,
    direction: Tensor,
    say: Callable[[int], str],
    *,
    target: float = 0.5,
    tokens: int = 8,
    found: Strength | None = None,
) -> float:
    """How much less surprising the explanation is after text written under the push, in nats.

    The model's own text and that of the pushed model are shown to the judge, the explanation
    behind it. Compare with random directions, pushed as far: 0 is no better than not pushing.

    Parameters
    ----------
    ids : (N, T) prompts; the paper takes 40. tokens : written after each.
    found : strength to use; None searches it.
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    found = found or find_strength(model, ids, hook, direction, target=target)
    clean = _continued(model, ids, tokens)
    with pushed(model, hook, direction, found.value):
        moved = _continued(model, ids, tokens)

    def told(rows: Tensor) -> Sequence[str]:
        texts = ("".join(say(int(i)) for i in row).strip() for row in rows)
        return [f"{text}\nThis text is about: " for text in texts]

    asked = [explanation] * len(ids)
    before, after = judge.loss(told(clean), asked), judge.loss(told(moved), asked)
    return (sum(before) - sum(after)) / len(ids)
