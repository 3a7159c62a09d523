"""Generation: how long a sparse model says exactly what the dense one would have said."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.evaluate.forward import Decoder, device_of, evaluating

__all__ = ["GenerationAgreement", "continuations", "generation_agreement"]

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class GenerationAgreement:
    """How far greedy continuations follow the dense model's.

    Parameters
    ----------
    match : share of generated tokens equal to the dense model's at the same place. After the
        first difference both models continue different texts, so this falls fast.
    prefix : mean number of tokens before the first difference (the full length if none).
    prefix_share : ``prefix`` as a share of the generated length.
    exact : share of prompts continued without any difference.
    prefixes : tokens before the first difference, a number for each prompt.
    prompts, new_tokens : how many prompts were continued by how many tokens.
    """

    match: float
    prefix: float
    prefix_share: float
    exact: float
    prefixes: tuple[int, ...]
    prompts: int
    new_tokens: int


def _as_prompts(prompts: Prompts) -> list[Tensor]:
    items = [torch.as_tensor(p, dtype=torch.int64).reshape(-1).cpu() for p in prompts]
    if not items or any(len(item) == 0 for item in items):
        raise GossamerError("a continuation needs at least one prompt of at least one token")
    return items


def continuations(
    model: nn.Module, prompts: Prompts, *, new_tokens: int = 64, batch_size: int = 8
) -> Tensor:
    """Continue token prompts greedily.

    Parameters
    ----------
    prompts : (B, T) tensor, or token lists of different lengths. Prompts of one length are run
        together, so no padding is ever needed and any causal model gives its exact answer.
    new_tokens : tokens added to each; an end-of-text token is a token like any other.

    Returns
    -------
    (B, new_tokens) int64 on the CPU, in the order of the prompts.

    Raises
    ------
    GossamerError
        On no prompt, an empty prompt, or fewer than one new token.
    """
    if not isinstance(new_tokens, int) or new_tokens < 1:
        raise GossamerError(f"new_tokens is {new_tokens!r}; give a whole number, at least 1")
    items = _as_prompts(prompts)
    result = torch.empty(len(items), new_tokens, dtype=torch.int64)
    by_length: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        by_length.setdefault(len(item), []).append(index)
    device = device_of(model)
    with evaluating(model):
        for members in by_length.values():
            for low in range(0, len(members), batch_size):
                group = members[low : low + batch_size]
                ids = torch.stack([items[i] for i in group]).to(device)
                result[group] = Decoder(model).decode(ids, new_tokens).cpu()
    return result


def generation_agreement(
    model: nn.Module, prompts: Prompts, dense: Tensor, *, batch_size: int = 8
) -> GenerationAgreement:
    """Compare a model's greedy continuations with the dense model's.

    Parameters
    ----------
    prompts : what both models continue.
    dense : (B, new_tokens) the dense model's :func:`continuations` of the same prompts.

    Raises
    ------
    GossamerError
        If there is not one dense continuation for each prompt.
    """
    items = _as_prompts(prompts)
    if dense.dim() != 2 or len(dense) != len(items):
        raise GossamerError(
            f"{len(items)} prompts need {len(items)} dense continuations (B, new_tokens); "
            f"got {tuple(dense.shape)}"
        )
    new = dense.shape[1]
    equal = continuations(model, items, new_tokens=new, batch_size=batch_size) == dense.cpu()
    prefixes = equal.long().cumprod(1).sum(1)
    prefix = float(prefixes.double().mean())
    return GenerationAgreement(
        match=float(equal.double().mean()),
        prefix=prefix,
        prefix_share=prefix / new,
        exact=float((prefixes == new).double().mean()),
        prefixes=tuple(prefixes.tolist()),
        prompts=len(items),
        new_tokens=new,
    )
