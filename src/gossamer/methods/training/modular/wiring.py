"""Wiring of groups to groups: which connections a layer starts with.

The units of a layer stand in line, in groups of equal size; a group connects to the group of the
same number in the next layer, then to its neighbours on the ring, and elsewhere here and there.
Shapes: O = units of the next layer, I = units of this one.
"""

import torch
from torch import Tensor

from gossamer.core import Budget, Pattern
from gossamer.core.scores import uniform_random

__all__ = ["group_distance", "modular_score", "reserved"]


def group_distance(shape: tuple[int, int], groups: int) -> Tensor:
    """(O, I) int64: how far apart on the ring of groups a unit is from another's target group.

    Sizes that ``groups`` does not divide make groups that differ by one unit.
    """
    target, source = (torch.arange(n) * groups // n for n in shape)
    apart = (target[:, None] - source[None, :]).abs()
    return torch.minimum(apart, groups - apart)


def reserved(total: int, keep: int, elsewhere: float) -> int:
    """How many of the kept connections go to the nearest groups.

    The others are the share ``elsewhere`` of all places that are then left: of n places and k
    kept connections, D near ones with k - D = elsewhere (n - D). None where that share alone
    exceeds k.
    """
    return max(0, round((keep - elsewhere * total) / (1.0 - elsewhere)))


def modular_score(
    like: Tensor, groups: int, pattern: Pattern, keep: int, elsewhere: float, seed: int
) -> Tensor:
    """Scores whose ``keep`` highest (of each row, for constant fan-in) are the modular wiring.

    Nearest groups come first; of the last distance that the number kept does not fill, and of all
    that is left for the connections elsewhere, seeded noise chooses.

    Parameters
    ----------
    like : (O, I), gives shape and device.
    pattern : the whole layer, or each row, as the group that ``keep`` counts in.
    """
    rows, columns = like.shape
    total = columns if str(pattern) == "row" else rows * columns
    noise = uniform_random(like, seed)
    apart = group_distance((rows, columns), groups).to(like.device)
    near = Budget(keep=reserved(total, keep, elsewhere))
    return pattern.select(noise - apart, near).mask() + noise
