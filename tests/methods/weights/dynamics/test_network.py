"""Networks of ReLUs, identities and zeros; trajectories; thinning."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.core import GossamerError, UnsupportedModel
from gossamer.methods.weights.dynamics.data import Trajectories, as_trajectories
from gossamer.methods.weights.dynamics.network import (
    IDENTITY,
    RELU,
    ZERO,
    SparseNet,
    chain,
    check_chain,
    gated,
)
from gossamer.methods.weights.dynamics.pushing import Pushing
from gossamer.methods.weights.dynamics.training import (
    Thinning,
    budget_at,
    discretise,
    fit,
    prediction_error,
    thin,
)


def net(kinds: list[list[int]], seed: int = 0, inputs: int = 3, outputs: int = 2) -> SparseNet:
    generator = torch.Generator().manual_seed(seed)
    sizes = [inputs, *(len(k) for k in kinds), outputs]
    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    return SparseNet(
        tuple(torch.randn(o, i, generator=generator) for o, i in pairs),
        tuple(torch.randn(o, generator=generator) for o, _ in pairs),
        tuple(torch.tensor(k, dtype=torch.int64) for k in kinds),
    )


def test_units_do_what_their_kind_says():
    one = SparseNet(
        (torch.eye(3), torch.ones(1, 3)),
        (torch.zeros(3), torch.zeros(1)),
        (torch.tensor([RELU, IDENTITY, ZERO]),),
    )
    assert one(torch.tensor([[-1.0, -10.0, -100.0], [1.0, 10.0, 100.0]])).tolist() == [[-10], [11]]
    assert [one.count(kind) for kind in (RELU, IDENTITY, ZERO)] == [1, 1, 1]
    assert repr(one) == "SparseNet(3-3-1: 1 ReLU, 1 identity, 1 zero)"
    gates = torch.eye(3)
    assert torch.equal(gated(torch.tensor([-2.0, -3.0, -4.0]), gates), torch.tensor([0.0, -3.0, 0]))


@given(
    kinds=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_without_dead_units_the_function_is_the_same(kinds: list[list[int]], seed: int):
    full = net(kinds, seed).to(torch.float64)
    small = full.compact()
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(small(x), full(x))
    assert small.count(ZERO) == 0
    assert small.units == full.units - full.count(ZERO)
    assert small.count(RELU) == full.count(RELU)


def test_a_perceptron_is_read_as_it_is():
    model = nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4), nn.ReLU()), nn.Linear(4, 2)
    )
    dense = SparseNet.dense(model)
    x = torch.randn(6, 3)
    check_chain(model, x)
    torch.testing.assert_close(dense(x), model(x).detach())
    assert dense.count(RELU) == dense.units == 9


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)),
        nn.Linear(3, 4),
    ],
)
def test_other_networks_are_refused(model: nn.Module):
    with pytest.raises(UnsupportedModel, match="is not a chain of Linear"):
        chain(model)


def test_a_chain_that_is_not_run_as_one_is_refused():
    with pytest.raises(UnsupportedModel, match="does not run its layers one after the other"):
        check_chain(Skipping(), torch.randn(4, 3))
    with pytest.raises(GossamerError, match="take 3 inputs; .* have 5 components"):
        check_chain(Skipping(), torch.randn(4, 5))


# ---- data and the world -------------------------------------------------------------------------


def test_trajectories_fit_together():
    states, actions = torch.zeros(4, 3, 2), torch.zeros(4, 2, 1)
    assert len(Trajectories(states, actions)) == 4
    assert isinstance(as_trajectories((states, actions)), Trajectories)
    single = Trajectories.from_transitions(torch.zeros(4, 2), torch.zeros(4, 1), torch.ones(4, 2))
    assert single.states.shape == (4, 2, 2)
    assert torch.equal(single.scale(), torch.ones(2))
    assert single.rows(torch.tensor([1, 2])).states.shape == (2, 2, 2)
    for bad in ((states[:, :2], actions), (states[0], actions), (states, actions[:3])):
        with pytest.raises(GossamerError, match="trajectories are states"):
            Trajectories(*bad)
    with pytest.raises(GossamerError, match="NaN or infinity"):
        Trajectories(states / 0, actions)
    for odd in (None, 3.5, [states, actions], (states,)):
        with pytest.raises(GossamerError, match="give Trajectories"):
            as_trajectories(odd)


def test_a_component_that_never_changes_has_scale_one():
    states = torch.zeros(2, 3, 2)
    states[:, :, 0] = torch.tensor([0.0, 3.0, -1.0])
    data = Trajectories(states, torch.zeros(2, 2, 1))
    assert data.scale().tolist() == pytest.approx([(25 / 2) ** 0.5, 1.0])


def test_the_puck_stays_until_a_side_touches_it():
    world = Pushing(gap=0.3, reach=0.2)
    state = torch.tensor([0.0, 0.0, 0.1, -0.25])
    free = world.step(state, torch.tensor([0.1, -0.02]))
    assert free.tolist() == pytest.approx([0.1, -0.02, 0.1, -0.25])
    pushed = world.step(state, torch.tensor([-0.9, 0.15]))
    assert pushed.tolist() == pytest.approx([-0.2, 0.15, 0.1, -0.15])
    again = world.step(pushed, torch.tensor([-0.2, 0.0]))
    assert again.tolist() == pytest.approx([-0.4, 0.15, -0.1, -0.15])


def test_four_relus_are_the_world():
    world = Pushing()
    data = world.sample(200, 3, seed=4)
    assert prediction_error(world.exact(), data) < 1e-5
    assert world.exact().count(RELU) == 4
    moved = data.states.diff(dim=1)[:, :, 2:] != 0
    assert 0.1 < float(moved.float().mean()) < 0.9
    off = SparseNet(world.exact().weights, world.exact().biases, (torch.ones(6).long(),))
    assert prediction_error(off, data) > 0.1


def test_the_error_of_a_model_of_nothing_is_one_a_step():
    data = Pushing().sample(300, 1)
    nothing = prediction_error(lambda x: torch.zeros(len(x), 4), data)
    assert nothing == pytest.approx(1.0)
    absolute = prediction_error(lambda x: x[:, :4], data, residual=False)
    assert absolute == pytest.approx(1.0)


# ---- thinning -----------------------------------------------------------------------------------


def test_the_budget_shrinks_and_then_stands_still():
    assert budget_at(0, 100, 40, 6) == 40
    assert budget_at(35, 100, 40, 6) == pytest.approx(23)
    assert budget_at(70, 100, 40, 6) == budget_at(99, 100, 40, 6) == 6
    assert budget_at(0, 1, 40, 6) == 40


def test_units_take_their_likeliest_kind_within_the_budget():
    chances = [
        torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.0, 0.1], [0.2, 0.5, 0.3]]),
        torch.tensor([[0.7, 0.1, 0.2], [0.1, 0.1, 0.8]]),
    ]
    base = net([[0] * 3, [0] * 2])
    kinds = [
        [k.tolist() for k in discretise(base, chances, relus).kinds] for relus in (0, 1, 2, 3, 9)
    ]
    assert kinds == [
        [[1, 2, 1], [2, 2]],
        [[1, 0, 1], [2, 2]],
        [[1, 0, 1], [0, 2]],
        [[0, 0, 1], [0, 2]],
        [[0, 0, 1], [0, 2]],
    ]


def test_thinning_finds_what_the_world_needs():
    """One wall: x' = min(x + u, 0), so a single ReLU of eight is enough, and none is not."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(400, 1, generator=generator) - 1
    x = x.minimum(torch.zeros(1))
    u = torch.rand(400, 1, generator=generator) - 0.5
    data = Trajectories.from_transitions(x, u, (x + u).minimum(torch.zeros(1)))
    torch.manual_seed(0)
    dense = SparseNet.dense(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)))
    errors = {}
    for relus in (0, 1):
        plan = Thinning(relus=relus, steps=300, finetune=400, lr=2e-2, batch_size=64)
        seen: list[str] = []
        trained, chances = thin(dense, data, plan, lambda a, b, what: seen.append(f"{a}/{b}"))  # noqa: B023
        made = fit(discretise(trained, chances, relus), data, plan)
        assert made.count(RELU) <= relus
        assert torch.cat(chances)[:, RELU].sum() < relus + 1.5
        assert (seen[0], seen[-1]) == ("1/700", "300/700")
        errors[relus] = prediction_error(made, data)
    assert errors[1] < 0.02
    assert errors[0] > 0.2


def test_fixed_kinds_stay_and_dead_units_do_not_train():
    data = Pushing().sample(50, 1)
    start = net([[RELU, ZERO, IDENTITY, RELU]], inputs=6, outputs=4)
    made = fit(start, data, Thinning(relus=2, steps=0, finetune=30, lr=1e-2, batch_size=20))
    assert torch.equal(made.kinds[0], start.kinds[0])
    assert torch.equal(made.weights[0][1], start.weights[0][1])
    assert not torch.equal(made.weights[0][0], start.weights[0][0])
    assert prediction_error(made, data) < prediction_error(start, data)


def test_divergence_is_an_error():
    data = Pushing().sample(50, 2)
    base = net([[0, 0]], inputs=6, outputs=4)
    huge = SparseNet(tuple(w * 1e30 for w in base.weights), base.biases, base.kinds)
    plan = Thinning(relus=1, steps=2, finetune=2)
    with pytest.raises(GossamerError, match="prediction error is .* lower the learning rate"):
        thin(huge, data, plan)
    with pytest.raises(GossamerError, match="prediction error is"):
        fit(huge, data, plan)
