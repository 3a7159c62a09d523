"""Firings: every latent's values over some text, computed once.

Shapes: N = windows, T = tokens, M = latents.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import record
from gossamer.methods.features.interp.windows import Firings
from gossamer.models import Tokens, find_tokenizer

__all__ = ["firings_of", "pieces", "speller"]


@torch.no_grad()
def firings_of(
    model: nn.Module,
    tokens: Tokens,
    hook: str,
    dictionary: Dictionary,
    *,
    windows: int = 8,
    skip_first: bool = False,
) -> Firings:
    """Codes of every real token; rows the dictionary calls sinks are left out.

    Parameters
    ----------
    windows : of a forward pass. skip_first : leave out each window's first real token, which in
        many models is the start mark.
    """
    device = next(model.parameters()).device
    limit = dictionary.metadata.get("sink_norm")
    real = tokens.attention_mask.clone()
    if skip_first:
        real &= real.cumsum(1) > 1
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(tokens), windows):
        part = tokens.slice(start, start + windows)
        hidden = record(model, (hook,), next(part.batches(len(part), device)))[hook]
        rows = hidden.reshape(-1, hidden.shape[-1]).float()
        used = real[start : start + windows].flatten()
        if limit is not None:
            used = used & (rows.norm(dim=1).cpu() <= limit)
        at = used.nonzero()[:, 0]
        codes = dictionary.encode(rows[at.to(rows.device)]).to_csr()
        assert codes.indptr is not None
        flat = at.repeat_interleave(codes.indptr.diff().cpu())
        fired = (codes.values != 0).cpu()
        flat, latent = flat[fired], codes.indices.cpu()[fired]
        row, place = start + flat // part.length, flat % part.length
        parts.append((row, place, latent, codes.values.float().cpu()[fired]))
    joined = (torch.cat(column) for column in zip(*parts, strict=True))
    return Firings(tokens.input_ids, real, *joined, width=dictionary.d_sae)


def pieces(firings: Firings, length: int) -> Firings:
    """The same firings over pieces of each window: latents that fire in every long window are
    silent in some short ones."""
    ids, real = firings.ids, firings.real
    count = -(-ids.shape[1] // length)
    wide = count * length - ids.shape[1]
    return Firings(
        nn.functional.pad(ids, (0, wide)).view(-1, length),
        nn.functional.pad(real, (0, wide)).view(-1, length),
        firings.row * count + firings.place // length,
        firings.place % length,
        firings.latent,
        firings.value,
        firings.width,
    )


def speller(model: Any) -> Callable[[int], str]:
    """A token's text by the model's tokenizer; numbers where it has none."""
    try:
        tokenizer = find_tokenizer(model)
    except GossamerError:
        tokenizer = None
    if tokenizer is None:
        return lambda token: f" t{token}"
    # Alone, a token loses the blank before it; behind another it does not.
    lead = tokenizer.decode([0])

    def say(token: int) -> str:
        return tokenizer.decode([0, token])[len(lead) :]

    return say
