"""Planners: the solver's plan is the optimum, bounds are right, and the loop replans."""

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.weights.dynamics import mip
from gossamer.methods.weights.dynamics.mip import MixedInteger, Program, certify
from gossamer.methods.weights.dynamics.network import SparseNet
from gossamer.methods.weights.dynamics.planning import (
    MPPI,
    Controller,
    Cost,
    RandomShooting,
    closed_loop,
)
from gossamer.methods.weights.dynamics.pushing import Pushing

WORLD = Pushing()
REACH = torch.full((2,), WORLD.reach)
COST = Cost(
    torch.tensor([0.0, 0.0, 0.5, -0.4]), torch.tensor([0.0, 0.1, 1.0, 1.0]), torch.full((2,), 0.02)
)
SETTING = {"net": WORLD.exact(), "cost": COST, "low": -REACH, "high": REACH}
START = torch.tensor([0.3, 0.1, 0.1, 0.2])


def random_net(kinds: list[list[int]], seed: int, inputs: int = 6, outputs: int = 4) -> SparseNet:
    generator = torch.Generator().manual_seed(seed)
    sizes = [inputs, *map(len, kinds), outputs]
    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    return SparseNet(
        tuple(torch.randn(o, i, generator=generator) / i**0.5 for o, i in pairs),
        tuple(0.3 * torch.randn(o, generator=generator) for o, _ in pairs),
        tuple(map(torch.tensor, kinds)),
    )


def predicted(controller: Controller, state: Tensor, actions: Tensor) -> float:
    """What actions cost when the network is run on them in float64."""
    wide = RandomShooting(
        net=controller.net.to(torch.float64),
        cost=controller.cost,
        low=controller.low,
        high=controller.high,
        horizon=controller.horizon,
        residual=controller.residual,
    )
    states = wide.predict(state.double(), actions[None].double())
    return float(wide.cost(states, actions[None].double())[0])


def test_a_cost_by_hand():
    cost = Cost(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), torch.tensor([0.5]))
    states = torch.tensor([[[0.0, 9.0], [3.0, 9.0]]])
    actions = torch.tensor([[[-2.0], [1.0]]])
    assert cost(states, actions).tolist() == [2 * (1 + 2) + 0.5 * 3]


# ---- the mixed-integer program ------------------------------------------------------------------


def test_absolute_values_and_a_wall_by_hand():
    """x' = x + u - relu(x + u): a wall at 0 and the goal behind it; the best is to stop there."""
    wall = SparseNet(
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[-1.0, 1.0]])),
        (torch.zeros(2), torch.zeros(1)),
        (torch.tensor([0, 1]),),
    )
    cost = Cost(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([0.1]))
    planner = MixedInteger(
        net=wall, cost=cost, low=torch.tensor([-1.0]), high=torch.tensor([0.4]), horizon=2
    )
    plan = planner.plan(torch.tensor([-0.6]))
    assert plan.actions.flatten().tolist() == pytest.approx([0.4, 0.2], abs=1e-6)
    assert plan.cost == pytest.approx(0.7 + 0.5 + 0.1 * 0.6)
    assert plan.optimal
    assert plan.bound == pytest.approx(plan.cost)
    assert plan.binaries == 1  # at the first step the wall is out of reach


