"""PST's own parameters: its schedule, its patterns, what its scores learn."""

import pytest
import torch
from torch import nn

from gossamer.core import NM, GossamerError
from gossamer.methods.tuning.masked.linear import Scales, Scores, masked_linear, scores
from gossamer.methods.tuning.pst import PST
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def test_the_schedule_is_cubic_between_two_warm_ups():
    schedule = PST(sparsity=0.8, steps=100).schedule()
    found = [schedule.at(t).sparsity for t in (0, 10, 25, 40, 70, 100)]
    assert found == pytest.approx(
        [0, 0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8, 0.8], abs=1e-12
    )


def test_what_is_left_open_has_a_value():
    assert PST().sparsity == 0.8
    assert PST(pattern="2:4").sparsity == 0.5
    assert PST(head="classifier, score").head == ("classifier", "score")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "model"}, "pst takes no pattern model"),
        ({"pattern": "block:4x4"}, "pst takes no pattern block:4x4"),
        ({"pattern": "2:4", "sparsity": 0.8}, "fixes the sparsity at 0.5; got 0.8"),
        ({"rank": 0}, "rank is 0"),
        ({"score_rank": 0}, "score_rank is 0"),
        ({"every": 0}, "every is 0"),
        ({"alpha1": float("nan")}, "alpha1 is nan"),
        ({"beta": 0.0}, "beta is 0"),
        ({"initial_warmup": -0.1}, "initial_warmup is -0.1"),
        ({"initial_warmup": 0.6, "final_warmup": 0.5}, "leave none of 1000 updates"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0"),
    ],
)
def test_impossible_values_are_named(given, message):
    with pytest.raises(GossamerError, match=message):
        PST(**given)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_trainings_end_at_the_full_sparsity(steps):
    work = PST(steps=steps, batch_size=2, lr=1e-2).apply(tiny_model("llama"), random_tokens())
    assert work.report().sparsity == pytest.approx(0.8, abs=1e-3)
    assert not work.report().warnings


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "row"])
def test_patterns_hold_in_the_folded_weights(pattern):
    model = tiny_model("llama")
    method = PST(pattern=pattern, steps=6, batch_size=2, lr=1e-2)
    work = method.apply(model, random_tokens())
    for site in work.sites.values():
        kept = site.weight(model) != 0
        if isinstance(method.pattern, NM):
            assert (kept.view(-1, method.pattern.of).sum(1) == method.pattern.keep).all()
        else:
            assert (kept.sum(1) == round(0.2 * site.shape[1])).all()


def test_a_sparsity_that_would_empty_a_row_is_floored_and_said():
    work = PST(pattern="row", sparsity=0.99, steps=3, batch_size=2).apply(
        tiny_model("llama"), random_tokens()
    )
    assert all(
        work.selection(n).kept == s.shape[0] for n, s in work.sites.items() if s.shape[1] < 50
    )
    assert "would be emptied; each group keeps 1" in str(work.report())


def test_scores_find_the_small_weight_that_the_task_needs():
    # The target reads the input whose weight is smallest. Magnitude would remove that weight.
    torch.manual_seed(0)
    weight = torch.tensor([[0.5, -0.4, 0.05]])
    u, v = torch.ones(1, 1), torch.zeros(1, 3)
    column = nn.Parameter(torch.zeros(3))
    row = nn.Parameter(torch.zeros(1))
    parts, scales = Scores(row=row, column=column), Scales()
    optimizer = torch.optim.SGD([column, row], lr=0.05)
    x = torch.randn(256, 3)
    mask = torch.tensor([[True, False, False]])
    for _ in range(200):
        y = masked_linear(x, weight, None, mask, u, v, parts, scales)
        ((y - 5 * 0.05 * x[:, 2:]) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            score = scores(weight, u, v, parts, scales)
        mask = score == score.max()
    assert mask.tolist() == [[False, False, True]]


def test_learned_masks_are_not_those_of_magnitude():
    masks = []
    for alpha in (1.0, 0.0):
        model = tiny_model("llama")
        method = PST(steps=10, batch_size=2, lr=1e-2, alpha1=alpha, alpha2=alpha, sparsity=0.5)
        work = method.apply(model, random_tokens())
        masks.append(torch.cat([work.selection(n).mask().flatten() for n in work.sites]))
    differ = (masks[0] != masks[1]).float().mean()
    assert 0.02 < differ < 0.6
