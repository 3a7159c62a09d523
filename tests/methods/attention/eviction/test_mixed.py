import copy

import pytest
import torch
from transformers import DynamicCache

from gossamer.core import GossamerError
from gossamer.methods.attention.eviction.mixed import (
    MixedBits,
    MixedTensor,
    dequantize,
    mix,
    quantize,
)
from gossamer.methods.attention.eviction.shortened import held_bytes

B, G, K, D = 2, 2, 10, 8


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [7, 8])
def test_values_come_back_within_half_a_step(bits, channels):
    rows = torch.randn(5, channels, generator=torch.Generator().manual_seed(bits))
    codes, scale = quantize(rows, bits)
    assert codes.shape == (5, -(-channels * bits // 8))
    assert codes.dtype == torch.uint8
    step = (rows.amax(1) - rows.amin(1)) / (2**bits - 1)
    torch.testing.assert_close(scale[:, 0], step)
    back = dequantize(codes, scale, bits, channels)
    assert ((back - rows).abs() <= step[:, None] / 2 * 1.0001).all()
    # The ends of the range are met.
    torch.testing.assert_close(back.amax(1), rows.amax(1))
    torch.testing.assert_close(back.amin(1), rows.amin(1))


def test_two_bits_by_hand():
    codes, scale = quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 2)
    assert codes.tolist() == [[0b11100100]]
    assert scale.tolist() == [[1.0, 0.0]]


def test_equal_values_survive():
    rows = torch.full((2, 4), 3.0)
    assert torch.equal(dequantize(*quantize(rows, 2), 2, 4), rows)


def test_outlier_channels_are_divided_out():
    tensor = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    tensor[..., 0] = tensor[..., 0].sign() * 100.0
    matters = torch.ones(1, 64, dtype=torch.bool)
    mine = MixedTensor.encode(tensor, matters, (4, 2)).decode(matters, 1)
    plain = dequantize(*quantize(tensor[0, 0], 4), 4, 16)
    small = slice(1, None)
    error = (mine[0, 0] - tensor[0, 0])[:, small].abs().mean()
    assert error < 0.5 * (plain - tensor[0, 0])[:, small].abs().mean()


def cache(seed=0):
    generator = torch.Generator().manual_seed(seed)
    kv = DynamicCache()
    kv.update(*(torch.randn(B, G, K, D, generator=generator) for _ in range(2)), 0)
    matters = torch.rand(B, K, generator=generator) < 0.5
    return kv, matters


def test_chosen_tokens_are_closer_than_the_others():
    kv, matters = cache()
    keys = kv.layers[0].keys
    mix(kv.layers[0], matters, (4, 2))
    new = torch.randn(B, G, 2, D)
    got, _ = kv.update(new, new, 0)
    assert got.shape == (B, G, K + 2, D)
    assert torch.equal(got[:, :, K:], new)
    assert kv.get_seq_length() == K + 2
    away = (got[:, :, :K] - keys).abs().mean((1, 3))
    assert away[matters].mean() < 0.5 * away[~matters].mean()
    assert away[~matters].mean() > 0


def test_packing_again_takes_up_the_later_tokens():
    kv, matters = cache()
    mix(kv.layers[0], matters, (8, 2))
    new = torch.randn(B, G, 3, D)
    before, _ = kv.update(new, new, 0)
    mix(kv.layers[0], torch.ones(B, 3, dtype=torch.bool), (8, 2))
    layer = kv.layers[0]
    assert isinstance(layer, MixedBits)
    assert layer.stored == K + 3
    assert layer.keys.shape[2] == 0
    empty = torch.zeros(B, G, 1, D)
    after, _ = kv.update(empty, empty, 0)
    assert torch.equal(after[:, :, :K], before[:, :, :K])
    torch.testing.assert_close(after[:, :, K : K + 3], new, atol=0.05, rtol=0)


def test_bytes_are_those_of_codes_and_scales():
    kv = DynamicCache()
    tensor = torch.randn(1, 4, 512, 64).bfloat16()
    kv.update(tensor, tensor.clone(), 0)
    assert held_bytes(kv) == 2 * tensor.nbytes
    matters = torch.arange(512)[None] < 200
    mix(kv.layers[0], matters, (4, 2))
    channels = 4 * 64
    codes = 200 * channels // 2 + 312 * channels // 4
    parts = 2 * (codes + 512 * 2 * 2 + channels * 2)
    assert parts + 512 <= held_bytes(kv) <= parts + 512 + 200


def test_rows_follow():
    kv, matters = cache()
    mix(kv.layers[0], matters, (4, 2))
    step = torch.zeros(B, G, 1, D)
    want = copy.deepcopy(kv).update(step, step, 0)[0]
    twin = copy.deepcopy(kv)
    twin.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(twin.update(step, step, 0)[0], want[[1, 0]])
    twin = copy.deepcopy(kv)
    twin.batch_repeat_interleave(2)
    wide = torch.zeros(4, G, 1, D)
    assert torch.equal(twin.update(wide, wide, 0)[0], want[[0, 0, 1, 1]])
    twin = copy.deepcopy(kv)
    twin.batch_select_indices(torch.tensor([False, True]))
    assert torch.equal(twin.update(step[:1], step[:1], 0)[0], want[1:])


def test_only_later_tokens_can_be_taken_back():
    kv, matters = cache()
    mix(kv.layers[0], matters, (4, 2))
    new = torch.randn(B, G, 2, D)
    kv.update(new, new, 0)
    kv.crop(-1)
    assert kv.get_seq_length() == K + 1
    with pytest.raises(GossamerError, match="packed in few bits"):
        kv.crop(-2)
    kv.reset()
    assert not isinstance(kv.layers[0], MixedBits)
    assert kv.get_seq_length() == 0


def test_padding_has_no_say_in_the_scale():
    kv, matters = cache()
    twin = copy.deepcopy(kv)
    twin.layers[0].keys[:, :, 0] *= 1000
    real = torch.ones(B, K, dtype=torch.bool)
    real[:, 0] = False
    for one in (kv, twin):
        mix(one.layers[0], matters, (4, 2), real)
    step = torch.zeros(B, G, 1, D)
    a, b = (one.update(step, step, 0)[0] for one in (kv, twin))
    assert torch.equal(a[:, :, 1:], b[:, :, 1:])
