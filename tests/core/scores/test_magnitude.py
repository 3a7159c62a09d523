import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.scores import lamp, magnitude


def lamp_by_definition(values: list[float]) -> list[float]:
    """w² over the sum of all w'² from w on, in ascending order; of equals, the last goes first."""
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), -i))
    out = [0.0] * len(values)
    for place, i in enumerate(order):
        total = sum(values[j] ** 2 for j in order[place:])
        out[i] = values[i] ** 2 / total if values[i] else 0.0
    return out


def test_magnitude():
    assert magnitude(torch.tensor([[-2.0, 0.5]])).tolist() == [[2.0, 0.5]]


def test_lamp_by_hand():
    scores = lamp(torch.tensor([[1.0, -2.0], [2.0, 0.0]]))
    assert scores.flatten().tolist() == pytest.approx([1 / 9, 1.0, 0.5, 0.0])


@given(st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=20))
def test_lamp_against_its_definition(values: list[float]):
    assert lamp(torch.tensor(values)).tolist() == pytest.approx(lamp_by_definition(values))


def test_lamp_ranks_like_magnitude_inside_a_layer_and_tops_at_one():
    weight = torch.randn(31, 17, generator=torch.Generator().manual_seed(0))
    scores = lamp(weight)
    assert scores.shape == weight.shape
    assert scores.max().item() == 1.0
    assert torch.equal(scores.flatten().argsort(), weight.abs().flatten().argsort())


def test_lamp_ignores_scale_and_pruned_weights():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(lamp(weight * 1000), lamp(weight))
    pruned = torch.cat([weight.flatten(), torch.zeros(100)])
    assert torch.equal(lamp(pruned)[:256], lamp(weight.flatten()))
    assert not lamp(torch.zeros(3)).any()


def test_lamp_sums_the_tail_in_double():
    # 2**24 + 1 is no float32: a float32 running sum would give the small weights equal scores.
    weight = torch.ones(1000)
    weight[0] = 2.0**13
    expected = [1.0 / (2.0**26 + k) for k in range(1, 1000)]
    assert lamp(weight)[1:].tolist() == pytest.approx(expected, rel=1e-13)
