import torch

from gossamer.methods.attention.eviction.observe import (
    keep_equal,
    keep_over_heads,
    observed_mass,
    remember_queries,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_queries_of_chunks_are_those_of_one_prompt():
    query, key = normal(2, 4, 12, 3), normal(2, 2, 12, 3, seed=1)
    whole = Call(query, key, key)
    remember_queries(whole, Layout(2, 12, 12), 5)
    parts = Call(query, key, key).state
    for start, stop in ((0, 4), (4, 10), (10, 12)):
        call = Call(query[:, :, start:stop], key[:, :, :stop], key[:, :, :stop], state=parts)
        remember_queries(call, Layout(2, stop - start, stop, query_offset=start), 5)
    assert torch.equal(parts.tensors["queries"], whole.state.tensors["queries"])
    assert torch.equal(parts.tensors["queries"], query[:, :, -5:])
    assert parts.facts["end"] == 12


def test_mass_is_the_plain_sum_of_probabilities():
    batch, heads, shared, keys, width, window = 2, 4, 2, 9, 3, 4
    query, key = normal(batch, heads, window, width), normal(batch, shared, keys, width, seed=1)
    call, layout = Call(query, key, key), Layout(batch, window, keys, query_offset=keys - window)
    got = observed_mass(call, layout, query, keys, pool=1)
    want = torch.zeros(batch, shared, keys)
    for b in range(batch):
        for h in range(heads):
            for w in range(window):
                end = keys - window + w + 1
                score = (key[b, h // 2, :end] @ query[b, h, w]) * width**-0.5
                want[b, h // 2, :end] += score.softmax(0) / 2
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(-1), torch.full((batch, shared), float(window)))


def test_pooling_spreads_to_neighbours():
    key = torch.zeros(1, 1, 9, 2)
    key[0, 0, 4, 0] = 60.0
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    call, layout = Call(query, key, key), Layout(1, 1, 9, query_offset=8)
    plain = observed_mass(call, layout, query, 9, pool=1)[0, 0]
    assert plain.argmax() == 4
    mean = observed_mass(call, layout, query, 9, pool=3)[0, 0]
    torch.testing.assert_close(mean[3:6], torch.full((3,), 1 / 3))
    most = observed_mass(call, layout, query, 9, pool=3, reduce="max")[0, 0]
    torch.testing.assert_close(most[3:6], torch.ones(3))


def test_padding_is_neither_read_nor_asks():
    query, key = normal(2, 2, 3, 4), normal(2, 1, 8, 4, seed=1)
    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[1, :3] = False
    call = Call(query, key, key)
    layout = Layout(2, 3, 8, query_offset=5, padding=padding)
    got = observed_mass(call, layout, query, 8, pool=1)
    alone = Call(query[1:], key[1:, :, 3:], key[1:, :, 3:])
    want = observed_mass(alone, Layout(1, 3, 5, query_offset=2), query[1:], 5, pool=1)
    torch.testing.assert_close(got[1:, :, 3:], want)
    assert (got[1, :, :3] == 0).all()


def test_keep_equal_by_hand():
    mass = torch.tensor([[[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, 0.1]]])
    allowed = torch.tensor([[[True, True, True, False]]])
    kept = keep_equal(mass, allowed, torch.tensor([2]))
    assert kept.int().tolist() == [[[0, 1, 1, 0], [1, 1, 0, 0]]]


def test_heads_share_by_need_above_a_floor():
    mass = torch.tensor([[[0.9, 0.8, 0.7, 0.6, 0.5], [0.05, 0.04, 0.03, 0.02, 0.01]]])
    allowed = torch.ones(1, 1, 5, dtype=torch.bool)
    free = keep_over_heads(mass, allowed, torch.tensor([2]), floor=0.0)
    assert free.sum(-1).tolist() == [[4, 0]]
    held = keep_over_heads(mass, allowed, torch.tensor([2]), floor=0.5)
    assert held.int().tolist() == [[[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]]
    equal = keep_over_heads(mass, allowed, torch.tensor([2]), floor=1.0)
    assert torch.equal(equal, keep_equal(mass, allowed, torch.tensor([2])))
