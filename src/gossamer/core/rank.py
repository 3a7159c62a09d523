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

# Entries handled at once, so that the memory a selection needs beside score and mask does not
# grow with the layer: few large pieces where torch uses all threads, ...
_CHUNK = 1 << 22
# ... and pieces below the size from which torch splits an elementwise operation, where there are
# many small ones: they stay in cache and never wait for a thread that another program holds up.
_SERIAL = 32_000
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
    elif columns <= _NARROW:
        step = _piece(score, _SERIAL)
        for part, out in zip(torch.split(score, step), torch.split(mask, step), strict=True):
            _narrow_rows(part, keep, out)
    else:
        _wide_rows(score, keep, mask)
    return mask


def _piece(score: Tensor, entries: int) -> int:
    """How many entries to handle at once; an accelerator wants few and large operations."""
    return entries if score.device.type == "cpu" else 1 << 26


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
    step = max(1, _piece(score, _CHUNK) // score.shape[1])
    parts = torch.split(score, step)
    edge = torch.cat([_edges(part, keep) for part in parts])
    torch.ge(score, edge, out=mask)
    if int(mask.count_nonzero()) == len(score) * keep:
        return  # No row keeps fewer, so none keeps more.
    for part, low, out in zip(parts, torch.split(edge, step), torch.split(mask, step), strict=True):
        _drop_surplus(part, low, keep, out)


def _edges(score: Tensor, keep: int) -> Tensor:
    """The ``keep``-th largest value of each row, (R, 1), from the smaller side."""
    columns = score.shape[1]
    if keep <= columns // 2:
        return score.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    below = score.topk(columns - keep + 1, dim=1, largest=False, sorted=False)
    return below.values.amax(1, keepdim=True)


def _drop_surplus(score: Tensor, edge: Tensor, keep: int, mask: Tensor) -> None:
    """Of the entries equal to the edge, let only the first ones stay."""
    surplus = mask.sum(1) - keep
    tied = surplus.nonzero()[:, 0]
    if len(tied):
        equal = score[tied] == edge[tied]
        room = equal.sum(1, keepdim=True) - surplus[tied, None]
        mask[tied] &= ~equal | (equal.cumsum(1, dtype=torch.int32) <= room)


# Integer type of a float's bits, and where the 12-bit digits of its sort key end. The last two
# overlap: bits that are already known to agree do no harm.
_DIGITS: dict[torch.dtype, tuple[torch.dtype, tuple[int, ...]]] = {
    torch.float64: (torch.int64, (52, 40, 28, 16, 4, 0)),
    torch.float32: (torch.int32, (20, 8, 0)),
    torch.float16: (torch.int16, (4, 0)),
    torch.bfloat16: (torch.int16, (4, 0)),
}
_BINS = 1 << 12


def _digit(row: Tensor, shift: int) -> Tensor:
    """12 bits of every entry's sort key, 0 to 4095.

    Sort keys are integers in the order of the floats: of negative numbers, the one with the
    larger bit pattern is smaller. The leading digit is signed and needs an offset.
    """
    kind = _DIGITS[row.dtype][0]
    bits = row.view(kind)
    width = 8 * bits.element_size()
    keys = bits ^ ((bits >> (width - 1)) & torch.iinfo(kind).max)
    leading = shift + 12 == width
    return ((keys >> shift).int() + (_BINS // 2 if leading else 0)) & (_BINS - 1)


def _kth_largest(row: Tensor, keep: int, piece: int) -> Tensor:
    """The ``keep``-th largest entry, by counting how often each digit occurs.

    After the first count only entries that share the answer's leading digits are looked at.
    """
    left, parts = keep, torch.split(row, piece)
    for shift in _DIGITS[row.dtype][1]:
        counts = torch.zeros(_BINS, dtype=torch.int64, device=row.device)
        for part in parts:
            counts += torch.bincount(_digit(part, shift), minlength=_BINS)
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, left))
        digit = _BINS - 1 - place
        left -= int(from_top[place] - counts[digit])
        sharing = [part.masked_select(_digit(part, shift) == digit) for part in parts]
        parts = torch.split(torch.cat(sharing), piece)
    return parts[0][0]


def _long_row(row: Tensor, keep: int, mask: Tensor) -> None:
    """Find the ``keep``-th largest value by its bits, then let ties in up to the count."""
    piece = _piece(row, _SERIAL)
    edge = _kth_largest(row, keep, piece)
    torch.gt(row, edge, out=mask)
    room = keep - int(mask.count_nonzero())
    for part, out in zip(torch.split(row, piece), torch.split(mask, piece), strict=True):
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
