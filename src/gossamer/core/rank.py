"""Rank: which entries of a group survive a budget; the arithmetic under every pattern.

Decided here once, for everyone:

- a count budget keeps exactly ``round((1 - sparsity) * n)`` entries of each group, never
  ``score > threshold``, because ties would then change the count;
- among equal scores the entry with the lower index is kept, so results are deterministic;
- NaN is an error: a score that is not a number has no rank;
- infinities rank as usual; protected entries rank above everything and count as kept;
- nothing kept (sparsity 1) and everything kept (sparsity 0) are ordinary results.

Shapes: R = rows (groups), C = columns (entries of a group).
"""

import torch
from torch import Tensor

from gossamer.core.budget import Budget
from gossamer.core.errors import GossamerError

__all__ = ["check_scores", "select_rows", "topk_mask"]

# Entries handled at once: intermediates then stay in the processor's cache, and the memory a
# selection needs beside score and mask does not grow with the layer.
_CHUNK = 1 << 20
# Up to this width, comparing every pair of a group costs less than any partial sort.
_NARROW = 32
# From this width on, a histogram of the leading bits costs less than a partial sort.
_LONG = 1 << 18


def check_scores(score: Tensor, name: str = "score") -> None:
    """Refuse scores that have no order.

    Raises
    ------
    GossamerError
        If an entry is NaN; the message gives ``name``.
    """
    # One cheap pass over sound data: a sum is NaN when a term is, or when +inf meets -inf.
    if torch.isnan(score.sum()) and (bad := int(torch.isnan(score).sum())):
        raise GossamerError(
            f"{name} holds {bad} NaN of {score.numel()} entries; NaN has no rank: "
            "look for NaN in the weights or the calibration activations"
        )


def topk_mask(score: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest entries of each row, ties to the lower index.

    Parameters
    ----------
    score : (R, C), no NaN.
    keep : exact for every row; below 0 counts as 0, above C as C.

    Returns
    -------
    bool, (R, C).
    """
    rows, columns = score.shape
    if keep <= 0 or score.numel() == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if keep >= columns:
        return torch.ones_like(score, dtype=torch.bool)
    if score.dtype == torch.bool:
        score = score.to(torch.uint8)
    mask = torch.empty(rows, columns, dtype=torch.bool, device=score.device)
    if columns >= _LONG and score.dtype in _DIGITS:
        for row, out in zip(score, mask, strict=True):
            _long_row(row.contiguous(), keep, out)
        return mask
    choose = _narrow_rows if columns <= _NARROW else _wide_rows
    step = max(1, _CHUNK // columns)
    for part, out in zip(torch.split(score, step), torch.split(mask, step), strict=True):
        choose(part, keep, out)
    return mask


def _narrow_rows(score: Tensor, keep: int, mask: Tensor) -> None:
    """Rank by comparing all pairs: an entry's rank is the number of entries that go before it."""
    columns = [column.contiguous() for column in score.unbind(1)]
    ranks = [torch.zeros(len(score), dtype=torch.uint8, device=score.device) for _ in columns]
    for j, right in enumerate(columns):
        for i, left in enumerate(columns[:j]):
            first = left >= right
            ranks[j] += first
            ranks[i] += ~first
    for j, rank in enumerate(ranks):
        torch.lt(rank, keep, out=mask[:, j])


def _wide_rows(score: Tensor, keep: int, mask: Tensor) -> None:
    """Keep what reaches the ``keep``-th largest value, then drop surplus ties."""
    columns = score.shape[1]
    if keep <= columns // 2:
        edge = score.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        below = score.topk(columns - keep + 1, dim=1, largest=False, sorted=False).values
        edge = below.amax(1, keepdim=True)
    torch.ge(score, edge, out=mask)
    surplus = mask.sum(1) - keep
    tied = surplus.nonzero()[:, 0]
    if len(tied):
        equal = score[tied] == edge[tied]
        room = equal.sum(1, keepdim=True) - surplus[tied, None]
        mask[tied] &= ~equal | (equal.cumsum(1) <= room)


# Integer type of a float's bits, and the bits left below its leading 16 after each pass.
_DIGITS: dict[torch.dtype, tuple[torch.dtype, tuple[int, ...]]] = {
    torch.float64: (torch.int64, (48, 32, 16, 0)),
    torch.float32: (torch.int32, (16, 0)),
    torch.float16: (torch.int16, (0,)),
    torch.bfloat16: (torch.int16, (0,)),
}


def _sort_keys(row: Tensor) -> Tensor:
    """Integers in the order of the floats: below zero, a larger bit pattern is a smaller number."""
    kind = _DIGITS[row.dtype][0]
    bits = row.view(kind)
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(kind).max)


