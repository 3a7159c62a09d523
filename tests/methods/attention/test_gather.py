import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import choose, execute, run
from gossamer.methods.attention.index import BlockIndex, WindowIndex
from gossamer.methods.attention.layout import Layout
from tests.methods.attention.test_executor import make


def draw(layout, block, shared, seed, share=0.4, columns=0):
    generator = torch.Generator().manual_seed(seed)
    size = (
        layout.batch,
        shared,
        -(-layout.queries // block[0]),
        -(-layout.keys // block[1]),
    )
    kept = torch.rand(size, generator=generator) < share
    named = None
    if columns:
        order = torch.rand(*size[:2], layout.keys, generator=generator).argsort(-1)
        named = order[..., :columns].sort(-1).values
    return BlockIndex.from_blocks(layout, kept, block, named)


@given(
    queries=st.integers(1, 40),
    past=st.integers(0, 30),
    high=st.sampled_from([1, 4, 16]),
    wide=st.sampled_from([1, 4, 16]),
    columns=st.integers(0, 3),
    left=st.integers(0, 6),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_gather_is_the_definition(queries, past, high, wide, columns, left, seed):
    keys = queries + past
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[0, : min(left, keys - 1)] = False
    call = make(2, queries, keys, dtype=torch.float64)
    layout = Layout(2, queries, keys, query_offset=past, padding=padding)
    index = draw(layout, (high, wide), 2, seed, columns=min(columns, keys))
    gap = run("gather", call, index) - run("reference", call, index)
    assert float(gap.abs().max()) < 1e-12


def test_a_model_s_own_window_and_softcap():
    layout = Layout(1, 20, 20, rule=lambda b, h, q, k: (k <= q) & (k > q - 6), causal=False)
    call = make(1, 20, 20, softcap=2.0, sink_logits=torch.zeros(4))
    index = draw(layout, (4, 4), 2, 1)
    torch.testing.assert_close(run("gather", call, index), run("reference", call, index))


def test_nothing_listed_gives_zeros():
    layout = Layout(1, 4, 4)
    empty = BlockIndex.from_blocks(layout, torch.zeros(1, 2, 1, 1, dtype=torch.bool), (4, 4))
    assert not run("gather", make(1, 4, 4), empty).any()


@pytest.mark.parametrize("name", ["gather", "masked", "reference"])
def test_shared_heads_equal_repeated_ones(name):
    layout = Layout(1, 24, 24)
    call, index = make(1, 24, 24), draw(Layout(1, 24, 24), (4, 4), 2, 3, columns=2)
    assert index.columns is not None
    wide = BlockIndex.from_blocks(
        layout,
        index.blocks().repeat_interleave(2, 1),
        (4, 4),
        index.columns.repeat_interleave(2, 1),
    )
    repeated = Call(
        call.query, call.key.repeat_interleave(2, 1), call.value.repeat_interleave(2, 1)
    )
    torch.testing.assert_close(run(name, call, index), run(name, repeated, wide))


def test_it_reads_nothing_else():
    call = make(1, 1, 64)
    layout = Layout(1, 1, 64, query_offset=63)
    index = draw(layout, (1, 8), 2, 5, share=0.3)
    want = run("gather", call, index)
    unread = ~index.mask()[:, :, 0]
    call.key[unread] = torch.nan
    call.value[unread] = torch.nan
    assert torch.equal(run("gather", call, index), want)


def test_auto_gathers_short_lists_and_masks_long_ones():
    layout = Layout(1, 256, 256)
    call = make(1, 256, 256)
    eye = torch.eye(16, dtype=torch.bool).expand(1, 2, -1, -1)
    short = BlockIndex.from_blocks(layout, eye, (16, 16))
    long = BlockIndex.from_blocks(layout, torch.ones_like(eye), (16, 16))
    assert choose(short, "auto", call) == "gather"
    assert choose(long, "auto", call) == "masked"
    assert execute(call, short)[1] == "gather"


def test_what_it_cannot_run():
    with pytest.raises(GossamerError, match="no block lists"):
        choose(WindowIndex(Layout(1, 8, 8), 1, 2), "gather")
    packed = Layout(1, 8, 8, regular=False)
    with pytest.raises(GossamerError, match="packed"):
        choose(draw(packed, (4, 4), 2, 0), "gather")
