"""Window attention written as loops over rows, heads, queries and keys, in fp64."""

import torch
from torch import Tensor


def window_keys(real: list[int], query: int, sink: int, recent: int) -> list[int]:
    """Absolute indices a query reads, given the absolute indices of its row's real tokens."""
    if query not in real:
        return []
    past = [k for k in real if k <= query]
    return sorted({*real[:sink], *past[-recent:]} & set(past))


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: list[list[list[int]]],
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention over listed keys: ``kept[row][q]`` are key places; rows without keys give 0."""
    query, key, value = query.double(), key.double(), value.double()
    rows, heads, queries, width = query.shape
    group = heads // key.shape[1]
    out = query.new_zeros(rows, heads, queries, value.shape[-1])
    for b in range(rows):
        for h in range(heads):
            for q in range(queries):
                keys = kept[b][q]
                if not keys:
                    continue
                score = key[b, h // group, keys] @ query[b, h, q]
                score = score * (width**-0.5 if scale is None else scale)
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                weight = score.exp()
                total = weight.sum()
                if sink_logits is not None:
                    total = total + sink_logits[h].double().exp()
                out[b, h, q] = (weight / total) @ value[b, h // group, keys]
    return out
