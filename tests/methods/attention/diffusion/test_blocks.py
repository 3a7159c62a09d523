"""SparseD's scores and choice against token-by-token arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.methods.attention.diffusion.blocks import (
    first_generated,
    keep_isolated,
    tile_means,
)
from gossamer.methods.attention.diffusion.calls import bidirectional_layout
from gossamer.methods.attention.executor import Call


def call_of(length, heads=2, rows=1, **values):
    generator = torch.Generator().manual_seed(length)
    shape = rows, heads, length, 4
    query, key, value = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return Call(query, key, value, **values)


@pytest.mark.parametrize("length", [8, 11])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_tile_means_are_means_of_the_attention(length, scale):
    call = call_of(length, scale=scale)
    factor = 4**-0.5 if scale is None else scale
    share = (call.query @ call.key.transpose(2, 3) * factor).softmax(-1)
    found = tile_means(call, bidirectional_layout(call.query), 3)
    blocks = -(-length // 3)
    for i in range(blocks):
        for j in range(blocks):
            tile = share[:, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            torch.testing.assert_close(found[:, :, i, j], tile.mean((2, 3)))


def test_the_scale_is_the_head_s_width_and_not_the_number_of_heads():
    """Dividing by the root of 16 heads instead of 4 channels would give another ranking."""
    call = call_of(12, heads=16)
    found = tile_means(call, bidirectional_layout(call.query), 3)
    cold = tile_means(call_of(12, heads=16, scale=16**-0.5), bidirectional_layout(call.query), 3)
    assert not torch.equal(found.argsort(-1), cold.argsort(-1))


def test_padding_has_no_share():
    call = call_of(8, rows=2)
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[1, ..., 6:] = False
    found = tile_means(call, bidirectional_layout(call.query, mask), 2)
    assert (found[1, :, :, 3] == 0).all()
    assert (found[1, :, 3] == 0).all()
    assert (found[0] > 0).all()
    short = Call(call.query[1:, :, :6], call.key[1:, :, :6], call.value[1:, :, :6])
    alone = tile_means(short, bidirectional_layout(short.query), 2)
    torch.testing.assert_close(found[1:, :, :3, :3], alone)


def test_first_generated_block():
    assert first_generated(0, 32, 8) == 0
    assert first_generated(8, 32, 8) == 1
    assert first_generated(9, 32, 8) == 2
    assert first_generated(30, 32, 8) == 3, "the last block counts as generation"
    assert first_generated(32, 32, 8) == 3


def test_prompt_and_generation_are_ranked_apart():
    score = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 3.0]])
    kept = keep_isolated(score, 4, 0.25)
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1, 5, 7]
    together = keep_isolated(score, 8, 0.25)
    assert together[0].nonzero()[:, 0].tolist() == [0, 1, 2]


@given(
    blocks=st.integers(1, 30),
    first=st.integers(0, 30),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_exact(blocks, first, share):
    first = min(first, blocks)
    score = torch.rand(3, 2, blocks, generator=torch.Generator().manual_seed(blocks))
    kept = keep_isolated(score, first, share)
    for part, size in ((kept[..., :first], first), (kept[..., first:], blocks - first)):
        want = min(size, 1 + round(share * 10) * size // 10)
        assert (part.sum(-1) == want).all()
