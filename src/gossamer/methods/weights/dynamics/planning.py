"""Planning: what a controller minimises, how it is run, and planners that sample.

Shapes: S state and A action components, H steps ahead, K samples.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.core import GossamerError, check_count
from gossamer.methods.weights.dynamics.network import SparseNet

__all__ = ["MPPI", "Closed", "Controller", "Cost", "Plan", "RandomShooting", "closed_loop"]


@dataclass(frozen=True, eq=False)
class Cost:
    """Weighted absolute distances: sum over t of state · |x_t - goal| + action · |u_t|.

    Parameters
    ----------
    goal : (S,). state : (S,), at least 0. action : (A,), at least 0.

    Raises
    ------
    GossamerError
        If a weight is negative or the sizes differ.
    """

    goal: Tensor
    state: Tensor
    action: Tensor

    def __post_init__(self) -> None:
        fits = self.goal.shape == self.state.shape and self.goal.dim() == self.action.dim() == 1
        weights = torch.cat([self.state.flatten(), self.action.flatten()])
        if not fits or not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
            raise GossamerError(
                "a cost has a goal and weights of at least 0 for every state component, and "
                "weights of at least 0 for every action component"
            )

    def __call__(self, states: Tensor, actions: Tensor) -> Tensor:
        """(..., H, S) states after the actions (..., H, A) to (...,)."""
        far = (states - self.goal.to(states)).abs() @ self.state.to(states)
        return (far + actions.abs() @ self.action.to(actions)).sum(-1)


@dataclass(frozen=True)
class Plan:
    """A planner's answer.

    Parameters
    ----------
    actions : (H, A). cost : what the model predicts they cost. seconds : it took.
    optimal : whether no plan costs less under the model. bound : no plan costs less than this.
    binaries : of the mixed-integer program; 0 for planners that sample.
    """

    actions: Tensor
    cost: float
    seconds: float
    optimal: bool = False
    bound: float = 0.0
    binaries: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Controller(ABC):
    """Plans H steps ahead with a model, executes the first action, and plans anew.

    Parameters
    ----------
    net : the model, (S + A) -> S. cost : to minimise. horizon : H.
    low, high : (A,), bounds of the actions.
    residual : the model gives the change of the state.
    """

    net: SparseNet
    cost: Cost
    low: Tensor
    high: Tensor
    horizon: int = 5
    residual: bool = True

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon, 1)
        inputs, outputs = self.net.weights[0].shape[1], len(self.net.weights[-1])
        sizes = (len(self.cost.goal), len(self.cost.action))
        if sizes[0] != outputs or sum(sizes) != inputs:
            raise GossamerError(
                f"the model has {outputs} state and {inputs - outputs} action components; the cost "
                f"has {sizes[0]} and {sizes[1]}"
            )
        shape = self.cost.action.shape
        if (
            self.low.shape != shape
            or self.high.shape != shape
            or bool((self.low > self.high).any())
        ):
            raise GossamerError(f"action bounds are low <= high of shape {tuple(shape)}")

    @abstractmethod
    def plan(self, state: Tensor) -> Plan:
        """The actions to take from a state (S,)."""

    def act(self, state: Tensor) -> Tensor:
        """The first action of the plan, (A,)."""
        return self.plan(state).actions[0]

    @torch.no_grad()
    def predict(self, state: Tensor, actions: Tensor) -> Tensor:
        """(K, H, S) states that the model predicts from (S,) under actions (K, H, A)."""
        x, states = state.to(actions).expand(len(actions), -1), []
        for t in range(actions.shape[1]):
            out = self.net(torch.cat([x, actions[:, t]], 1))
            x = x + out if self.residual else out
            states.append(x)
        return torch.stack(states, 1)

    def _costs(self, state: Tensor, actions: Tensor) -> Tensor:
        return self.cost(self.predict(state, actions), actions)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        dtype = self.net.weights[0].dtype
        return self.low.to(dtype), self.high.to(dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomShooting(Controller):
    """The best of many action sequences drawn evenly from the allowed ones.

    Parameters
    ----------
    samples : K. seed : of the draws, which go on from call to call.
    """

    samples: int = 1000
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("samples", self.samples, 1)
        object.__setattr__(self, "_generator", torch.Generator().manual_seed(self.seed))

    def plan(self, state: Tensor) -> Plan:
        begin = time.perf_counter()
        low, high = self._bounds()
        shape = (self.samples, self.horizon, len(low))
        actions = low + (high - low) * torch.rand(shape, generator=self._generator, dtype=low.dtype)
        costs = self._costs(state, actions)
        best = int(costs.argmin())
        return Plan(actions[best], float(costs[best]), time.perf_counter() - begin)


@dataclass(frozen=True, kw_only=True, eq=False)
class MPPI(Controller):
    """Draws around a mean sequence and moves it to the cost-weighted average, a few times.

    Parameters
    ----------
    samples : K in all, shared by the rounds. rounds : times the mean moves.
    spread : standard deviation of the draws, as a share of the allowed range.
    temperature : of the weights exp(-cost / temperature), as a share of the costs' spread.
    seed : of the draws.

    Source: arXiv 1509.01149, without its dynamics noise.
    """

    samples: int = 1000
    rounds: int = 4
    spread: float = 0.3
    temperature: float = 0.1
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rounds", self.rounds, 1)
        check_count("samples", self.samples, self.rounds)
        if not self.spread > 0 or not self.temperature > 0:
            raise GossamerError(
                f"spread is {self.spread} and temperature {self.temperature}; both are above 0"
            )
        object.__setattr__(self, "_generator", torch.Generator().manual_seed(self.seed))

    def plan(self, state: Tensor) -> Plan:
        begin = time.perf_counter()
        low, high = self._bounds()
        mean = ((low + high) / 2).expand(self.horizon, -1)
        shape = (self.samples // self.rounds, *mean.shape)
        best, least = mean, float(self._costs(state, mean[None])[0])
        for _ in range(self.rounds):
            noise = torch.randn(shape, generator=self._generator, dtype=low.dtype)
            actions = (mean + self.spread * (high - low) * noise).clamp(low, high)
            costs = self._costs(state, actions)
            scale = self.temperature * costs.std().clamp_min(1e-9)
            weights = torch.softmax(-costs / scale, 0)
            mean = (weights[:, None, None] * actions).sum(0)
            if float(costs.min()) < least:
                best, least = actions[int(costs.argmin())], float(costs.min())
        if (last := float(self._costs(state, mean[None])[0])) < least:
            best, least = mean, last
        return Plan(best, least, time.perf_counter() - begin)


@dataclass(frozen=True)
class Closed:
    """A closed loop that was run.

    Parameters
    ----------
    states : (steps + 1, S). actions : (steps, A). cost : that the world charged.
    seconds : the planner took, step by step.
    """

    states: Tensor
    actions: Tensor
    cost: float
    seconds: tuple[float, ...]


@torch.no_grad()
def closed_loop(
    world: Callable[[Tensor, Tensor], Tensor], controller: Controller, state: Tensor, steps: int
) -> Closed:
    """Let a controller act in a world.

    Parameters
    ----------
    world : (state (S,), action (A,)) to the next state. state : to start from.
    """
    states, actions, seconds = [state], [], []
    for _ in range(steps):
        begin = time.perf_counter()
        action = controller.act(states[-1]).to(state)
        seconds.append(time.perf_counter() - begin)
        actions.append(action)
        states.append(world(states[-1], action))
    path, taken = torch.stack(states), torch.stack(actions)
    return Closed(path, taken, float(controller.cost(path[1:], taken)), tuple(seconds))
