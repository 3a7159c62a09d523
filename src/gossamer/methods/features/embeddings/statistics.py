"""Statistics of counts: exact tests of presence in two groups, and false discoveries in check.

Arrays are float64 of any one shape unless said otherwise.
"""

import numpy as np
from scipy.stats import hypergeom

from gossamer.core import GossamerError

__all__ = ["adjusted", "enrichment", "two_sided"]


def enrichment(both: np.ndarray, first: np.ndarray, second: np.ndarray, total: int) -> np.ndarray:
    """P(overlap >= both) of two sets of given sizes drawn at random: Fisher's one-sided test."""
    return np.minimum(1.0, hypergeom.sf(both - 1, total, first, second))


def two_sided(yes: np.ndarray, size: int, other_yes: np.ndarray, other_size: int) -> np.ndarray:
    """p that presence is equally likely in two groups: twice Fisher's smaller tail, at most 1.

    Parameters
    ----------
    yes, other_yes : documents with the latent. size, other_size : documents of each group.
    """
    total, marked = size + other_size, yes + other_yes
    upper = hypergeom.sf(yes - 1, total, marked, size)
    lower = hypergeom.cdf(yes, total, marked, size)
    return np.minimum(1.0, 2 * np.minimum(upper, lower))


def adjusted(p: np.ndarray, tests: int | None = None) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p-values, (T,): rejecting up to q keeps the FDR at q.

    Parameters
    ----------
    tests : made in all, where those that are left out have p = 1; None: T.

    Source: Benjamini and Hochberg 1995 (J. R. Statist. Soc. B 57).
    """
    tests = len(p) if tests is None else tests
    if tests < len(p):
        raise GossamerError(f"tests is {tests}; {len(p)} p-values come from at least as many")
    order = np.argsort(p, kind="stable")
    scaled = p[order] * tests / np.arange(1, len(p) + 1)
    made = np.empty(len(p))
    made[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return made
