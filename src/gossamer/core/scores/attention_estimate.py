"""Cheap estimates of where attention mass lies, before any of it is computed.

Scores of the R query heads that share keys are averaged as probabilities: for a set of keys the
whole group reads, the best set by the mean keeps the most mass of the group.
Shapes: B = batch, G = key-value heads, R = query heads per key-value head, Q = queries,
K = keys, D = head width, n = blocks.
"""

import torch
from torch import Tensor

__all__ = [
    "block_means",
    "block_weights",
    "diagonal_blocks",
    "diagonal_sums",
    "jensen_shannon",
    "last_query_weights",
    "mass_count",
    "vertical_slash_mass",
]

_HELD = 1 << 24
"""Scores held at once."""


def last_query_weights(
    query: Tensor,
    key: Tensor,
    scale: float,
    seen: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention weights of a few queries, the mean over the heads that share keys.

    Parameters
    ----------
    query : (B, G, R, Q, D). key : (B, G, K, D). scale : factor on the scores.
    seen : bool, (B or 1, G or 1, Q, K), pairs the model lets through; None for all.
    softcap : scores become ``softcap * tanh(score / softcap)``; None leaves them.

    Returns
    -------
    (B, G, Q, K), fp32 (fp64 for fp64 inputs); rows sum to 1, or are 0 where nothing is seen.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    batch, shared, repeat, queries, width = query.shape
    mean = query.new_empty(batch, shared, queries, key.shape[2], dtype=exact)
    # One group and some queries at a time: many probes of a long text are a map of its square.
    step = max(1, _HELD // (repeat * key.shape[2] * batch))
    for group in range(shared):
        keys = key[:, group].to(exact).transpose(1, 2)
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            flat = query[:, group, :, rows].reshape(batch, -1, width)
            score = ((flat.to(exact) * scale) @ keys).view(batch, repeat, -1, key.shape[2])
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if seen is not None:
                own = seen[:, group if seen.shape[1] > 1 else 0, None, rows]
                score = score.masked_fill(~own, -torch.inf)
            mean[:, group, rows] = score.softmax(-1).nan_to_num_(0.0).mean(1)
    return mean


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sums along the diagonals that end in the last row: entry o holds the pairs o keys apart.

    Parameters
    ----------
    weights : (..., Q, K); the last query stands at the last key, nothing after a query's own key.

    Returns
    -------
    (..., K).

    >>> diagonal_sums(torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])).tolist()
    [7.0, 5.0, 3.0]
    """
    queries, keys = weights.shape[-2:]
    # Row r counted from the end, keys counted back from the last: offset o lies at o + r.
    back = torch.nn.functional.pad(weights.flip(-1, -2), (0, queries))
    lead, wide = back.shape[:-2], keys + queries
    skew = back.reshape(*lead, queries * wide)
    skew = torch.nn.functional.pad(skew, (0, queries)).view(*lead, queries, wide + 1)
    return skew[..., :keys].sum(-2)


def vertical_slash_mass(
    query: Tensor,
    key: Tensor,
    scale: float,
    seen: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Share of the last queries' attention that each key, and each distance, receives.

    Parameters
    ----------
    query : (B, G, R, Q, D), the last queries. key : (B, G, K, D), the last key the last
        query's own. Others as in :func:`last_query_weights`; ``seen`` is at least causal.

    Returns
    -------
    vertical : (B, G, K) by key. slash : (B, G, K) by distance. Both sum to 1.
    """
    weights = last_query_weights(query, key, scale, seen, softcap)
    count = weights.shape[2]
    return weights.sum(2) / count, diagonal_sums(weights) / count


def block_means(tensor: Tensor, block: int, real: Tensor | None = None) -> Tensor:
    """Mean of every block of tokens; the last block may be short.

    Parameters
    ----------
    tensor : (B, ..., T, D). block : tokens of a block.
    real : bool, (B, T), tokens that count; None for all. A block without any gives zeros.

    Returns
    -------
    (B, ..., n, D) in fp32 (fp64 for fp64 inputs).
    """
    exact = torch.promote_types(tensor.dtype, torch.float32)
    length = tensor.shape[-2]
    pad = -length % block
    if real is None:
        real = torch.ones(1, length, dtype=torch.bool, device=tensor.device)
    else:
        lead = [1] * (tensor.dim() - 3)
        tensor = tensor * real.view(len(real), *lead, length, 1)
    grid = torch.nn.functional.pad(tensor, (0, 0, 0, pad))
    grid = grid.view(*tensor.shape[:-2], -1, block, tensor.shape[-1])
    count = torch.nn.functional.pad(real, (0, pad)).view(len(real), -1, block).sum(-1)
    count = count.view(len(real), *[1] * (tensor.dim() - 3), -1, 1)
    return grid.sum(-2, dtype=exact) / count.clamp_min(1)


def block_weights(
    query: Tensor, key: Tensor, scale: float, seen: Tensor, softcap: float | None = None
) -> Tensor:
    """Attention weights between block means, the mean over the heads that share keys.

    Parameters
    ----------
    query : (B, G, R, n, D) and key : (B, G, m, D), means of blocks.
    seen : bool, (B or 1, G or 1, n, m), blocks with a pair the model lets through.

    Returns
    -------
    (B, G, n, m); rows sum to 1.
    """
    return last_query_weights(query, key, scale, seen, softcap)


def diagonal_blocks(slash: Tensor, block: int) -> Tensor:
    """Mass of every diagonal of square blocks, from the mass at every distance.

    Pairs o apart, with o = d * block + r, lie in the block diagonals d and d + 1 in the
    proportion block - r to r.

    Parameters
    ----------
    slash : (..., K) by distance. block : queries and keys of a block.

    Returns
    -------
    (..., n) for the n = ceil(K / block) nearest diagonals; what crosses the last one is lost.

    >>> diagonal_blocks(torch.tensor([1.0, 2.0, 4.0, 0.0]), 2).tolist()
    [2.0, 5.0]
    """
    grid = torch.nn.functional.pad(slash, (0, -slash.shape[-1] % block))
    grid = grid.view(*slash.shape[:-1], -1, block)
    crossing = torch.arange(block, device=slash.device, dtype=slash.dtype) / block
    over = (grid * crossing).sum(-1)
    own = grid.sum(-1) - over
    own[..., 1:] += over[..., :-1]
    return own


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon distance of distributions along the last dimension: sqrt of the divergence.

    In nats, so it lies between 0 and sqrt(log 2) = 0.83.

    >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(0.8326)
    """
    tiny = torch.finfo(first.dtype).tiny
    middle = ((first + second) / 2).clamp_min(tiny)
    logs = [own * (own / middle).clamp_min(tiny).log() for own in (first, second)]
    return ((logs[0] + logs[1]).sum(-1) / 2).clamp_min(0.0).sqrt()


def mass_count(weights: Tensor, mass: float) -> Tensor:
    """How many of the largest weights along the last dimension it takes to reach a mass.

    Parameters
    ----------
    weights : (..., n), non-negative, sums at most 1. mass : share to reach, 0 to 1.

    Returns
    -------
    int64, (...), between 1 and n; all n where even all weights do not reach the mass.

    >>> mass_count(torch.tensor([0.1, 0.6, 0.3]), 0.8)
    tensor(2)
    """
    reached = weights.sort(dim=-1, descending=True).values.cumsum(-1)
    return ((reached < mass).sum(-1) + 1).clamp_max(weights.shape[-1])
