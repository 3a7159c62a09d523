"""The integer programme against all choices there are."""

from itertools import product

import numpy as np
import pytest

from gossamer.core import GossamerError
from gossamer.methods.attention.spans.programme import Problem, candidates, pareto, solve


def problem(seed=0, lengths=2, units=4, options=3, bound=0.6):
    draw = np.random.default_rng(seed)
    kept = np.sort(draw.integers(1, 20, size=(lengths, units, options)), axis=2).astype(float)
    kept[..., -1] = 20
    lost = np.sort(draw.normal(size=(lengths, units, options)), axis=2)[..., ::-1].copy()
    return Problem(lost, kept, np.full((lengths, units), 20.0), bound)


def choices(one):
    for choice in product(range(one.lost.shape[2]), repeat=one.lost.shape[1]):
        yield np.array(choice)


@pytest.mark.parametrize("seed", range(8))
def test_a_solution_is_the_best_of_all_choices(seed):
    one = problem(seed)
    allowed = [c for c in choices(one) if (one.densities(c) <= one.bound + 1e-9).all()]
    for goal in range(2):
        best = min(one.losses(c)[goal] for c in allowed)
        found = solve(one, goal)
        assert (one.densities(found) <= one.bound + 1e-9).all()
        assert one.losses(found)[goal] == pytest.approx(best, abs=1e-2)


def test_caps_bind_and_may_leave_nothing():
    one = problem(1)
    free = solve(one, 1)
    cap = one.losses(free)[0] - 1e-3
    bound = solve(one, 1, np.array([cap, np.inf]))
    assert bound is None or one.losses(bound)[0] <= cap + 1e-6
    assert solve(one, 1, np.array([-1e6, np.inf])) is None


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_the_set_beats_another(seed):
    found = pareto(problem(seed, lengths=3))
    one = problem(seed, lengths=3)
    losses = [one.losses(choice) for choice in found]
    assert found
    for a, b in product(losses, losses):
        assert not ((a <= b).all() and (a < b).any())
    # The best at each length alone is among them, up to the solver's gap.
    for goal in range(3):
        alone = one.losses(solve(one, goal))[goal]
        assert min(loss[goal] for loss in losses) <= alone + 1e-9


def test_a_bound_below_the_shortest_spans_is_refused():
    with pytest.raises(GossamerError, match=r"sparsity 0\.99 is out of reach"):
        pareto(problem(bound=0.01))


def test_candidates_fit_every_length():
    for one in candidates((256, 512, 1024), 32):
        spans = [one.alpha + one.beta * n for n in (256, 512, 1024)]
        assert all(0 < span <= n for span, n in zip(spans, (256, 512, 1024), strict=True))
    kinds = {(c.alpha, c.beta) for c in candidates((256, 512, 1024), 32)}
    assert {(0.0, 1.0), (32.0, 0.0)} <= kinds
