"""What the kernels of sparse codes compute, in torch operations.

They run anywhere and, through ``embedding_bag``, are also the fast path on CPUs: sums of few
rows without an intermediate of entries times width.
Shapes: R = rows, K = entries of a row, D = width, M = atoms.
"""

import torch
from torch import Tensor, nn

from gossamer.core.budget import Budget
from gossamer.core.pattern import Unstructured

__all__ = [
    "atom_gradient_reference",
    "decode_reference",
    "top_rows_reference",
    "value_gradient_reference",
]


def top_rows_reference(score: Tensor, keep: int) -> Tensor:
    """The columns that ``Unstructured("row").select(score, Budget(keep=keep))`` keeps, best first.

    ``torch.topk`` finds them several times faster than a mask does, but leaves open which of two
    equal scores wins; rows with a tie at the edge are decided by ``select`` itself.
    """
    columns = score.shape[1]
    values, indices = score.topk(min(keep + 1, columns), dim=1)
    indices = indices[:, :keep]
    if keep < columns:
        tied = (values[:, keep] == values[:, keep - 1]).nonzero()[:, 0]
        if len(tied):
            kept = Unstructured(per="row").select(score[tied], Budget(keep=keep))
            lower = kept.indices()[1].view(-1, keep)
            order = score[tied].gather(1, lower).argsort(dim=1, descending=True, stable=True)
            indices = indices.index_copy(0, tied, lower.gather(1, order))
    return indices


def decode_reference(values: Tensor, indices: Tensor, atoms: Tensor) -> Tensor:
    """(R, K) values of (M, D) atoms, summed to (R, D); index -1 is padding."""
    weights = values.masked_fill(indices < 0, 0).to(atoms.dtype)
    at = indices.clamp_min(0)
    return nn.functional.embedding_bag(at, atoms, per_sample_weights=weights, mode="sum")


def value_gradient_reference(rows: Tensor, indices: Tensor, atoms: Tensor) -> Tensor:
    """out[r, k] = rows[r] · atoms[indices[r, k]], (R, K); 0 for padding."""
    R, K = indices.shape
    if not R * K:
        return rows.new_zeros(R, K)
    # What autograd calls for ``per_sample_weights`` of ``embedding_bag``: reads each named atom
    # where it lies, 16 times as fast on a CPU as gathering them for a batched product.
    made = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows,
        atoms.contiguous(),
        indices.clamp_min(0).reshape(-1),
        torch.arange(0, R * K, K, device=rows.device),
        torch.arange(R, device=rows.device).repeat_interleave(K),
        0,
    )
    return made.view(R, K).masked_fill(indices < 0, 0)


def atom_gradient_reference(values: Tensor, indices: Tensor, rows: Tensor, count: int) -> Tensor:
    """out[m] = sum of values[r, k] rows[r] over the entries with indices[r, k] = m, (M, D).

    Parameters
    ----------
    count : M.
    """
    flat = indices.reshape(-1)
    # Entries in the order of their atoms are bags of rows; padding becomes a last bag, cut off.
    order = flat.where(flat >= 0, count).argsort(stable=True)
    counts = torch.bincount(flat.clamp_min(-1) + 1, minlength=count + 1)[1:]
    start = counts.cumsum(0) - counts
    used = order[: int(counts.sum())]
    return nn.functional.embedding_bag(
        used // indices.shape[1],
        rows,
        start,
        per_sample_weights=values.reshape(-1)[used].to(rows.dtype),
        mode="sum",
    )
