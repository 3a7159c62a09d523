import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.decoding.choose import Amount
from gossamer.methods.attention.decoding.reuse import ReuseSelector, check_table, chosen
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import FullIndex
from gossamer.methods.attention.layout import Layout


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(step, seed=0, keys=12, shared=2):
    key = normal(2, shared, keys, 4, seed=seed + 100)
    return Call(normal(2, 4, 1, 4, seed=seed), key, key, step=step)


@pytest.mark.parametrize("table", [(1, 1), (0, 2, 2), (0, 0, 1)])
def test_tables_that_cannot_be_read(table):
    with pytest.raises(GossamerError, match="chooses none"):
        check_table(table)


def test_chosen_are_the_keys_of_most_probability():
    one, layout = call({}), Layout(2, 1, 12, query_offset=11)
    place = chosen(one, layout, Amount(None, 4), local=1)
    score = torch.einsum("bgrqd,bgkd->bgrqk", one.grouped_query(), one.key) * 0.5
    mass = score.softmax(-1).mean(2)[:, :, 0]
    mass[..., 11] = 2.0
    assert torch.equal(place[:, :, 0].sort().values, mass.topk(4).indices.sort().values)


def test_layers_read_their_anchors_keys():
    selector, step = ReuseSelector((0, 0, 2, 2), None, 4), {}
    layout = Layout(2, 1, 12, query_offset=11)
    indices = [selector.select(call(step, seed), layout, seed) for seed in range(4)]
    assert isinstance(indices[0], FullIndex)
    assert isinstance(indices[2], FullIndex)
    for reader, anchor in ((1, 0), (3, 2)):
        place = chosen(call({}, anchor), layout, Amount(None, 4))
        got = indices[reader].mask()[:, :, 0]
        want = torch.zeros(2, 2, 12, dtype=torch.bool).scatter(2, place[:, :, 0], True)
        assert torch.equal(got, want)
    assert not torch.equal(indices[1].mask(), indices[3].mask())


def test_anchors_nobody_reads_choose_nothing():
    step = {}
    ReuseSelector((0, 1, 1), None, 4).select(call(step), Layout(2, 1, 12, query_offset=11), 0)
    assert not step["chosen"]


def test_layers_with_other_heads_or_an_anchor_that_stayed_full_read_all():
    selector, step = ReuseSelector((0, 0, 0), None, 4), {}
    layout = Layout(2, 1, 12, query_offset=11)
    assert isinstance(selector.select(call(step), layout, 1), FullIndex)
    selector.select(call(step), layout, 0)
    assert isinstance(selector.select(call(step, shared=1), layout, 1), FullIndex)


def test_places_are_kept_from_the_start_of_the_sequence():
    selector, step = ReuseSelector((0, 0), None, 12), {}
    selector.select(call(step), Layout(2, 1, 12, query_offset=11), 0)
    late = selector.select(call(step, keys=4), Layout(2, 1, 4, query_offset=11, key_offset=8), 1)
    assert late.mask().all()


def test_an_anchor_with_a_window_does_not_choose_for_a_layer_without():
    selector, step = ReuseSelector((0, 0), None, 4), {}
    selector.select(call(step, keys=4), Layout(2, 1, 4, query_offset=11, key_offset=8), 0)
    got = selector.select(call(step), Layout(2, 1, 12, query_offset=11), 1)
    assert isinstance(got, FullIndex)
