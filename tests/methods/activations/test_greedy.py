"""The greedy split: exact mean, the choices of trying everything, never worse than uniform."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.activations.greedy import greedy_shares, weighted_mean

SIZES = {"q": 16, "k": 4, "v": 4, "o": 16, "gate": 43, "up": 43, "down": 43}


def _error(costs: Mapping[str, float]):
    """Squared errors that add up and grow with the cube of the sparsity, as thresholds' do."""

    def error(shares: Mapping[str, float]) -> float:
        return sum(costs[n] * shares[n] ** 3 for n in shares) ** 0.5

    return error


def _exhaustive(sizes, sparsity, error, step, unit):
    """The paper's way: every round try all, take the best."""
    shares = dict.fromkeys(sizes, 0.0)
    goal = sparsity * sum(sizes.values())
    while (left := goal - sum(shares[n] * sizes[n] for n in shares)) > 1e-9:
        trials = {
            n: {
                **shares,
                n: shares[n] + min(step * unit / sizes[n], 1 - shares[n], left / sizes[n]),
            }
            for n in shares
            if shares[n] < 1
        }
        shares = trials[min(trials, key=lambda n: error(trials[n]))]
    return shares


def test_chooses_as_trying_everything_would() -> None:
    costs = {"q": 3.0, "k": 0.7, "v": 2.0, "o": 5.0, "gate": 9.0, "up": 11.0, "down": 20.0}
    calls = 0

    def error(shares: Mapping[str, float]) -> float:
        nonlocal calls
        calls += 1
        return _error(costs)(shares)

    ours = greedy_shares(SIZES, 0.5, error, step=0.05, unit=16)
    theirs = _exhaustive(SIZES, 0.5, _error(costs), 0.05, 16)
    assert ours == pytest.approx(theirs, abs=1e-9)
    rounds = 0.5 * sum(SIZES.values()) / (0.05 * 16)
    assert calls < 3 * rounds


def test_cheap_inputs_give_more() -> None:
    shares = greedy_shares({"a": 10, "b": 10}, 0.3, _error({"a": 1.0, "b": 100.0}))
    assert shares["a"] > 0.4 > 0.2 > shares["b"]


def test_steps_of_grouped_heads_are_as_large_as_their_share_of_weights() -> None:
    # k is a quarter of q: a step of 0.05 on q is a step of 0.2 on k.
    shares = greedy_shares({"q": 16, "k": 4}, 0.04, _error({"q": 99.0, "k": 0.1}), unit=16)
    assert shares == pytest.approx({"q": 0.0, "k": 0.2})


def test_nothing_passes_one() -> None:
    shares = greedy_shares({"q": 16, "k": 4}, 0.5, _error({"q": 99.0, "k": 0.0}), unit=16)
    assert shares["k"] == 1.0
    assert weighted_mean(shares, {"q": 16, "k": 4}) == pytest.approx(0.5)


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=7),
    sparsity=st.floats(0.0, 0.99),
    step=st.sampled_from([0.05, 0.3, 1.0]),
    data=st.data(),
)
def test_the_weighted_mean_is_the_target_and_uniform_never_wins(
    sizes, sparsity, step, data
) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    costs = {n: data.draw(st.floats(0.0, 100.0)) for n in named}
    unit = max(sizes)  # keeps the number of rounds small
    shares = greedy_shares(named, sparsity, _error(costs), step=step, unit=unit)
    assert weighted_mean(shares, named) == pytest.approx(sparsity, abs=1e-9)
    assert all(0.0 <= s <= 1.0 for s in shares.values())
    even = dict.fromkeys(named, sparsity)
    assert _error(costs)(shares) <= _error(costs)(even) + 1e-6


def test_a_step_outside_its_range_is_refused() -> None:
    with pytest.raises(GossamerError, match="step is 0"):
        greedy_shares({"a": 1}, 0.5, _error({"a": 1.0}), step=0)
