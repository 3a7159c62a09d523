import math

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.tile_skip import Scale, ThresholdIndex, TileCounter, fit_scale
from gossamer.methods.attention.tile_skip.calibration import TRIALS
from tests.methods.attention.planted import planted


def test_an_exponential_is_found_again():
    points = [(s, 3.0 * math.exp(5.0 * s)) for s in (0.1, 0.3, 0.6, 0.9)]
    scale = fit_scale([*points, (0.0, 1e-9), (1.0, 1e9), (0.99, 7.0)])
    assert scale.a == pytest.approx(3.0)
    assert scale.b == pytest.approx(5.0)
    threshold = scale.threshold(0.6, torch.tensor([1000, 10]))
    assert threshold.tolist() == pytest.approx([3.0 * math.exp(3.0) / 1000, 1.0])


def test_few_points_still_give_a_scale():
    scale = fit_scale([(0.5, 8.0)])
    assert scale.a == pytest.approx(8.0)
    assert scale.b == 0.0
    assert fit_scale([(0.2, 9.0), (0.8, 1.0)]).b == 0.0
    assert fit_scale([(0.99, 4.0)]).a == pytest.approx(4.0)


def test_no_curve_is_an_error():
    with pytest.raises(GossamerError, match="smaller block_size"):
        fit_scale([(0.0, 1.0), (1.0, 2.0)])


@pytest.mark.parametrize(("queries", "past"), [(96, 0), (1, 95), (32, 64)])
def test_counted_tiles_are_those_the_index_skips(queries, past):
    plant = planted(["zipf", "band"], 96, width=16, repeat=2)
    call = plant.call
    call = type(call)(call.query[:, :, past:], call.key, call.value)
    layout, counter = Layout(1, queries, 96, query_offset=past), TileCounter(8)
    assert counter.select(call, layout, 0).whole
    (skipped, total), *_ = counter.counts.values()
    for number in (8, 16, 22):
        value = torch.tensor([TRIALS[number]], dtype=torch.float64)
        index = ThresholdIndex(layout, call, value, (8, 8))
        assert int(skipped[number]) == int(index.skipped.sum())
    at = torch.arange(past, 96)[::8] if queries > 1 else torch.tensor([95])
    tiles = sum((min(int(a) + 8, 96) - 1) // 8 + 1 for a in at)
    assert int(total) == 4 * tiles


def test_decoding_steps_share_bins():
    counter, plant = TileCounter(8), planted(["zipf"], 128, width=16)
    for end in (97, 98, 99):
        call = type(plant.call)(
            plant.query[:, :, end - 1 : end], plant.key[:, :, :end], plant.value[:, :, :end]
        )
        counter.select(call, Layout(1, 1, end, query_offset=end - 1), 0)
    assert list(counter.counts) == [("decode", 112)]
    shares = [share for share, _ in counter.points("decode")]
    assert shares == sorted(shares)
    assert counter.points("prefill") == []
    assert isinstance(fit_scale(counter.points("decode")), Scale)
