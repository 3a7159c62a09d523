"""SSVI on a small classifier."""

import pytest
import torch
from torch import Tensor, nn

from gossamer import SSVI
from gossamer.core import GossamerError
from gossamer.methods.training.bayesian.training import Plan, weights_of
from tests.models.classes import classifier, labelled

QUICK = {"steps": 12, "every": 3, "batch_size": 16}
LEARN = {"steps": 250, "every": 25, "batch_size": 32, "prior": 0.1, "sparsity": 0.5}


def test_it_learns_and_knows_what_it_does_not_know():
    x, y = labelled(400)
    with SSVI(**LEARN).apply(classifier(), (x[:300], y[:300])) as work:
        found = work.quality(x[300:], y[300:])
    assert found["accuracy"] > 0.8
    assert found["nll"] < 0.6
    assert 0 <= found["ece"] < 0.2


def test_active_weights_only():
    model = classifier()
    with SSVI(**QUICK, sparsity=0.75).apply(model, labelled()) as work:
        for name, posterior in work.trained.posteriors.items():
            weight = model.get_parameter(name).detach()
            assert len(posterior) == round(0.25 * weight.numel())
            assert torch.equal(posterior.dense(posterior.mu), weight)
        assert set(work.trained.others) == {"0.bias", "2.bias"}
        assert "active weights" in work.report().notes[0]


def test_places_change_only_where_the_schedule_says():
    def places(**values: object) -> Tensor:
        method = SSVI(**{**QUICK, "sparsity": 0.7, **values})
        return method.apply(classifier(), labelled()).trained.posteriors["0.weight"].places

    start = places(exchange=0.0)
    assert torch.equal(start, places(every=100))
    assert torch.equal(start, places(until=0.0))
    moved = places()
    assert not torch.equal(start, moved)


def test_share_of_an_exchange():
    plan = Plan(
        sparsity=0.9, steps=100, batch_size=1, lr=1, sigma_lr=1, decay=0, prior=1, kl=1,
        every=10, until=0.8, exchange=0.3, criterion="abs_snr",
    )  # fmt: skip
    assert plan.share(0) == plan.share(5) == plan.share(80) == plan.share(90) == 0
    assert plan.share(40) == pytest.approx(0.15)
    assert plan.share(10) > plan.share(20) > plan.share(70) > 0


def test_predictions():
    x, _ = labelled()
    model = classifier()
    with SSVI(**QUICK).apply(model, labelled()) as work:
        mean = work.predict(x, samples=0)
        with torch.no_grad():
            assert torch.allclose(mean, model(x).softmax(-1))
        drawn = work.predict(x, samples=8)
        assert torch.allclose(drawn.sum(1), torch.ones(len(x)))
        assert not torch.equal(drawn, mean)
        assert torch.equal(drawn, work.predict(x, samples=8))
        assert not torch.equal(drawn, work.predict(x, samples=8, seed=1))
        # Wide posteriors blur what one network says sharply.
        for posterior in work.trained.posteriors.values():
            posterior.rho = torch.full_like(posterior.rho, 3.0)
        assert work.predict(x, samples=64).max(1).values.mean() < 0.9


def test_a_strong_prior_draws_deviations_to_it():
    method = SSVI(
        steps=400, batch_size=32, prior=0.05, kl=1e4, lr=1e-4, sigma_lr=1e-4, sparsity=0.5
    )
    work = method.apply(classifier(), labelled(300))
    sigma = torch.cat([p.sigma() for p in work.trained.posteriors.values()])
    assert sigma.median() > 0.01
    assert sigma.max() < 0.08


def test_unusable_data_are_refused():
    x, y = labelled()
    method, model = SSVI(**QUICK), classifier()
    for data, says in [
        (x, "pair of tensors"),
        ((x, y[:-1]), "labels whole numbers"),
        ((x, y.float()), "labels whole numbers"),
        ((x, y + 5), "labels go from"),
        ((x * float("nan"), y), "NaN or infinity"),
    ]:
        with pytest.raises(GossamerError, match=says):
            method.apply(model, data)
    with pytest.raises(GossamerError, match="no linear layers"):
        weights_of(nn.ReLU())
    with pytest.raises(GossamerError, match="diverged"):
        SSVI(**{**QUICK, "steps": 60}, lr=1e12).apply(model, (x, y))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"prior": -1.0},
        {"kl": -0.1},
        {"until": 1.5},
        {"exchange": float("nan")},
        {"criterion": "largest"},
    ],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(GossamerError, match=next(iter(wrong))):
        SSVI(**wrong)


def test_another_model_is_refused():
    state = SSVI(**QUICK).apply(classifier(), labelled()).state()
    with pytest.raises(GossamerError, match="the posterior is over"):
        SSVI(**QUICK).reattach(nn.Sequential(nn.Linear(6, 3)), state.meta, state.tensors)
