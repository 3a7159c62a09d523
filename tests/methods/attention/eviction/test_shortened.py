import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gossamer.core import GossamerError
from gossamer.methods.attention.eviction.packed import PackedIndex
from gossamer.methods.attention.eviction.shortened import (
    Shortened,
    held_bytes,
    settle,
    shorten,
    why_not,
)
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.memory import Memory
from tests.models.tiny import tiny_model

B, G, K, D = 2, 2, 8, 4


def cache(length=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kv = DynamicCache()
    kv.update(*(torch.randn(B, G, length, D, generator=generator) for _ in range(2)), 0)
    return kv


def kept():
    mask = torch.zeros(B, G, K, dtype=torch.bool)
    mask[0, 0, [0, 5]] = mask[0, 1, [1, 2, 7]] = mask[1, 0, 3] = mask[1, 1, 4:] = True
    return mask


def shortened(later=0):
    kv, memory = cache(), Memory()
    memory.of(kv, 0)
    before = kv.layers[0].keys
    shorten(kv.layers[0], kept())
    new = torch.randn(B, G, later, D, generator=torch.Generator().manual_seed(3))
    out = kv.update(new, -new, 0) if later else None
    return kv, memory, before, new, out


def test_update_gives_the_kept_keys_and_the_later_ones():
    _, _, before, new, (keys, values) = shortened(later=2)
    assert keys.shape == (B, G, 4 + 2, D)
    for b in range(B):
        for g in range(G):
            want = torch.cat([before[b, g, kept()[b, g]], new[b, g]])
            assert torch.equal(keys[b, g, 6 - len(want) :], want)
            assert torch.equal(values[b, g, -2:], -new[b, g])


def test_lengths_stay_those_of_the_sequence():
    kv, *_ = shortened(later=3)
    assert kv.get_seq_length() == K + 3
    assert kv.get_mask_sizes(1, 0) == (K + 4, 0)
    assert kv.layers[0].counts.tolist() == [[5, 6], [4, 7]]
    assert kv.layers[0].places.rows(torch.tensor([0])).flat[:, 0].tolist() == [0, 5, 1, 2, 7]


def test_memory_is_really_freed():
    kv = DynamicCache()
    big = torch.randn(1, 2, 4096, 64)
    kv.update(big, big.clone(), 0)
    before = held_bytes(kv)
    assert before == 2 * big.nbytes
    mask = torch.zeros(1, 2, 4096, dtype=torch.bool)
    mask[0, 0, :100], mask[0, 1, :300] = True, True
    shorten(kv.layers[0], mask)
    exact = 400 * 64 * 4 * 2 + 400 * 4
    assert exact <= held_bytes(kv) <= exact + 200
    assert kv.layers[0].keys.untyped_storage().nbytes() == 0


def test_rows_follow_reordering_repeating_and_choosing():
    kv, _, _, _, (keys, _) = shortened(later=1)
    places = kv.layers[0].places.padded()[..., 0]
    step = torch.zeros(2, G, 1, D)
    twin = copy.deepcopy(kv)
    twin.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(twin.update(step, step, 0)[0][:, :, :-1], keys[[1, 0]])
    assert torch.equal(twin.layers[0].places.padded()[..., 0], places[[1, 0]])
    twin = copy.deepcopy(kv)
    twin.batch_repeat_interleave(2)
    wide = torch.zeros(4, G, 1, D)
    assert torch.equal(twin.update(wide, wide, 0)[0][:, :, :-1], keys[[0, 0, 1, 1]])
    for indices in (torch.tensor([1]), torch.tensor([False, True])):
        twin = copy.deepcopy(kv)
        twin.batch_select_indices(indices)
        one = torch.zeros(1, G, 1, D)
        got = twin.update(one, one, 0)[0][:, :, :-1]
        assert torch.equal(got[:, :, -5:], keys[1:, :, -5:])
    assert kv.layers[0].keys.shape[0] == 2


def test_only_later_tokens_can_be_taken_back():
    kv, *_ = shortened(later=3)
    kv.crop(-2)
    assert kv.get_seq_length() == K + 1
    assert kv.layers[0].keys.shape[2] == 1
    with pytest.raises(GossamerError, match="cannot take back 2 tokens: all but the latest 1"):
        kv.crop(-2)
    kv.crop(0)
    assert kv.get_seq_length() == K + 1


def test_reset_makes_an_ordinary_layer_again():
    kv, *_ = shortened(later=1)
    kv.reset()
    assert not isinstance(kv.layers[0], Shortened)
    assert isinstance(kv.layers[0], DynamicLayer)
    assert kv.get_seq_length() == 0
    new = torch.randn(B, G, 3, D)
    assert torch.equal(kv.update(new, new, 0)[0], new)


def test_without_its_method_it_refuses():
    kv, memory, *_ = shortened()
    memory.forget()
    with pytest.raises(GossamerError, match="was restored; start with a new cache"):
        kv.update(torch.zeros(B, G, 1, D), torch.zeros(B, G, 1, D), 0)


def test_layers_that_cannot_be_shortened():
    assert "sliding window" in (why_not(DynamicSlidingWindowLayer(4)) or "")
    config = tiny_model("llama").config
    assert "StaticLayer" in (why_not(StaticCache(config, max_cache_len=8).layers[0]) or "")
    kv, *_ = shortened()
    assert why_not(kv.layers[0]) == "it is shortened already"
    with pytest.raises(GossamerError, match="cannot be shortened: it is shortened already"):
        shorten(kv.layers[0], kept())
    assert why_not(DynamicLayer()) is None


def test_offloading_moves_everything():
    kv, *_ = shortened(later=1)
    layer = kv.layers[0]
    before = layer.kept_keys.flat
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.kept_keys.flat, before)
    assert layer.kept_keys.flat.device == layer.device


