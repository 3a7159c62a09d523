"""Both searches against sorting, and what the hierarchical one must always look at."""

import pytest
import torch

from gossamer.methods.attention.indexer.module import index_scores
from gossamer.methods.attention.indexer.search import Keys, flat_search, hierarchical_search

LENGTH, QUERIES, HEADS, WIDTH = 50, 6, 3, 8


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, QUERIES, HEADS, WIDTH, generator=generator)
    weight = torch.rand(2, QUERIES, HEADS, generator=generator)
    key = torch.randn(2, LENGTH, WIDTH, generator=generator)
    return query, weight, key


AT = torch.tensor([[0, 3, 7, 20, 41, 49]])


def sees(place):
    return place <= AT[..., None]


def chosen(found):
    return [
        [set(place[kept].tolist()) for place, kept in zip(places, keeps, strict=True)]
        for places, keeps in zip(found.place, found.kept, strict=True)
    ]


def test_a_flat_search_is_the_best_of_what_is_seen():
    query, weight, key = drawn()
    found = flat_search(query, weight, Keys(key), sees, 5)
    score = index_scores(query, weight, key)
    for row in range(2):
        for q, at in enumerate(AT[0].tolist()):
            best = score[row, q, : at + 1].argsort(descending=True, stable=True)[:5]
            assert chosen(found)[row][q] == set(best.tolist())
    assert found.scored == LENGTH


def hierarchical(query, weight, key, *, blocks, block=4, keep=5, real=None):
    keys = Keys(key, real)
    return hierarchical_search(
        query, weight, keys, keys.means(block), AT, sees, keep, block=block, blocks=blocks
    )


def test_with_every_block_it_is_the_flat_search():
    query, weight, key = drawn()
    found = hierarchical(query, weight, key, blocks=13)
    assert chosen(found) == chosen(flat_search(query, weight, Keys(key), sees, 5))


@pytest.mark.parametrize("seed", range(3))
def test_keys_come_from_the_best_blocks_the_first_and_the_own(seed):
    query, weight, key = drawn(seed)
    found = hierarchical(query, weight, key, blocks=4, keep=16)
    means = torch.stack([key[:, i : i + 4].mean(1) for i in range(0, LENGTH, 4)], dim=1)
    score = index_scores(query, weight, means)
    for row in range(2):
        for q, at in enumerate(AT[0].tolist()):
            own = at // 4
            others = [b for b in score[row, q].argsort(descending=True).tolist() if 0 < b < own]
            blocks = {0, own, *others[: 4 - len({0, own})]}
            want = {k for b in blocks for k in range(4 * b, min(4 * b + 4, LENGTH)) if k <= at}
            assert chosen(found)[row][q] == want
    assert found.scored == 13 + 16


def test_places_ascend_and_nothing_is_chosen_twice():
    query, weight, key = drawn()
    found = hierarchical(query, weight, key, blocks=4)
    for row in range(2):
        for place, kept in zip(found.place[row], found.kept[row], strict=True):
            listed = place[kept].tolist()
            assert listed == sorted(set(listed))


def test_later_keys_do_not_move_the_choice():
    query, weight, key = drawn()
    before = chosen(hierarchical(query, weight, key, blocks=3))
    changed = key.clone()
    changed[:, 42:] = 5.0
    after = chosen(hierarchical(query, weight, changed, blocks=3))
    for row in range(2):
        assert before[row][:5] == after[row][:5]


def test_a_short_last_block_and_padding_do_not_count_in_means():
    _, _, key = drawn()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :2] = False
    means = Keys(key, real).means(4)
    torch.testing.assert_close(means[0, 0], key[0, 2:4].mean(0))
    torch.testing.assert_close(means[1, -1], key[1, 48:].mean(0))
