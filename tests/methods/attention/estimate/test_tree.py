import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.methods.attention.estimate import tree_top_blocks


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(query, place, key, begin, keep, size):
    """One search in plain Python: (blocks, dot products of one query)."""
    low, high = begin // size, max(place) // size + 1
    keep = min(keep, high - low)
    stretches = [
        (low + i * (high - low) // keep, low + (i + 1) * (high - low) // keep) for i in range(keep)
    ]
    products = 0
    while max(b - a for a, b in stretches) > 1:
        halves = []
        for a, b in stretches:
            halves += [(a, (a + b) // 2), ((a + b) // 2, b)]
        scored = []
        for a, b in halves:
            if a == b:
                continue
            at = min((a + b) // 2 * size + size // 2, len(key) - 1)
            seen = [float(q @ key[at]) for q, p in zip(query, place, strict=True) if at <= p]
            scored.append((max(seen, default=-1e30), (a, b)))
        products += len(scored)
        scored.sort(key=lambda pair: -pair[0])
        stretches = [stretch for _, stretch in scored[:keep]]
    return sorted(a for a, b in stretches if b > a), products


@given(
    length=st.integers(1, 60),
    begin=st.integers(0, 20),
    keep=st.integers(1, 9),
    size=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_search_is_the_one_by_hand(length, begin, keep, size, seed):
    begin %= length
    key, query = randn(length, 8, seed=seed), randn(3, 2, 8, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(begin, length, (3, 2), generator=generator)
    found = tree_top_blocks(
        query[None, None], place, key[None, None], torch.tensor([begin]), keep, size
    )
    widest = max(int(p.max()) // size + 1 - begin // size for p in place)
    for row in range(3):
        # All rows stop together, so a row counts as many levels as the widest needs.
        blocks, products = by_hand(
            query[row], place[row].tolist(), key, begin, min(keep, widest), size
        )
        got = found.blocks[0, 0, row]
        assert got[got >= 0].tolist() == blocks
        assert int(found.products[row]) >= products
        levels = max(0, math.ceil(math.log2(-(-widest // min(keep, widest)))))
        assert int(found.products[row]) <= 2 * min(keep, widest) * levels


def test_heads_and_rows_search_for_themselves():
    key, query = randn(2, 3, 64, 8), randn(2, 3, 5, 1, 8, seed=1)
    place = torch.tensor([[10], [20], [40], [50], [63]])
    begin = torch.tensor([0, 3])
    found = tree_top_blocks(query, place, key, begin, 6)
    for b in range(2):
        for g in range(3):
            alone = tree_top_blocks(
                query[b : b + 1, g : g + 1], place, key[b : b + 1, g : g + 1], begin[b : b + 1], 6
            )
            assert torch.equal(found.blocks[b, g], alone.blocks[0, 0])


def test_a_budget_of_everything_finds_everything():
    key = randn(1, 1, 30, 4)
    found = tree_top_blocks(
        randn(1, 1, 1, 1, 4), torch.tensor([[29]]), key, torch.zeros(1).long(), 100, 2
    )
    assert found.blocks[0, 0, 0].tolist() == list(range(15))
    assert found.products.tolist() == [0]


def test_a_lone_key_is_missed_when_the_middle_of_its_stretch_is_not_it():
    key = torch.zeros(1, 1, 64, 2)
    key[..., 0] = torch.linspace(0, 0.1, 64)
    key[0, 0, 5, 0] = 10.0
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2)
    found = tree_top_blocks(query, torch.tensor([[63]]), key, torch.zeros(1).long(), 4)
    assert 5 not in found.blocks[0, 0, 0].tolist()


@pytest.mark.parametrize("limit", [64, 1 << 25])
def test_chunks_change_nothing(limit, monkeypatch):
    from gossamer.methods.attention.estimate import tree

    key, query = randn(1, 2, 40, 4), randn(1, 2, 9, 2, 4, seed=3)
    place = torch.arange(4, 40, 4).view(9, 1).repeat(1, 2)
    want = tree_top_blocks(query, place, key, torch.zeros(1).long(), 5)
    monkeypatch.setattr(tree, "_GATHERED", limit)
    got = tree_top_blocks(query, place, key, torch.zeros(1).long(), 5)
    kept = [set(b[b >= 0].tolist()) for b in got.blocks.flatten(0, 2)]
    assert kept == [set(b[b >= 0].tolist()) for b in want.blocks.flatten(0, 2)]