def test_packed_index_is_the_held_pairs():
    model = Layout(1, 2, 10, query_offset=8)
    counts = torch.tensor([[4, 6]])
    index = PackedIndex.over(model, counts, later=2)
    assert index.layout.keys == 6
    assert index.layout.query_offset == 4
    mask = index.mask()
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert mask[0, 1].int().tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert index.pairs() == (3 + 4 + 5 + 6, 2 * (9 + 10))
    assert not index.whole
    assert PackedIndex.over(model, torch.tensor([[4, 4]]), 2).whole


def test_packed_index_hides_padding_among_later_tokens():
    padding = torch.ones(2, 10, dtype=torch.bool)
    padding[1, 8] = False
    model = Layout(2, 1, 10, query_offset=9, padding=padding)
    index = PackedIndex.over(model, torch.full((2, 1), 4), later=2)
    assert index.mask()[:, 0, 0].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 1]]


def test_a_shortened_layer_gives_up_more():
    layer = DynamicLayer()
    keys = torch.arange(10.0).view(1, 1, 10, 1).repeat(1, 2, 1, 1)
    keys[:, 1] += 100
    layer.update(keys, -keys)
    kept = torch.tensor([[[1, 0, 0, 1], [0, 0, 1, 0]]], dtype=torch.bool)
    shorten(layer, kept)
    # Head 0 holds 0 and 3, head 1 holds 2 at the right end; 4 and 5 come up as well.
    settle(layer, torch.tensor([[[0, 1, 1, 0], [0, 1, 0, 1]]], dtype=torch.bool))
    assert layer.places.flat[:, 0].tolist() == [3, 4, 2, 5]
    assert layer.kept_keys.flat[:, 0].tolist() == [3, 4, 102, 105]
    assert layer.kept_values.flat[:, 0].tolist() == [-3, -4, -102, -105]
    assert layer.keys[0, :, :, 0].tolist() == [[6, 7, 8, 9], [106, 107, 108, 109]]
    assert layer.removed == 6
    assert layer.get_seq_length() == 10
    assert layer.counts.tolist() == [[6, 6]]
    # Nothing of the old tensors stays alive behind a slice.
    assert layer.keys.untyped_storage().nbytes() == 2 * 4 * 4