@pytest.mark.parametrize("tighten", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_the_plan_is_the_best_of_all_patterns(tighten: bool, residual: bool):
    for seed in range(3):
        net = random_net([[0, 1, 0, 2], [2, 0, 1, 0]], seed)
        setting = {**SETTING, "net": net, "horizon": 2, "residual": residual}
        planner = MixedInteger(**setting, tighten=tighten)
        plan = planner.plan(START)
        best, programs = certify(planner, START)
        assert programs >= 16 + 16
        assert plan.cost == pytest.approx(best, abs=1e-6)
        assert predicted(planner, START, plan.actions) == pytest.approx(plan.cost, abs=1e-5)
        assert bool((plan.actions.abs() <= REACH.double() + 1e-9).all())


def test_no_plan_on_a_grid_of_actions_is_better():
    planner = MixedInteger(**SETTING, horizon=2)
    plan = planner.plan(START)
    line = torch.linspace(-WORLD.reach, WORLD.reach, 13)
    grid = torch.cartesian_prod(line, line, line, line).view(-1, 2, 2)
    costs = COST(planner.predict(START, grid), grid)
    assert plan.cost <= float(costs.min()) + 1e-6
    assert float(costs.min()) < plan.cost + 0.1


def test_a_wrong_bound_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    """Bounds a third too narrow cut plans off, and the certificate says so."""
    plain = Program.interval
    monkeypatch.setattr(
        Program, "interval", lambda self, value: tuple(0.3 * b for b in plain(self, value))
    )
    planner = MixedInteger(**SETTING, horizon=2, tighten=False)
    wrong = planner.program(START)[0].solve()[1]
    monkeypatch.undo()
    assert abs(wrong - certify(planner, START)[0]) > 1e-3


def test_intervals_hold_all_values_and_tighter_ones_hold_those_of_the_program():
    generator = np.random.default_rng(0)
    program = Program(4)
    x = program.new([-1.0, 0.0], [2.0, 1.0])
    y = x.after(np.array([[1.0, -2.0]]), np.array([0.5]))
    low, high = program.interval(y)
    assert (low[0], high[0]) == (-2.5, 2.5)
    draws = generator.uniform([-1, 0], [2, 1], (1000, 2))
    values = draws @ np.array([1.0, -2.0]) + 0.5
    assert bool(((values >= low) & (values <= high)).all())
    # x0 <= x1 - 0.5 leaves y = x0 - 2 x1 + 0.5 at most -x1.
    program.at_most_zero(x.after(np.array([[1.0, -1.0]]), np.array([0.5])))
    tight = program.tightest(y, float(low[0]), float(high[0]))
    assert tight == pytest.approx((-2.5, 0.0), abs=1e-6)


def test_tighter_bounds_need_no_more_binaries():
    net = random_net([[0] * 5, [0] * 5], 3)
    binaries = [
        int(
            MixedInteger(**{**SETTING, "net": net}, horizon=3, tighten=tighten)
            .program(START)[0]
            .binary.sum()
        )
        for tighten in (True, False)
    ]
    assert binaries[0] <= binaries[1] <= 30
    assert binaries[1] >= 8


def test_a_network_without_relus_is_a_linear_program():
    net = random_net([[1, 2, 1]], 1)
    plan = MixedInteger(**{**SETTING, "net": net}, horizon=3).plan(START)
    assert plan.binaries == 0
    assert plan.optimal
    assert predicted(
        MixedInteger(**{**SETTING, "net": net}, horizon=3), START, plan.actions
    ) == pytest.approx(plan.cost, abs=1e-5)


def test_units_that_are_all_dead_leave_the_constant():
    net = random_net([[2, 2]], 1)
    plan = MixedInteger(**{**SETTING, "net": net}, horizon=1).plan(START)
    after = START + net.biases[-1]
    assert plan.cost == pytest.approx(float(COST(after[None], torch.zeros(1, 2))), abs=1e-5)


def test_a_limit_that_leaves_no_time_is_an_error():
    net = random_net([[0] * 12, [0] * 12], 0)
    planner = MixedInteger(**{**SETTING, "net": net}, horizon=4, tighten=False, seconds=1e-9)
    with pytest.raises(GossamerError, match="no plan was found .* allow more than"):
        planner.plan(START)


# ---- sampling, and the loop ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RandomShooting, MPPI])
def test_sampled_plans_stay_in_bounds_cost_what_they_say_and_repeat(kind: type[Controller]):
    plans = [kind(**SETTING, horizon=3, seed=4).plan(START) for _ in range(2)]
    assert torch.equal(plans[0].actions, plans[1].actions)
    assert bool((plans[0].actions.abs() <= WORLD.reach).all())
    exact = MixedInteger(**SETTING, horizon=3)
    assert predicted(exact, START, plans[0].actions) == pytest.approx(plans[0].cost, abs=1e-4)
    assert exact.plan(START).cost <= plans[0].cost + 1e-6
    still = predicted(exact, START, torch.zeros(3, 2))
    assert plans[0].cost < still
    other = kind(**SETTING, horizon=3, seed=5).plan(START)
    assert not torch.equal(other.actions, plans[0].actions)


def test_more_samples_are_no_worse_on_average():
    few, many = (
        sum(
            RandomShooting(**SETTING, horizon=3, samples=samples, seed=seed).plan(START).cost
            for seed in range(10)
        )
        for samples in (10, 1000)
    )
    assert many < few


def test_a_controller_replans_from_where_the_world_went():
    """A kick moves the puck once; only a loop that looks again brings it to its goal."""
    kicks = iter([torch.tensor([0.0, 0.0, 0.0, 0.25]) * (t == 4) for t in range(100)])

    def world(state: Tensor, action: Tensor) -> Tensor:
        return WORLD.step(state, action) + next(kicks)

    planner = MixedInteger(**SETTING, horizon=2, tighten=False)
    run = closed_loop(world, planner, START, 12)
    assert run.states.shape == (13, 4)
    assert len(run.seconds) == 12
    assert float((run.states[5, 2:] - COST.goal[2:]).abs().max()) > 0.2
    assert float((run.states[-1, 2:] - COST.goal[2:]).abs().max()) < 0.05
    assert run.cost == pytest.approx(float(COST(run.states[1:], run.actions)))
    for t in (0, 3, 5, 11):
        assert torch.equal(WORLD.step(run.states[t], run.actions[t]), run.states[t + 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cost(torch.zeros(2), torch.ones(3), torch.ones(1)), "goal and weights"),
        (lambda: Cost(torch.zeros(2), -torch.ones(2), torch.ones(1)), "at least 0"),
        (lambda: MixedInteger(**SETTING, horizon=0), "horizon is 0"),
        (lambda: MixedInteger(**{**SETTING, "low": REACH[:1]}), "action bounds"),
        (lambda: MixedInteger(**{**SETTING, "low": 2 * REACH}), "action bounds"),
        (
            lambda: RandomShooting(
                **{**SETTING, "cost": Cost(torch.zeros(3), torch.ones(3), torch.ones(3))}
            ),
            "4 state and 2 action components; the cost has 3 and 3",
        ),
        (lambda: RandomShooting(**SETTING, samples=0), "samples is 0"),
        (lambda: MPPI(**SETTING, spread=0.0), "spread is 0"),
        (lambda: MixedInteger(**SETTING).plan(torch.zeros(3)), "4 finite components"),
        (lambda: MixedInteger(**SETTING).plan(START * torch.nan), "4 finite components"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message: str):
    with pytest.raises(GossamerError, match=message):
        make()


def test_what_the_solver_prints_stays_out_of_standard_output(capfd: pytest.CaptureFixture):
    libc = ctypes.CDLL(None)
    with mip._stdout_clean():
        libc.puts(b"debugging")
    libc.puts(b"afterwards")
    libc.fflush(None)
    captured = capfd.readouterr()
    assert captured.out == "afterwards\n"
    assert "debugging" in captured.err
