"""Scores of tokens and how many can rest, against loops."""

import torch

from gossamer.methods.attention.token_choice.coverage import spared, token_scores


def test_scores_are_a_moving_average_that_sums_to_one():
    weights = torch.tensor([[[0.0, 0.3, 0.0, 0.0, 0.6, 9.0]]])
    real = torch.tensor([[True, True, True, True, True, False]])
    got = token_scores(weights, 3, real)
    want = torch.tensor([0.3, 0.3, 0.3, 0.6, 0.6, 0.0])
    torch.testing.assert_close(got[0, 0], want / want.sum())


def test_padding_neither_gives_nor_takes():
    weights = torch.rand(1, 2, 10, generator=torch.Generator().manual_seed(0))
    plain = token_scores(weights, 5, torch.ones(1, 10, dtype=torch.bool))
    wider = torch.nn.functional.pad(weights, (4, 0), value=7.0)
    real = torch.nn.functional.pad(torch.ones(1, 10, dtype=torch.bool), (4, 0))
    torch.testing.assert_close(token_scores(wider, 5, real)[..., 4:], plain)


def test_no_attention_gives_no_score():
    got = token_scores(torch.zeros(1, 1, 4), 3, torch.ones(1, 4, dtype=torch.bool))
    assert not got.any()


def test_the_count_loses_less_than_the_coverage():
    score = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(1))
    real = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) > 0.2
    score = score * real[:, None]
    score = score / score.sum(-1, keepdim=True)
    found = spared(score, real, 0.3)
    for row in range(3):
        mean = sorted(score[row].mean(0)[real[row]].tolist())
        count = int(found[row])
        assert sum(mean[:count]) < 0.3 <= sum(mean[: count + 1])


def test_no_coverage_spares_nothing():
    assert spared(torch.zeros(1, 1, 4), torch.ones(1, 4, dtype=torch.bool), 0.0).tolist() == [0]
