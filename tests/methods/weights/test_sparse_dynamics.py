"""The method in place on a model: thinned, reported, undone, stored, and planned with."""

import pytest
import torch
from torch import nn

from gossamer import SparseDynamics
from gossamer.core import GossamerError, UnsupportedModel
from gossamer.methods.weights.dynamics.data import Trajectories
from gossamer.methods.weights.dynamics.mip import MixedInteger
from gossamer.methods.weights.dynamics.network import RELU
from gossamer.methods.weights.dynamics.planning import MPPI, Cost, RandomShooting
from gossamer.models import at_work
from tests.models.dynamics import broken, perceptron, predictions, pushes

QUICK = {"relus": 3, "steps": 60, "finetune": 60, "lr": 2e-2, "batch_size": 32}
COST = Cost(torch.zeros(4), torch.ones(4), torch.zeros(2))
REACH = torch.full((2,), 0.2)


def test_the_model_computes_the_thinned_network():
    model = perceptron()
    seen: list[tuple[int, int]] = []
    work = SparseDynamics(**QUICK).apply(
        model, pushes(), progress=lambda done, total, _: seen.append((done, total))
    )
    x = torch.randn(9, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), work.net(x))
        torch.testing.assert_close(model(x), work.thinned(x))
    assert work.net.count(RELU) <= 3
    assert work.errors["after"] < work.errors["before"]
    assert (seen[0], seen[-1]) == ((1, 120), (120, 120))
    report = work.report()
    assert report.simulated
    assert report.unit == "ReLU units"
    assert report.sparsity == pytest.approx(1 - work.thinned.count(RELU) / 16)
    assert [row.name for row in report.rows] == ["1", "3"]
    assert "16 hidden units" in str(report)
    assert "prediction error" in str(report)
    state = work.state()
    expected = predictions(model)
    work.restore()
    assert torch.equal(predictions(model), predictions(perceptron()))
    assert not any("forward" in vars(m) for m in model.modules())
    again = SparseDynamics(**QUICK).reattach(perceptron(), state.meta, state.tensors)
    assert torch.equal(predictions(again.model), expected)
    wider = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    with pytest.raises(GossamerError, match="the stored network is SparseNet"):
        SparseDynamics(**QUICK).reattach(wider, state.meta, state.tensors)
    assert not at_work(wider)


def test_data_as_plain_tensors_and_models_of_the_next_state():
    data = pushes()
    work = SparseDynamics(**QUICK, residual=False).apply(perceptron(), (data.states, data.actions))
    planner = work.controller(COST, -REACH, REACH, horizon=1)
    assert not planner.residual
    plan = planner.plan(data.states[0, 0])
    x = torch.cat([data.states[0, 0], plan.actions[0].float()])
    with torch.no_grad():
        cost = float(COST(work.model(x)[None], plan.actions.float()))
    assert cost == pytest.approx(plan.cost, abs=1e-4)


def test_planners_by_name():
    work = SparseDynamics(**QUICK).apply(perceptron(), pushes())
    kinds = {"mip": MixedInteger, "shooting": RandomShooting, "mppi": MPPI}
    for name, kind in kinds.items():
        made = work.controller(COST, -REACH, REACH, horizon=2, planner=name)
        assert type(made) is kind
        assert made.net is work.net
        assert made.act(pushes().states[0, 0]).shape == (2,)
    assert work.controller(COST, -REACH, REACH, planner="shooting", samples=7).samples == 7
    with pytest.raises(GossamerError, match="unknown planner 'best'"):
        work.controller(COST, -REACH, REACH, planner="best")


def test_an_interrupt_leaves_the_model_as_it_was():
    model = perceptron()

    def stop(done: int, *_: object) -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SparseDynamics(**QUICK).apply(model, pushes(), progress=stop)
    assert torch.equal(predictions(model), predictions(perceptron()))
    assert not at_work(model)


def test_torchs_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SparseDynamics(**QUICK).apply(perceptron(), pushes())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SparseDynamics(relus=-1), GossamerError, "relus is -1"),
        (lambda: SparseDynamics(steps=0), GossamerError, "steps is 0"),
        (lambda: SparseDynamics(lr=0.0), GossamerError, "lr is 0.0; give a positive number"),
        (lambda: SparseDynamics(penalty=-1.0), GossamerError, "penalty is -1.0"),
        (lambda: SparseDynamics().apply(perceptron()), GossamerError, "data are NoneType"),
        (lambda: SparseDynamics().apply(perceptron(), broken()), GossamerError, "take 6 inputs"),
        (
            lambda: SparseDynamics().apply(
                nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), pushes()
            ),
            GossamerError,
            "3 outputs; the data's states have 4",
        ),
        (
            lambda: SparseDynamics().apply(nn.Sequential(nn.Linear(6, 4), nn.GELU()), pushes()),
            UnsupportedModel,
            "not a chain",
        ),
        (
            lambda: SparseDynamics().apply(
                perceptron(), Trajectories(torch.zeros(2, 2, 4), torch.full((2, 1, 2), torch.inf))
            ),
            GossamerError,
            "NaN or infinity",
        ),
    ],
)
def test_what_cannot_be_thinned_is_said(make, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()


def test_weights_that_are_not_finite_are_refused():
    model = perceptron()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.inf
    with pytest.raises(GossamerError, match="NaN or infinity|does not run its layers"):
        SparseDynamics(**QUICK).apply(model, pushes())
