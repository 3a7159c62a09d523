import pytest
import torch

from gossamer.methods.attention.head_search import (
    Head,
    HeadSearch,
    Online,
    candidates,
    retrieval_prompt,
)
from gossamer.methods.attention.head_search.search import choose_head, densities_and_masses
from gossamer.methods.attention.layout import Layout
from tests.methods.attention.planted import planted, probabilities


def test_density_and_mass_are_those_of_the_mask():
    plant = planted(["columns+diagonals", "blocks"], 120, repeat=2)
    online = Online(plant.call, Layout(1, 120, 120), 8, 16, 2, 4)
    indexes = [online.of_all(head) for head in (Head("a_shape", 3, 20), Head("block_sparse", 4, 1))]
    density, mass = densities_and_masses(plant.call, indexes)
    weights = probabilities(plant).mean(1)
    for number, index in enumerate(indexes):
        mask = index.mask()[0].expand(2, -1, -1)
        pairs = mask.sum((1, 2)).double() / (120 * 121 / 2)
        torch.testing.assert_close(density[number], pairs)
        want = (weights * mask).sum(-1)[:, 10:].mean(-1)
        torch.testing.assert_close(mass[number], want, atol=1e-5, rtol=0)


def test_choice_prefers_mass_then_the_cheaper_kind_then_the_sparser():
    offered = [Head("block_sparse", 9, 1), Head("vertical_slash", 2, 2), Head("a_shape", 1, 9)]
    density = torch.tensor([0.1, 0.2, 0.3])
    assert choose_head(offered, density, torch.tensor([0.9, 0.8, 0.7])).kind == "block_sparse"
    best = choose_head(offered, density, torch.tensor([0.9, 0.895, 0.7]))
    assert best == Head("vertical_slash", 2, 2, 0.895)
    assert choose_head(offered, density, torch.tensor([0.9, 0.895, 0.894])).kind == "a_shape"
    within = choose_head(offered, density, torch.tensor([0.5, 0.8, 0.9]), limit=0.25)
    assert within.kind == "vertical_slash"
    # Nothing is sparse enough: the sparsest.
    assert choose_head(offered, density, torch.tensor([0.5, 0.8, 0.9]), 0.01) == Head(
        "block_sparse", 9, 1, 0.5
    )
    twice = [Head("a_shape", 1, 9), Head("a_shape", 1, 4)]
    assert choose_head(twice, torch.tensor([0.4, 0.2]), torch.tensor([0.9, 0.9])).second == 4


def test_search_labels_planted_heads():
    plant = planted(["sink+band", "columns+diagonals", "blocks", "band"], 1024, repeat=2, seed=1)
    told = []
    search = HeadSearch(
        candidates(0.7, 1024, 16), 0.3, 16, 64, 4, 16, 1, lambda *step: told.append(step)
    )
    layout = Layout(1, 1024, 1024)
    assert search.select(plant.call, layout, 0).whole
    kinds = [head.kind for head in search.found[0]]
    assert kinds == ["a_shape", "vertical_slash", "block_sparse", "a_shape"]
    assert told == [(1, 1, "patterns of layer 0")]


def test_the_paper_s_candidates_and_scaled_ones():
    assert Head("vertical_slash", 3500, 100) in candidates(None, 30_000, 64)
    offered = candidates(0.75, 2048, 16)
    assert len(set(offered)) == len(offered)
    assert {head.kind for head in offered} == {"a_shape", "vertical_slash", "block_sparse"}
    assert all(head.first >= 1 and head.second >= 1 for head in candidates(0.99, 32, 16))


@pytest.mark.parametrize("length", [1, 7, 64, 300])
def test_retrieval_prompts_ask_what_they_hold(length):
    tokens = retrieval_prompt(100, length)
    assert tokens.input_ids.shape == (1, length)
    assert int(tokens.input_ids.min()) >= 3
    assert int(tokens.input_ids.max()) < 100
    assert torch.equal(tokens.input_ids, retrieval_prompt(100, length).input_ids)
    if length == 300:
        groups = [tuple(g) for g in tokens.input_ids[0].view(-1, 4).tolist()]
        facts = set(groups[:57])
        assert all(group in facts for group in groups[57:])
