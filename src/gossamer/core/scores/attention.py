"""Scores over key positions of one attention head group.

Shapes: B = batch, H = heads, Q = queries, K = keys.
"""

from torch import Tensor

__all__ = ["attention_mass", "positional_window"]


def attention_mass(probabilities: Tensor) -> Tensor:
    """How much attention each key receives, summed over the observed queries.

    Parameters
    ----------
    probabilities : (B, H, Q, K), rows sum to 1.

    Returns
    -------
    (B, H, K).
    """
    return probabilities.sum(dim=-2)


def positional_window(queries: Tensor, keys: Tensor, sink: int, recent: int) -> Tensor:
    """Which keys a sink-and-window pattern lets each query see.

    Parameters
    ----------
    queries : (..., Q) int64, logical positions (padding does not count); keys : (..., K).
    sink : first positions always seen. recent : latest positions seen, the query's own included.

    Returns
    -------
    bool, (..., Q, K); never a key after its query.
    """
    query, key = queries.unsqueeze(-1), keys.unsqueeze(-2)
    near = (query - key) < recent
    return (key >= 0) & (key <= query) & (near | (key < sink))
