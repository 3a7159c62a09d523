"""Allocation: how one overall sparsity is split over layers.

Every function returns ``{layer name: sparsity}``. Multiplied by the layers' sizes and rounded
(:func:`gossamer.core.budget.kept_count`), the kept counts add up to ``round((1 - s) * N)`` of
all N weights, up to one weight per layer. An allocation is an argument of a method.

Shapes are (O, I) for linear layers and (O, I, kernel sides) for convolutions.
"""

from collections.abc import Callable, Mapping
from math import floor, fsum, prod

from torch import Tensor

from gossamer.core.budget import Budget, check_sparsity, kept_count
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Unstructured
from gossamer.core.scores.magnitude import lamp as lamp_score

__all__ = [
    "er",
    "erk",
    "global_",
    "grouped",
    "kept_total",
    "lamp",
    "owl",
    "spread_of",
    "uniform",
    "uniform_plus",
]

Shapes = Mapping[str, tuple[int, ...]]


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same sparsity everywhere."""
    check_sparsity(sparsity)
    return dict.fromkeys(shapes, float(sparsity))


def uniform_plus(shapes: Shapes, sparsity: float, least: float = 0.2) -> dict[str, float]:
    """First layer dense, last layer at a density of at least ``least``, the same in all others.

    Source: arXiv 2202.02643, appendix.

    Raises
    ------
    GossamerError
        If the first and the last layer alone exceed the budget.
    """
    check_sparsity(sparsity)
    names = list(shapes)
    if sparsity == 0.0 or len(names) < 2:
        return uniform(shapes, sparsity)
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    budget = (1.0 - sparsity) * sum(sizes.values())
    between = names[1:-1]
    left = budget - sizes[names[0]]
    if between:
        # Where the last layer's floor does not bind, it is one of the others.
        bound = left / (sum(sizes.values()) - sizes[names[0]])
        last = max(least, bound)
        left -= last * sizes[names[-1]]
        share = left / sum(sizes[name] for name in between)
    else:
        last = left / sizes[names[-1]]
        share = last
    if share <= 0.0 or last < least:
        raise GossamerError(
            f"sparsity {sparsity:g} leaves nothing to the layers between a dense first layer and "
            f"a last one of density {least:g}; lower it or use the allocation erk"
        )
    middle = dict.fromkeys(between, 1.0 - share)
    return {names[0]: 0.0, **middle, names[-1]: 1.0 - last}


def _proportional(
    shapes: Shapes, sparsity: float, weight: Callable[[tuple[int, ...]], float]
) -> dict[str, float]:
    """Density proportional to ``weight(shape)``; layers that would exceed 1 stay dense.

    Solves e * sum(w_l * n_l) + sum(n of dense layers) = (1 - s) * N, freezing layers with
    e * w_l > 1 and solving again. Terminates, because every round freezes a layer; what is left
    stays positive, because a frozen layer has n_l < e * w_l * n_l, less than its share of it.
    """
    check_sparsity(sparsity)
    if not shapes:
        return {}
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    weights = {name: weight(shape) for name, shape in shapes.items()}
    budget = (1.0 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        if not free:
            return dict.fromkeys(shapes, 0.0)
        left = budget - sum(sizes[name] for name in dense)
        scale = left / fsum(weights[name] * sizes[name] for name in free)
        over = {name for name in free if scale * weights[name] > 1.0}
        if not over:
            break
        dense |= over
    return {
        name: 0.0 if name in dense else max(0.0, 1.0 - scale * weights[name]) for name in shapes
    }


def er(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdős-Rényi: density proportional to (in + out) / (in * out); larger layers are sparser.

    Convolution kernels count as part of the layer's size only. Source: arXiv 1707.04780.
    """
    return _proportional(shapes, sparsity, lambda s: (s[0] + s[1]) / (s[0] * s[1]))


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdős-Rényi kernel: like :func:`er`, with the kernel's sides in sum and product.

    Equal to ``er`` for linear layers. Source: arXiv 1911.11134, §3.
    """
    return _proportional(shapes, sparsity, lambda s: sum(s) / prod(s))


def _from_counts(kept: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
    # 1 - kept / size gives the exact count back through kept_count for any size below 2**50.
    return {name: 1.0 - kept[name] / sizes[name] for name in kept}


def global_(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """What one competition over all layers leaves to each.

    Parameters
    ----------
    scores : layer name to scores, higher means keep.

    A layer whose scores are all small may be emptied: that is this rule's known weakness.
    """
    check_sparsity(sparsity)
    if not scores:
        return {}
    chosen = Unstructured("model").select_model(scores, Budget(sparsity=sparsity))
    kept = {name: selection.kept for name, selection in chosen.items()}
    return _from_counts(kept, {name: score.numel() for name, score in scores.items()})


def lamp(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """:func:`global_` over LAMP scores, which empty no layer. Source: arXiv 2010.07611."""
    return global_({name: lamp_score(weight) for name, weight in weights.items()}, sparsity)


def owl(
    outliers: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float = 0.08
) -> dict[str, float]:
    """Outlier weighed: layers (or blocks) with a larger share of outliers stay denser.

    Densities are an affine map of the outlier shares with total range ``2 * spread``, shifted
    so that the size-weighted mean is exactly ``1 - sparsity``; values outside [0, 1] are
    clipped and the rest shifted further. Equal shares give the uniform allocation.

    Parameters
    ----------
    outliers : name to share of outlier scores (:func:`gossamer.core.scores.outlier_share`).
    sizes : name to number of weights.
    spread : half the range of densities, the paper's lambda, 0 <= spread <= 0.5.

    Source: arXiv 2310.05175, §3. Departs from the paper: the mean is weighted by size, so the
    budget is met when blocks differ in size.
    """
    check_sparsity(sparsity)
    if not 0.0 <= spread <= 0.5:
        raise GossamerError(f"spread is {spread!r}; it is half a range of densities, 0 to 0.5")
    if not outliers:
        return {}
    low, high = min(outliers.values()), max(outliers.values())
    width = high - low
    if width == 0.0 or spread == 0.0:
        return dict.fromkeys(outliers, float(sparsity))
    raw = {name: 2 * spread * (share - low) / width for name, share in outliers.items()}
    budget = (1.0 - sparsity) * sum(sizes[name] for name in outliers)

    def densities(shift: float) -> dict[str, float]:
        return {name: min(1.0, max(0.0, value + shift)) for name, value in raw.items()}

    # The shift that meets the budget after clipping: the kept count grows with it, so bisect.
    down, up = -2 * spread, 1.0
    for _ in range(100):
        shift = (down + up) / 2
        kept = fsum(density * sizes[name] for name, density in densities(shift).items())
        down, up = (shift, up) if kept < budget else (down, shift)
    return {name: 1.0 - density for name, density in densities(up).items()}


def grouped(shares: Mapping[str, float], sizes: Mapping[str, int], of: int) -> dict[str, float]:
    """Round an allocation to whole numbers kept of every ``of`` weights, within its budget.

    Every layer gets its number rounded down, at least 1; what is left of the budget goes to the
    largest remainders, earlier layers first.

    Parameters
    ----------
    shares : name to sparsity. sizes : name to number of weights. of : M of N:M.

    Returns
    -------
    name to sparsity, every one a multiple of ``1 / of`` below 1.
    """
    wanted = {name: (1.0 - share) * of for name, share in shares.items()}
    keep = {name: min(of, max(1, floor(want + 1e-9))) for name, want in wanted.items()}
    left = fsum(sizes[name] * (wanted[name] - keep[name]) for name in keep)
    for name in sorted(keep, key=lambda name: keep[name] - wanted[name]):
        if wanted[name] - keep[name] > 1e-9 and sizes[name] <= left * (1 + 1e-9):
            keep[name] += 1
            left -= sizes[name]
    return {name: 1.0 - count / of for name, count in keep.items()}


def kept_total(allocation: Mapping[str, float], sizes: Mapping[str, int]) -> int:
    """Entries an allocation keeps in all."""
    return sum(kept_count(sizes[name], s) for name, s in allocation.items())


def spread_of(allocation: Mapping[str, float]) -> tuple[float, float]:
    """Lowest and highest sparsity of an allocation."""
    return min(allocation.values()), max(allocation.values())