def _kth_largest(row: Tensor, keep: int) -> Tensor:
    """The ``keep``-th largest entry, by counting the values of 16 bits at a time.

    After the first count only entries that share the answer's leading bits are looked at.
    """
    left, parts = keep, torch.split(row, _CHUNK)
    for shift in _DIGITS[row.dtype][1]:
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=row.device)
        for part in parts:
            counts += torch.bincount(_digit(part, shift), minlength=1 << 16)
        from_top = counts.flip(0).cumsum(0)
        digit = (1 << 16) - 1 - int(torch.searchsorted(from_top, left))
        left -= int(from_top[(1 << 16) - 1 - digit] - counts[digit])
        sharing = [part[_digit(part, shift) == digit] for part in parts]
        parts = torch.split(torch.cat(sharing), _CHUNK)
    return parts[0][0]


def _digit(row: Tensor, shift: int) -> Tensor:
    """16 bits of every sort key, 0 to 65535; the leading ones are signed and need an offset."""
    keys = _sort_keys(row)
    leading = shift + 16 == 8 * keys.element_size()
    return ((keys >> shift).int() + (1 << 15 if leading else 0)) & 0xFFFF


def _long_row(row: Tensor, keep: int, mask: Tensor) -> None:
    edge = _kth_largest(row, keep)
    torch.gt(row, edge, out=mask)
    room = keep - int(mask.count_nonzero())
    for part, out in zip(torch.split(row, _CHUNK), torch.split(mask, _CHUNK), strict=True):
        if room == 0:
            break
        equal = part == edge
        count = int(equal.count_nonzero())
        if count > room:
            equal &= equal.cumsum(0) <= room
        out |= equal
        room -= min(count, room)


def _mass_mask(score: Tensor, mass: float) -> Tensor:
    """Fewest entries of each row whose scores, summed in float64, reach a share of its sum."""
    if bool((score < 0).any()):
        raise GossamerError(
            "a mass budget needs scores of at least 0; take probabilities or |score|"
        )
    if mass == 1.0:
        return score > 0  # Not left to the rounding of sums: everything that counts, counts.
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    sums = score.gather(1, order).double().cumsum(1)
    before = torch.nn.functional.pad(sums[:, :-1], (1, 0))
    wanted = before < mass * sums[:, -1:]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, wanted)


def _protected_mask(score: Tensor, keep: int, protect: Tensor) -> Tensor:
    """Protected entries first, then the best of the rest: +inf cannot displace a protected one."""
    taken = protect.sum(1, keepdim=True)
    most = int(taken.max()) if len(taken) else 0
    if most > keep:
        raise GossamerError(
            f"{most} entries of a row are protected but the budget keeps {keep}; "
            "lower the sparsity or protect fewer"
        )
    mask = protect.clone()
    step = max(1, _CHUNK // max(1, score.shape[1]))
    for at in range(0, len(score), step):
        rows = slice(at, at + step)
        order = torch.argsort(score[rows], dim=1, descending=True, stable=True)
        free = (~protect[rows]).gather(1, order)
        chosen = free & (free.cumsum(1) <= keep - taken[rows])
        mask[rows] |= torch.zeros_like(chosen).scatter_(1, order, chosen)
    return mask


def select_rows(
    score: Tensor, budget: Budget, protect: Tensor | None = None, *, checked: bool = False
) -> Tensor:
    """Apply a budget to each row of a matrix of scores; the core of every pattern.

    Parameters
    ----------
    score : (R, C), any real dtype.
    protect : bool, (R, C); entries that must be kept and count towards the budget.
    checked : the caller has already run :func:`check_scores`.

    Returns
    -------
    bool, (R, C).

    Raises
    ------
    GossamerError
        On NaN, or when more entries are protected than a count budget keeps.
    """
    if not checked:
        check_scores(score)
    if protect is not None and (protect.shape != score.shape or protect.dtype != torch.bool):
        raise GossamerError(
            f"protect is a bool tensor of the score's shape {tuple(score.shape)}; "
            f"got {protect.dtype} {tuple(protect.shape)}"
        )
    if budget.fixes_count:
        keep = budget.count(score.shape[1])
        return topk_mask(score, keep) if protect is None else _protected_mask(score, keep, protect)
    if budget.threshold is not None:
        mask = score >= budget.threshold
    else:
        assert budget.mass is not None
        mask = _mass_mask(score, budget.mass)
    return mask if protect is None else mask | protect
