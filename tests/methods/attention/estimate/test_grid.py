import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.methods.attention.estimate import Grid
from gossamer.methods.attention.layout import Layout

CALLS = {
    "queries": st.integers(1, 14),
    "past": st.integers(0, 9),
    "size": st.integers(1, 6),
    "seed": st.integers(0, 99),
}


def touched(pairs, size):
    """Blocks (n, m) that hold one of the pairs (Q, K)."""
    rows, columns = -(-pairs.shape[0] // size), -(-pairs.shape[1] // size)
    found = torch.zeros(rows, columns, dtype=torch.bool)
    for q, k in pairs.nonzero().tolist():
        found[q // size, k // size] = True
    return found


def grid_of(queries, past, size, **more):
    layout = Layout(1, queries, queries + past, query_offset=past, **more)
    apart = layout.query_index[:, None] - layout.key_index
    return Grid(layout, size, size), apart


@given(**CALLS)
@settings(max_examples=60, deadline=None)
def test_diagonals_are_the_blocks_their_pairs_touch(queries, past, size, seed):
    grid, apart = grid_of(queries, past, size)
    kept = torch.rand(2, queries + past, generator=torch.Generator().manual_seed(seed)) < 0.2
    got = grid.diagonals(kept[None])[0]
    for head in range(2):
        # Blocks at the edge count as whole ones: a superset there, exact inside.
        named = torch.where(apart >= 0, kept[head][apart.clamp_min(0)], False)
        assert bool((got[head] | ~touched(named, size)).all())
        for i, j in (got[head] & ~touched(named, size)).nonzero().tolist():
            edge = (i + 1) * size > queries or (j + 1) * size > queries + past
            assert edge


@given(**CALLS)
@settings(max_examples=40, deadline=None)
def test_band_and_causal_blocks(queries, past, size, seed):
    grid, apart = grid_of(queries, past, size)
    assert torch.equal(grid.causal, touched(apart >= 0, size))
    recent = seed % 7 + 1
    assert torch.equal(grid.band(recent), touched((apart >= 0) & (apart < recent), size))


def test_padding_moves_the_head_and_hides_blocks():
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    grid = Grid(Layout(2, 8, 8, padding=padding), 2, 2)
    assert grid.begin.tolist() == [3, 0]
    assert grid.head(2)[:, 0, 3].int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert grid.seen[:, 0, 3].int().tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_diagonal_blocks_end_at_the_last_query():
    grid, _ = grid_of(5, 3, 2)
    assert grid.last.tolist() == [4, 6, 7]
    assert grid.diagonal_of(0).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert grid.diagonal_of(9).sum() == 0


def test_diagonals_need_square_blocks():
    with pytest.raises(AssertionError, match="square"):
        Grid(Layout(1, 4, 4), 2, 1).diagonals(torch.ones(1, 1, 4, dtype=torch.bool))
