import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.core.pattern import Window
from gossamer.methods.attention.index import BlockIndex, FullIndex, WindowIndex, pairs_in_window
from gossamer.methods.attention.layout import Layout


def rows(mask):
    return ["".join("x" if v else "." for v in row) for row in mask.tolist()]


def test_window_worked_example():
    mask = WindowIndex(Layout(1, 6, 6), sink=1, recent=2).mask()[0, 0]
    assert rows(mask) == ["x.....", "xx....", "xxx...", "x.xx..", "x..xx.", "x...xx"]


def test_left_padding_moves_the_sinks():
    padding = torch.tensor([[0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    mask = WindowIndex(Layout(1, 6, 6, padding=padding), sink=1, recent=2).mask()[0, 0]
    assert rows(mask) == ["......", "......", "..x...", "..xx..", "..xxx.", "..x.xx"]


def test_padding_between_tokens_does_not_use_up_the_window():
    padding = torch.tensor([[1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    mask = WindowIndex(Layout(1, 6, 6, padding=padding), sink=0, recent=3).mask()[0, 0]
    assert rows(mask)[-1] == ".x..xx"


def test_a_model_s_own_window_is_intersected():
    layout = Layout(1, 6, 6, rule=lambda b, h, q, k: (k <= q) & (k > q - 4), causal=False)
    mask = WindowIndex(layout, sink=1, recent=2).mask()[0, 0]
    assert rows(mask) == ["x.....", "xx....", "xxx...", "x.xx..", "...xx.", "....xx"]


def test_packed_sequences_have_their_own_sinks():
    ids = torch.tensor([[0, 0, 1, 1, 1, 1]])
    rule = lambda b, h, q, k: (k <= q) & (ids[b, q] == ids[b, k])  # noqa: E731
    layout = Layout(1, 6, 6, rule=rule, causal=False, regular=False)
    mask = WindowIndex(layout, sink=1, recent=2).mask()[0, 0]
    assert rows(mask) == ["x.....", "xx....", "..x...", "..xx..", "..xxx.", "..x.xx"]


def test_a_key_the_model_shows_ahead_stays():
    layout = Layout(1, 3, 3, rule=lambda b, h, q, k: k >= 0, causal=False, regular=False)
    assert rows(WindowIndex(layout, sink=0, recent=1).mask()[0, 0]) == ["xxx", ".xx", "..x"]


@given(
    length=st.integers(1, 40),
    sink=st.integers(0, 6),
    recent=st.integers(1, 45),
    own=st.none() | st.integers(1, 45),
)
@settings(max_examples=80, deadline=None)
def test_counted_pairs_are_the_mask_s(length, sink, recent, own):
    rule = lambda b, h, q, k: (k <= q) & (k > q - (own or length))  # noqa: E731
    index = WindowIndex(Layout(1, length, length, rule=rule), sink, recent)
    assert pairs_in_window(length, sink, recent, own) == index.pairs()
    if own is None:
        kept, total = index.pairs()
        assert 1 - kept / total == pytest.approx(Window(sink, recent).sparsity_at(length))


@given(
    queries=st.integers(1, 20),
    past=st.integers(0, 9),
    high=st.integers(1, 7),
    wide=st.integers(1, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_block_lists_and_maps_are_one(queries, past, high, wide, seed):
    layout = Layout(2, queries, queries + past, query_offset=past)
    size = (2, 3, -(-queries // high), -(-(queries + past) // wide))
    kept = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    index = BlockIndex.from_blocks(layout, kept, (high, wide))
    assert torch.equal(index.blocks(), kept)
    mask = index.mask()
    assert mask.shape == (2, 3, queries, queries + past)
    for q in range(queries):
        for k in range(queries + past):
            want = kept[:, :, q // high, k // wide] & (k <= q + past)
            assert torch.equal(mask[:, :, q, k], want)


def test_blocks_of_a_window_cover_it():
    window = WindowIndex(Layout(1, 10, 10), sink=1, recent=2)
    index = BlockIndex.from_index(window, (4, 4))
    assert index.indptr.tolist() == [[[0, 1, 3, 6]]]
    assert index.indices.tolist() == [0, 0, 1, 0, 1, 2]
    assert bool((index.mask() | ~window.mask()).all())
    assert torch.equal(BlockIndex.from_index(window, (1, 1)).mask(), window.mask())


def test_wrong_block_lists_are_refused():
    layout = Layout(1, 4, 4)
    with pytest.raises(GossamerError, match="indptr"):
        BlockIndex(layout, (2, 2), torch.zeros(1, 1, 2, dtype=torch.long), torch.zeros(0).long())
    with pytest.raises(GossamerError, match="outside"):
        BlockIndex(layout, (2, 2), torch.tensor([[[0, 1, 1]]]), torch.tensor([2]))


@given(
    queries=st.integers(1, 30),
    past=st.integers(0, 20),
    high=st.integers(1, 7),
    wide=st.integers(1, 7),
    named=st.integers(0, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_counting_by_blocks_is_counting_pairs(queries, past, high, wide, named, seed):
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(2, queries, queries + past, query_offset=past)
    size = (2, 3, -(-queries // high), -(-(queries + past) // wide))
    kept = torch.rand(size, generator=generator) < 0.4
    order = torch.rand(2, 3, queries + past, generator=generator).argsort(-1)
    columns = order[..., : min(named, queries + past)].sort(-1).values
    columns = torch.nn.functional.pad(columns, (0, 2), value=-1)
    index = BlockIndex.from_blocks(layout, kept, (high, wide), columns)
    mask = index.mask()
    assert index.pairs() == (int(mask.sum()), 6 * int(layout.mask().sum()))
    for k in columns[1, 2, :-2].tolist():
        assert torch.equal(mask[1, 2, :, k], layout.mask()[0, 0, :, k])
    assert torch.equal(index.mask(slice(1, 3)), mask[:, :, 1:3])


def test_columns_of_another_shape_are_refused():
    layout = Layout(1, 4, 4)
    kept = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    with pytest.raises(GossamerError, match="columns"):
        BlockIndex.from_blocks(layout, kept, (2, 2), torch.zeros(1, 1, 1, dtype=torch.long))


def test_a_full_index_is_the_model_s_mask():
    layout = Layout(1, 3, 5, query_offset=2)
    assert FullIndex(layout).whole
    assert torch.equal(FullIndex(layout).mask(), layout.mask())
    assert FullIndex(layout).pairs() == (12, 12)


def test_single_keys_never_make_a_square(monkeypatch):
    """Token lists of a long prompt are counted and masked row by row."""
    length, width = 6000, 4
    layout = Layout(1, length, length)
    at = torch.arange(length)
    listed = (at[:, None] - torch.arange(width).flip(0)).clamp_min(0)
    first = torch.ones(length, dtype=torch.long) * width
    for query in range(width - 1):
        first[query] = query + 1
    indices = torch.cat([listed[q, width - int(n) :] for q, n in enumerate(first)])
    indptr = torch.cat([torch.zeros(1, dtype=torch.long), first.cumsum(0)]).view(1, 1, -1)
    index = BlockIndex(layout, (1, 1), indptr, indices)
    seen, blocks = [], BlockIndex.blocks

    def spy(self, rows=None):
        made = blocks(self, rows)
        seen.append(made.numel())
        return made

    monkeypatch.setattr(BlockIndex, "blocks", spy)
    assert index.pairs()[0] == len(indices)
    assert index.mask(slice(100, 102)).sum() == 2 * width
    assert max(seen) < length * length / 2
