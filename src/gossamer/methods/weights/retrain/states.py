"""States: the tensors of several trained copies of one network, and their average.

Averaging keeps a network sparse only if all copies have their zeros in the same places. That is
checked, never assumed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError

__all__ = [
    "Greedy",
    "State",
    "average",
    "check_supports",
    "copy_of",
    "greedy",
    "put_back",
    "support_of",
]

State = Mapping[str, Tensor]
"""Tensor by name: parameters and buffers of one copy."""

SPARSE_FROM = 0.01
"""Share of zeros from which a matrix counts as sparse; dense ones hold a stray zero at most."""
STRAY = 1e-4
"""Share of entries that may be zero in one copy only: kept weights that happen to be zero."""


def _held(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, copied; tied ones once."""
    return {name: tensor.detach().clone() for name, tensor in _held(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, state: State) -> None:
    """Copy what :func:`copy_of` took into the model again, to the bit."""
    held = _held(model)
    for name, tensor in state.items():
        held[name].copy_(tensor)


def _labels(states: Sequence[State], labels: Sequence[str] | None) -> list[str]:
    if not states:
        raise GossamerError("nothing to average; give at least two copies of a model")
    return [f"copy {i + 1}" for i in range(len(states))] if labels is None else list(labels)


def _check_alike(states: Sequence[State], labels: Sequence[str]) -> None:
    """Refuse copies of different networks, naming the first difference."""
    first = states[0]
    for state, label in zip(states[1:], labels[1:], strict=True):
        if missing := sorted(first.keys() ^ state.keys()):
            has, lacks = (labels[0], label) if missing[0] in first else (label, labels[0])
            raise GossamerError(
                f"{has} holds {missing[0]}, {lacks} does not; average copies of one network"
            )
        for name, tensor in first.items():
            if state[name].shape != tensor.shape:
                raise GossamerError(
                    f"{name} has shape {tuple(tensor.shape)} in {labels[0]} and "
                    f"{tuple(state[name].shape)} in {label}; average copies of one network"
                )


def _checked(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 1


def support_of(states: Sequence[State], name: str) -> Tensor:
    """Where any of the copies is not zero, bool of the tensor's shape."""
    support = states[0][name] != 0
    for state in states[1:]:
        support |= (state[name] != 0).to(support.device)
    return support


def check_supports(
    states: Sequence[State],
    labels: Sequence[str] | None = None,
    masks: State | None = None,
) -> dict[str, Tensor]:
    """Refuse copies whose zeros differ: their average would be denser than each of them.

    Parameters
    ----------
    labels : what to call the copies in errors.
    masks : name to bool mask, True where kept; every copy must be zero outside. Without masks the
        copies must agree among themselves: in each matrix with at least 1 % zeros in any copy,
        at most 1 entry in 10,000 may be zero in one copy only (a kept weight that happens to be
        zero; it counts as kept).

    Returns
    -------
    The common support of every sparse matrix, bool.

    Raises
    ------
    GossamerError
        Naming the tensor, the copies and how many entries differ.
    """
    named = _labels(states, labels)
    _check_alike(states, named)
    if masks is not None:
        return _check_masks(states, named, masks)
    found: dict[str, Tensor] = {}
    for name, tensor in states[0].items():
        if not _checked(name, tensor):
            continue
        zeros = [int(tensor.numel() - torch.count_nonzero(s[name])) for s in states]
        if max(zeros) < SPARSE_FROM * tensor.numel():
            continue
        support = support_of(states, name)
        common = tensor.numel() - int(torch.count_nonzero(support))
        worst = max(range(len(states)), key=lambda i: zeros[i])
        if (differ := zeros[worst] - common) > STRAY * tensor.numel():
            other = min(range(len(states)), key=lambda i: (int(_extra(states, name, worst, i)), i))
            raise GossamerError(
                f"{name}: {differ:,} of the {zeros[worst]:,} zeros of {named[worst]} are no zeros "
                f"in another copy (such as {named[other]}), so the average would be denser; "
                "average copies that were retrained under one mask"
            )
        found[name] = support
    return found


def _extra(states: Sequence[State], name: str, zero: int, other: int) -> int:
    """Minus the entries that are zero in one copy and not in the other: the worst sorts first."""
    empty = states[zero][name] == 0
    return -int(torch.count_nonzero(states[other][name][empty.to(states[other][name].device)]))


def _check_masks(states: Sequence[State], labels: Sequence[str], masks: State) -> dict[str, Tensor]:
    for name, mask in masks.items():
        if name not in states[0]:
            raise GossamerError(f"the masks name {name}, which {labels[0]} does not hold")
        if mask.shape != states[0][name].shape:
            raise GossamerError(
                f"the mask of {name} has shape {tuple(mask.shape)}, the tensor "
                f"{tuple(states[0][name].shape)}"
            )
        for state, label in zip(states, labels, strict=True):
            outside = int(torch.count_nonzero(state[name].masked_fill(mask, 0)))
            if outside:
                raise GossamerError(
                    f"{name}: {outside:,} weights of {label} lie outside the common mask; "
                    "average copies that were retrained under one mask"
                )
    return dict(masks)


def average(
    states: Sequence[State],
    labels: Sequence[str] | None = None,
    masks: State | None = None,
) -> dict[str, Tensor]:
    """The mean of several copies of one network, tensor by tensor.

    Sums run in float32 at least, whatever the copies are stored in; the mean is rounded to the
    first copy's dtype once. Tensors that do not differ keep their bits, and tensors of whole
    numbers or flags (counters, positions) are the first copy's.

    Parameters
    ----------
    labels, masks : see :func:`check_supports`, which runs first.

    Raises
    ------
    GossamerError
        If the copies differ in names, shapes or zeros.
    """
    check_supports(states, labels, masks)
    return _mean(states)


def _mean(states: Sequence[State]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in states[0].items():
        values = [state[name].to(tensor.device) for state in states]
        same = all(torch.equal(tensor, value) for value in values[1:])
        if same or not tensor.is_floating_point():
            made[name] = tensor.clone()
            continue
        total = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for value in values:
            total += value
        made[name] = (total / len(values)).to(tensor.dtype)
    return made


@dataclass(frozen=True, eq=False)
class Greedy:
    """A soup of chosen copies.

    Parameters
    ----------
    state : the average. chosen : indices of the copies in it, in the order they were taken.
    score : its score, higher is better.
    """

    state: dict[str, Tensor]
    chosen: tuple[int, ...]
    score: float


def greedy(
    states: Sequence[State],
    score: Callable[[State], float],
    *,
    scores: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    masks: State | None = None,
) -> Greedy:
    """Average only the copies that help.

    Copies are tried from the best on; one is taken in if the average with it scores at least as
    well as the average without it. The result is never worse than the best copy.

    Parameters
    ----------
    score : a state to its score on validation data, higher is better.
    scores : scores of the copies, where they are known.
    """
    check_supports(states, labels, masks)
    known = [score(state) for state in states] if scores is None else list(scores)
    order = sorted(range(len(states)), key=lambda i: (-known[i], i))
    chosen, best, made = [order[0]], known[order[0]], dict(states[order[0]])
    for index in order[1:]:
        trial = _mean([states[i] for i in (*chosen, index)])
        if (value := score(trial)) >= best:
            chosen.append(index)
            best, made = value, trial
    return Greedy(made, tuple(chosen), best)
