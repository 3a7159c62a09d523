"""Statistics: scipy's own one-at-a-time tests are the reference."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, fisher_exact

from gossamer.core import GossamerError
from gossamer.methods.features.embeddings.statistics import adjusted, enrichment, two_sided


def test_tails_are_fishers():
    generator = np.random.default_rng(0)
    for _ in range(20):
        yes, other = generator.integers(0, 13), generator.integers(0, 21)
        table = [[yes, 12 - yes], [other, 20 - other]]
        tails = [fisher_exact(table, alternative=a).pvalue for a in ("greater", "less")]
        found = two_sided(np.array([yes]), 12, np.array([other]), 20)
        assert found[0] == pytest.approx(min(1, 2 * min(tails)))
        one = enrichment(np.array([yes]), np.array([12]), np.array([yes + other]), 32)
        assert one[0] == pytest.approx(tails[0])


def test_adjustment_is_benjamini_and_hochbergs():
    p = np.random.default_rng(1).uniform(size=50) ** 3
    np.testing.assert_allclose(adjusted(p), false_discovery_control(p))
    padded = false_discovery_control(np.concatenate([p, np.ones(150)]))
    np.testing.assert_allclose(adjusted(p, 200), padded[:50])
    with pytest.raises(GossamerError, match="tests"):
        adjusted(p, 49)
