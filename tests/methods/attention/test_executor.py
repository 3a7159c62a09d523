import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import basic, choose, execute, run
from gossamer.methods.attention.index import BlockIndex, FullIndex, WindowIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.window import window_attention, window_cost
from tests.methods.attention.naive import naive_attention, window_keys

EXECUTORS = ("reference", "masked", "window")


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor):
                held = made.untyped_storage().nbytes() // made.element_size()
                self.elements = max(self.elements, held)
        return out


def make(batch, queries, keys, *, heads=4, shared=2, width=8, seed=0, dtype=torch.float32, **rest):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return Call(
        draw(batch, heads, queries, width),
        draw(batch, shared, keys, width),
        draw(batch, shared, keys, width + 2),
        **rest,
    )


def expected(call, layout, sink, recent):
    kept = []
    for row in range(layout.batch):
        real = list(range(layout.known))
        if layout.padding is not None:
            real = layout.padding[row].nonzero()[:, 0].tolist()
        keys = [window_keys(real, int(q), sink, recent) for q in layout.query_index]
        kept.append(
            [[k - layout.key_offset for k in row if k >= layout.key_offset] for row in keys]
        )
    return naive_attention(
        call.query, call.key, call.value, kept, call.scale, call.softcap, call.sink_logits
    )


@given(
    queries=st.integers(1, 150),
    past=st.integers(0, 20),
    sink=st.integers(0, 5),
    recent=st.integers(1, 100),
    left=st.integers(0, 9),
    right=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_window_agrees_with_reference_on_any_size(queries, past, sink, recent, left, right):
    keys = queries + past
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[0, : min(left, keys - 1)] = False
    padding[1, keys - min(right, keys - 1) :] = False
    call = make(2, queries, keys, dtype=torch.float64)
    layout = Layout(2, queries, keys, query_offset=past, padding=padding)
    index = WindowIndex(layout, sink, recent)
    gap = run("window", call, index) - run("reference", call, index)
    assert float(gap.abs().max()) < 1e-12


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize(("queries", "past"), [(1, 0), (1, 37), (13, 0), (7, 30), (67, 3)])
def test_executors_agree_with_loops_in_fp64(name, queries, past):
    keys = queries + past
    call, layout = make(1, queries, keys), Layout(1, queries, keys, query_offset=past)
    got = run(name, call, WindowIndex(layout, 2, 5))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected(call, layout, 2, 5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXECUTORS)
def test_padding_of_both_sides(name):
    padding = torch.ones(2, 11, dtype=torch.bool)
    padding[0, :4] = False
    padding[1, 8:] = False
    call, layout = make(2, 11, 11), Layout(2, 11, 11, padding=padding)
    got = run(name, call, WindowIndex(layout, 2, 3))
    torch.testing.assert_close(got.double(), expected(call, layout, 2, 3), atol=1e-5, rtol=1e-5)
    assert not got[0, :, :4].any()


@pytest.mark.parametrize("name", EXECUTORS)
def test_scale_softcap_and_learned_sink(name):
    more = {"scale": 0.7, "softcap": 1.5, "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    call, layout = make(1, 9, 9, **more), Layout(1, 9, 9)
    got = run(name, call, WindowIndex(layout, 1, 4))
    torch.testing.assert_close(got.double(), expected(call, layout, 1, 4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_cache_that_dropped_its_oldest_keys(name):
    layout = Layout(1, 3, 6, query_offset=9, key_offset=6, causal=False)
    call = make(1, 3, 6)
    got = run(name, call, WindowIndex(layout, 8, 2))
    torch.testing.assert_close(got.double(), expected(call, layout, 8, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXECUTORS)
def test_shared_heads_equal_repeated_ones(name):
    call = make(1, 20, 20)
    repeated = Call(
        call.query, call.key.repeat_interleave(2, 1), call.value.repeat_interleave(2, 1)
    )
    index = WindowIndex(Layout(1, 20, 20), 2, 6)
    torch.testing.assert_close(run(name, call, index), run(name, repeated, index))


@pytest.mark.parametrize("block", [1, 3, 64, 1000])
def test_the_size_of_query_blocks_changes_nothing(block):
    call = make(1, 50, 50, heads=2, shared=2)
    index = WindowIndex(Layout(1, 50, 50), 3, 7)

    def part(rows, key, value, mask):
        score = call.query[:, :, rows] @ key.mT / 8**0.5
        score = score if mask is None else score.masked_fill(~mask, -torch.inf)
        return (score.softmax(-1) @ value)[:, :, None]

    got = window_attention(index, call.key, call.value, part, block).flatten(1, 2)
    torch.testing.assert_close(got, run("reference", call, index))


def test_window_reads_nothing_else():
    call = make(1, 40, 200)
    index = WindowIndex(Layout(1, 40, 200, query_offset=160), sink=2, recent=10)
    want = run("window", call, index)
    unread = slice(2, 160 - 10 + 1)
    call.key[:, :, unread] = torch.nan
    call.value[:, :, unread] = torch.nan
    assert torch.equal(run("window", call, index), want)


def test_cost_grows_with_the_window_not_with_the_length():
    cost = {n: window_cost(WindowIndex(Layout(1, n, n), 4, 60)) for n in (1 << 12, 1 << 13)}
    assert cost[1 << 13] / cost[1 << 12] < 2.05
    assert cost[1 << 13] < (1 << 13) * (4 + 60 + 64)


def test_long_prompts_hold_no_square_mask():
    length = 1 << 15
    index = WindowIndex(Layout(1, length, length), 4, 60)
    call = make(1, length, length, heads=1, shared=1)
    assert execute(call, index)[1] == "window"
    steps = next(v for k, v in index.layout.memo.items() if k[0] == "steps")
    assert sum(s.mask.numel() for s in steps if s.mask is not None) < length * 200


def test_block_lists_run_by_definition():
    layout = Layout(1, 12, 12)
    kept = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    kept[0, 1, 2, 1] = False
    call, index = make(1, 12, 12), BlockIndex.from_blocks(layout, kept, (4, 4))
    full = run("reference", call, WindowIndex(layout, 0, 99))
    for name in ("reference", "masked"):
        got = run(name, call, index)
        changed = (got - full).abs().amax((0, 3)) > 1e-6
        assert changed.tolist() == [[False] * 12] * 2 + [[False] * 8 + [True] * 4] * 2
    assert execute(call, index)[1] == "masked"
    with pytest.raises(GossamerError, match="no window"):
        execute(call, index, "window")


class TestChoice:
    def test_nothing_removed_runs_dense(self):
        assert choose(WindowIndex(Layout(1, 32, 32), 4, 28)) == "dense"

    def test_long_runs_the_window_and_short_a_mask(self):
        assert choose(WindowIndex(Layout(1, 1024, 1024), 4, 200)) == "window"
        assert choose(WindowIndex(Layout(1, 40, 40), 4, 8)) == "masked"
        assert choose(WindowIndex(Layout(1, 1, 2048, query_offset=2047), 4, 200)) == "window"
        assert choose(WindowIndex(Layout(1, 1, 128, query_offset=127), 4, 30)) == "masked"

    def test_a_named_backend_runs_or_says_why_not(self):
        padding = torch.tensor([[1, 0, 1]], dtype=torch.bool)
        with pytest.raises(GossamerError, match="padding lies between"):
            choose(WindowIndex(Layout(1, 3, 3, padding=padding), 1, 1), "window")
        with pytest.raises(GossamerError, match="packed"):
            choose(WindowIndex(Layout(1, 3, 3, regular=False), 1, 1), "window")
        with pytest.raises(GossamerError, match="backend"):
            choose(WindowIndex(Layout(1, 3, 3), 1, 1), "triton")

    @pytest.mark.parametrize("queries", [1, 5])
    @pytest.mark.parametrize("spare", [0, 3])
    def test_dense_is_full_attention(self, queries, spare):
        keys = 9 if queries == 1 else 5
        call = make(1, queries, keys + spare)
        layout = Layout(1, queries, keys + spare, query_offset=keys - queries)
        index = WindowIndex(layout, 4, 100)
        torch.testing.assert_close(run("dense", call, index), run("reference", call, index))

    def test_heads_that_do_not_divide(self):
        call = make(1, 4, 4, heads=3)
        with pytest.raises(GossamerError, match="divide"):
            execute(call, WindowIndex(Layout(1, 4, 4), 1, 2), "reference")


@pytest.mark.parametrize("backend", ["masked", "reference", "dense"])
@pytest.mark.parametrize("left", [0, 5])
def test_no_executor_holds_a_square_map(backend, left, monkeypatch):
    """Neither a mask nor scores of every query and key, by heads or not."""
    tokens = 1536
    monkeypatch.setattr(basic, "MEMO", tokens * tokens // 2)
    padding = torch.ones(1, tokens, dtype=torch.bool)
    padding[0, :left] = False
    # A window of the model's own keeps fused causal attention from doing it all.
    layout = Layout(
        *(1, tokens, tokens),
        rule=lambda row, head, at, of: (of <= at) & (at - of < 64),
        padding=padding if left else None,
        causal=False,
    )
    index = FullIndex(layout) if backend == "dense" else WindowIndex(layout, 2, 8)
    largest = Largest()
    with torch.no_grad(), largest:
        run(backend, make(1, tokens, tokens, width=2), index)
    assert 0 < largest.elements < tokens * tokens // 2
