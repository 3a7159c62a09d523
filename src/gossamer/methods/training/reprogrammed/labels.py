"""Label maps: which of a frozen network's classes stands for which class of the new task.

Shapes: N samples, S source classes, T target classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gossamer.core import GossamerError

__all__ = ["check_classes", "greedy_map", "votes"]


def votes(logits: Tensor, labels: Tensor, classes: int, *, by_probability: bool = False) -> Tensor:
    """How often the network calls samples of a target class by each of its own classes; (T, S).

    Parameters
    ----------
    logits : (N, S) of the frozen network. labels : (N,) target classes.
    by_probability : add up probabilities in place of first choices. Over a vocabulary nearly all
        first choices are the same few words.
    """
    if by_probability:
        given = logits.double().softmax(-1)
    else:
        given = one_hot(logits.argmax(-1), logits.shape[-1]).double()
    counts = torch.zeros(classes, logits.shape[-1], dtype=torch.float64, device=logits.device)
    return counts.index_add_(0, labels.to(logits.device), given)


def check_classes(targets: int, sources: int) -> None:
    """Refuse a task of more classes than the frozen network has."""
    if targets > sources:
        raise GossamerError(
            f"the task has {targets} classes, the frozen network {sources}; classes map one to "
            "one: use adapter=probe, or a network of more classes"
        )


def greedy_map(counts: Tensor) -> Tensor:
    """A source class for every target class, no two alike: the largest count first. (T,) int64.

    Of equal counts the lower target class goes first, then the lower source class.

    Parameters
    ----------
    counts : (T, S), finite, at least 0.

    Raises
    ------
    GossamerError
        If there are more target classes than source classes.
    """
    targets, sources = counts.shape
    check_classes(targets, sources)
    left = counts.double().clone()
    found = torch.empty(targets, dtype=torch.int64)
    for _ in range(targets):
        target, source = divmod(int(left.argmax()), sources)
        found[target] = source
        # Below those pairs that nobody voted for.
        left[target] = left[:, source] = -1.0
    return found
