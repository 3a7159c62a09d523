"""Meeting fused attention calls: only there, only meanwhile, and only what can be understood."""

import pytest
import torch
from torch.nn import functional

from gossamer.core import GossamerError
from gossamer.methods.attention.diffusion.calls import AttentionCalls, bidirectional_layout, met


def tensors(length=6, heads=4, shared=4):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, length, 8, generator=generator)
    key, value = torch.randn(2, 2, shared, length, 8, generator=generator)
    return query, key, value


def test_calls_are_met_in_order_and_others_are_left_alone():
    query, key, value = tensors()
    seen = []

    def attend(call, layout, number):
        seen.append((number, layout.shape))
        return functional.scaled_dot_product_attention(call.query, call.key, call.value)

    want = functional.scaled_dot_product_attention(query, key, value)
    with AttentionCalls(attend) as calls:
        for _ in range(2):
            got = functional.scaled_dot_product_attention(query, key, value=value) * 1.0
    assert torch.equal(got, want)
    assert seen == [(0, (2, 1, 6, 6)), (1, (2, 1, 6, 6))]
    assert calls.count == 2
    functional.scaled_dot_product_attention(query, key, value)
    assert len(seen) == 2


def test_shared_keys_are_repeated_for_their_heads():
    query, key, value = tensors(shared=2)
    call, _ = met(query, key, value, enable_gqa=True)
    assert call.groups == (4, 1)
    assert torch.equal(call.key[:, 1], key[:, 0])
    assert torch.equal(call.key[:, 2], key[:, 1])


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("queries", [1, 6])
def test_a_mask_of_padding_is_understood(additive, queries):
    query, *_ = tensors()
    mask = torch.ones(2, 1, queries, 6, dtype=torch.bool)
    mask[0, :, :, 4:] = False
    want = mask[:, 0, 0]
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    layout = bidirectional_layout(query, mask)
    assert torch.equal(layout.padding, want)
    assert torch.equal(layout.mask()[0, 0], want[0].expand(6, 6))


def test_a_mask_of_nothing_is_none():
    query, *_ = tensors()
    assert bidirectional_layout(query, torch.ones(1, 1, 6, 6, dtype=torch.bool)).padding is None


def test_other_masks_and_calls_are_refused():
    query, key, value = tensors()
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    with pytest.raises(GossamerError, match="more than padding"):
        bidirectional_layout(query, causal[None, None])
    with pytest.raises(GossamerError, match="more than padding"):
        bidirectional_layout(query, torch.ones(2, 4, 6, 6, dtype=torch.bool))
    with pytest.raises(GossamerError, match="a causal mask"):
        met(query, key, value, is_causal=True)
    with pytest.raises(GossamerError, match="1 queries, 6 keys"):
        met(query[:, :, :1], key, value)
