"""S2-Attention's blocks: worked, together complete, aligned to text and not to padding."""

from math import gcd

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import run
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.s2_attention import (
    S2Attention,
    ShardSelector,
    coverage,
    sharded_blocks,
)
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def by_hand(length, *, heads, block, local, stride, offsets="heterogeneous"):
    """(G, T, T) token by token, straight from the rule."""
    step = max(1, stride // heads) if offsets == "heterogeneous" else 0
    kept = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        for query in range(length):
            for key in range(query + 1):
                i, j = query // block, key // block
                near = i - j < local
                far = offsets != "local" and (j + head * step + 1) % stride == 0
                kept[head, query, key] = near or far
    return kept


def selector(heads=2, block=4, local=1, stride=2, offsets="heterogeneous", dense_every=0):
    return ShardSelector(heads, block, local, stride, offsets, dense_every)


def test_blocks_of_a_worked_case():
    block = torch.arange(5)
    kept = sharded_blocks(block, block, heads=2, local=1, stride=4)
    # Head 0 reads block 3 of each four, head 1 (offset 2) block 1; each its own.
    assert kept[0, 4].tolist() == [False, False, False, True, True]
    assert kept[1, 4].tolist() == [False, True, False, False, True]
    assert kept[1, 0].tolist() == [True, False, False, False, False]


@given(
    heads=st.sampled_from([1, 2, 4, 8]),
    stride=st.integers(1, 8),
    local=st.integers(1, 3),
    count=st.integers(1, 24),
)
@settings(max_examples=60, deadline=None)
def test_heads_together_read_the_far_context_if_there_are_enough(heads, stride, local, count):
    block = torch.arange(count)
    kept = sharded_blocks(block, block, heads=heads, local=local, stride=stride)
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    assert not (kept & ~causal).any()
    # The stride classes alone, without what is near in any case.
    far = causal & (block[:, None] - block >= local)
    if heads >= stride:
        assert torch.equal(kept.any(0) | ~far, torch.ones_like(far))
        assert coverage(heads, stride) == 1.0
    elif count >= local + stride:
        assert not (kept.any(0) | ~far).all()
    lone = sharded_blocks(
        block, block, heads=heads, local=local, stride=stride, offsets="homogeneous"
    )
    if stride > 1 and count >= local + stride:
        assert not (lone.any(0) | ~far).all(), "one offset for all heads must miss blocks"
    assert coverage(heads, stride, "homogeneous") == 1 / stride


def test_fewer_heads_than_the_stride_spread_over_it():
    assert coverage(4, 8) == 0.5
    assert coverage(6, 8) == 0.75, "heads 0 to 5 at a step of 1"
    assert coverage(2, 8, "local") == 0.0


@pytest.mark.parametrize("offset", [0, 3, 4, 9])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_chunk_reads_what_the_whole_prompt_would(offset, queries):
    length = offset + queries
    whole = by_hand(length, heads=2, block=4, local=1, stride=2)
    index = selector().blocks(Layout(1, queries, length, query_offset=offset))
    assert torch.equal(index.mask()[0], whole[:, offset:])


@pytest.mark.parametrize("pad", [1, 4, 6])
def test_padding_moves_no_block(pad):
    length = 13
    whole = by_hand(length, heads=2, block=4, local=1, stride=2)
    padding = torch.ones(2, length + pad, dtype=torch.bool)
    padding[0, :pad] = False
    layout = Layout(2, length + pad, length + pad, padding=padding, causal=False)
    index = selector().blocks(layout)
    assert torch.equal(index.mask()[0, :, pad:, pad:], whole)
    longer = by_hand(length + pad, heads=2, block=4, local=1, stride=2)
    assert torch.equal(index.mask()[1], longer)
    assert index.block[0] == gcd(4, pad)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_executors_agree_with_the_rule():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 21, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 21, 8, generator=generator, dtype=torch.float64)
    call = Call(query, key, value)
    index = selector().blocks(Layout(1, 21, 21))
    kept = by_hand(21, heads=2, block=4, local=1, stride=2).repeat_interleave(2, 0)
    score = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    want = score.masked_fill(~kept, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    for name in ("gather", "masked", "reference", "flex"):
        torch.testing.assert_close(run(name, call, index), want)


def test_equal_calls_share_an_index():
    """What an executor prepared for it (FlexAttention's block mask) serves the next forward."""
    chosen = selector()
    call = Call(*torch.zeros(3, 1, 2, 12, 4))
    first = chosen.select(call, Layout(1, 12, 12), 0)
    assert chosen.select(call, Layout(1, 12, 12), 3) is first
    assert chosen.select(call, Layout(1, 12, 12), 0).mask().shape == (1, 2, 12, 12)
    chunk = chosen.select(call, Layout(1, 12, 20, query_offset=8), 0)
    whole = by_hand(20, heads=2, block=4, local=1, stride=2)
    assert torch.equal(chunk.mask()[0], whole[:, 8:])


@pytest.mark.parametrize("own", [None, 6])
def test_pairs_are_those_of_the_mean_head(own):
    kept = by_hand(18, heads=2, block=4, local=1, stride=2)
    at = torch.arange(18)
    band = at[:, None] >= at
    if own is not None:
        band &= at[:, None] - at < own
    want = round(int((kept & band).sum()) / 2)
    assert selector().pairs(18, 0, own) == (want, int(band.sum()))


def test_each_nth_layer_is_dense():
    chosen = selector(dense_every=2)
    assert [chosen.is_dense(layer) for layer in range(4)] == [False, True, False, True]
    kept, total = chosen.pairs(18, 1, None)
    assert kept == total
    method = S2Attention(block=4, local=1, stride=2, dense_every=2, steps=0)
    with method.apply(tiny_model("llama"), random_tokens()) as work:
        rows = work.report().rows
    assert rows[0].sparsity > 0 == rows[1].sparsity


def test_blocks_follow_key_value_heads_under_gqa():
    model = tiny_model("llama")
    with S2Attention(block=4, local=1, stride=2, dense_every=0, steps=0).apply(
        model, random_tokens()
    ) as work:
        assert work.selector.heads == 2
        assert "together the 2 key-value heads read 100% of the far blocks" in str(work.report())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"offsets": "other"}, "offsets is 'other'"),
        ({"stride": 0}, "stride"),
        ({"local": 0}, "local"),
        ({"dense_every": 1}, "every layer dense"),
        ({"lr": 0}, "lr is 0"),
    ],
)
def test_bad_parameters_are_refused(values, says):
    with pytest.raises(GossamerError, match=says):
        S2Attention(**values)
