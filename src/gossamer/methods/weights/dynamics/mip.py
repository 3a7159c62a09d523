"""The mixed-integer controller: the best plan under a network of few ReLUs, proven.

Every ReLU z = max(0, a) of every step becomes z >= a, z >= 0, z <= a - l (1 - d), z <= u d with
a binary d and bounds l < 0 < u of a; identities are linear, ReLUs whose bounds do not straddle
zero need no binary, absolute values two inequalities each. HiGHS solves it by branch and bound.

Source: arXiv 2312.12791, §3.3. Shapes: S state and A action components, H steps, V variables.
"""

import ctypes
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.weights.dynamics.network import RELU
from gossamer.methods.weights.dynamics.planning import Controller, Plan

__all__ = ["MixedInteger", "Program", "certify"]

Array = np.ndarray

_NEGLIGIBLE = 1e-6


@contextmanager
def _stdout_clean() -> Iterator[None]:
    """Send what the solver prints to standard error.

    Releases of HiGHS print a line of debugging to standard output, past Python, whenever they
    repair a solution; it would end up in whatever reads a program's output.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError):  # closed: nothing to keep clean
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # the line waits in the C library's own buffer
        os.dup2(kept, 1)
        os.close(kept)


@dataclass(frozen=True)
class Affine:
    """Expressions rows @ variables + const: (k, V) and (k,)."""

    rows: Array
    const: Array

    def __add__(self, other: "Affine") -> "Affine":
        return Affine(self.rows + other.rows, self.const + other.const)

    def after(self, weight: Array, bias: Array) -> "Affine":
        """weight @ self + bias."""
        return Affine(weight @ self.rows, weight @ self.const + bias)


class Program:
    """A linear program with some binaries, grown variable by variable.

    Parameters
    ----------
    size : V, the most variables there may be.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.low, self.high = np.zeros(size), np.zeros(size)
        self.cost, self.binary = np.zeros(size), np.zeros(size)
        self.rows: list[Array] = []
        self.limits: list[tuple[float, float]] = []

    def new(self, low: Sequence[float] | Array, high: Sequence[float] | Array) -> Affine:
        """Variables between bounds, as expressions."""
        count = len(low)
        at = slice(self.used, self.used + count)
        self.used += count
        assert self.used <= self.size
        self.low[at], self.high[at] = low, high
        rows = np.zeros((count, self.size))
        rows[np.arange(count), np.arange(at.start, at.stop)] = 1.0
        return Affine(rows, np.zeros(count))

    def at_most_zero(self, left: Affine) -> None:
        """Demand of every expression that it is not positive."""
        self.rows += list(left.rows)
        self.limits += [(-np.inf, -c) for c in left.const]

    def zero(self, value: Affine) -> None:
        """Demand of every expression that it is zero."""
        self.rows += list(value.rows)
        self.limits += [(-c, -c) for c in value.const]

    def interval(self, value: Affine) -> tuple[Array, Array]:
        """Bounds of expressions from the bounds of their variables."""
        up, down = np.maximum(value.rows, 0), np.minimum(value.rows, 0)
        low = value.const + up @ self.low + down @ self.high
        return low, value.const + up @ self.high + down @ self.low

    def solve(
        self, cost: Array | None = None, whole: bool = True, seconds: float | None = None
    ) -> tuple[Array | None, float, float, bool]:
        """Minimise: the solution (or None), its cost, a lower bound, and whether it is optimal.

        Parameters
        ----------
        cost : (V,), the program's own when left out. whole : keep binaries whole; False relaxes.
        """
        matrix = csr_array(np.array(self.rows)) if self.rows else csr_array((0, self.size))
        sides: Any = np.array(self.limits, dtype=float).reshape(-1, 2).T
        limits = LinearConstraint(matrix, sides[0], sides[1]) if self.rows else None
        with _stdout_clean():
            result = milp(
                self.cost if cost is None else cost,
                integrality=self.binary if whole else None,
                bounds=Bounds(cast(Any, self.low), cast(Any, self.high)),
                constraints=limits,
                options={"mip_rel_gap": 1e-7}
                | ({} if seconds is None else {"time_limit": seconds}),
            )
        if result.x is None:
            return None, np.inf, np.inf if result.status == 2 else -np.inf, False
        bound = getattr(result, "mip_dual_bound", None)
        return result.x, result.fun, result.fun if bound is None else bound, result.status == 0

    def tightest(self, value: Affine, low: float, high: float) -> tuple[float, float]:
        """Bounds of one expression over the relaxed program, no wider than those given."""
        for sign in (1.0, -1.0):
            _, best, _, good = self.solve(sign * value.rows[0], whole=False)
            if good:
                # A little slack, so that rounding in the solver cannot cut off the optimum.
                edge = sign * best + value.const[0] - sign * 1e-7
                low, high = (max(low, edge), high) if sign > 0 else (low, min(high, edge))
        return low, high


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedInteger(Controller):
    """Plans by mixed-integer programming; the plan is optimal under the model.

    Parameters
    ----------
    tighten : take each ReLU's bounds from two linear programs, not from intervals alone. For some
        twenty binaries intervals are enough and the whole plan takes half as long without.
    seconds : limit of a solve; the best plan found by then is taken. None: no limit.
    """

    tighten: bool = True
    seconds: float | None = None

    def plan(self, state: Tensor) -> Plan:
        """The best actions from a state (S,).

        Raises
        ------
        GossamerError
            If the state is unusable or no plan was found within the time limit.
        """
        begin = time.perf_counter()
        program, actions = self.program(state)
        solution, cost, bound, optimal = program.solve(seconds=self.seconds)
        if solution is None:
            raise GossamerError(
                f"no plan was found in {time.perf_counter() - begin:.1f} s; allow more than "
                f"{self.seconds} seconds or shorten the horizon of {self.horizon}"
            )
        chosen = np.stack([u.rows @ solution for u in actions])
        return Plan(
            torch.from_numpy(chosen),
            float(cost),
            time.perf_counter() - begin,
            optimal,
            float(bound),
            int(program.binary.sum()),
        )

    def program(self, state: Tensor) -> tuple[Program, list[Affine]]:
        """The program of a state, and the action variables of every step in it."""
        return _Builder(self, state, None).build()


class _Builder:
    """Writes the steps of a plan into a program.

    Parameters
    ----------
    pattern : None for binaries; else which ReLUs are active, step after step, layer by layer.
    """

    def __init__(
        self, controller: Controller, state: Tensor, pattern: Sequence[bool] | None
    ) -> None:
        self.controller = controller
        self.net = controller.net.compact().to("cpu", torch.float64)
        self.pattern = None if pattern is None else iter(pattern)
        count = len(controller.cost.goal)
        if state.shape != (count,) or not bool(state.isfinite().all()):
            raise GossamerError(
                f"a state has {count} finite components; got shape {tuple(state.shape)}"
            )
        actions = len(controller.cost.action)
        each = 2 * count + 2 * actions + 2 * self.net.count(RELU)
        self.program = Program(controller.horizon * each)
        self.state = Affine(np.zeros((count, self.program.size)), state.double().numpy())

    def build(self, steps: int | None = None) -> tuple[Program, list[Affine]]:
        """The program, and the action variables of every step."""
        low, high = (
            np.asarray(b, dtype=float) for b in (self.controller.low, self.controller.high)
        )
        chosen, state = [], self.state
        for _ in range(self.controller.horizon if steps is None else steps):
            action = self.program.new(low, high)
            chosen.append(action)
            joined = Affine(
                np.concatenate([state.rows, action.rows]),
                np.concatenate([state.const, action.const]),
            )
            out = self._network(joined)
            state = self._named(state + out if self.controller.residual else out)
            cost = self.controller.cost
            self._charge(Affine(state.rows, state.const - cost.goal.double().numpy()), cost.state)
            self._charge(action, cost.action)
        return self.program, chosen

    def _named(self, value: Affine) -> Affine:
        """Variables equal to expressions, which keeps the rows that use them short."""
        made = self.program.new(*self.program.interval(value))
        self.program.zero(Affine(made.rows - value.rows, -value.const))
        return made

    def _charge(self, value: Affine, weights: Tensor) -> None:
        """Add weights · |value| to the cost, through a variable that is at least both signs."""
        price = weights.double().numpy()
        value = Affine(value.rows[price > 0], value.const[price > 0])
        low, high = self.program.interval(value)
        begin = self.program.used
        size = self.program.new(np.zeros(len(low)), np.maximum(np.abs(low), np.abs(high)))
        self.program.cost[begin : self.program.used] = price[price > 0]
        for sign in (1.0, -1.0):
            self.program.at_most_zero(Affine(sign * value.rows - size.rows, sign * value.const))

    def _network(self, x: Affine) -> Affine:
        for weight, bias, kinds in zip(
            self.net.weights, self.net.biases, self.net.kinds, strict=False
        ):
            a = x.after(weight.numpy(), bias.numpy())
            outs = [
                self._relu(Affine(a.rows[i : i + 1], a.const[i : i + 1])) if kind == RELU else
                Affine(a.rows[i : i + 1], a.const[i : i + 1])
                for i, kind in enumerate(kinds.tolist())
            ]  # fmt: skip
            x = Affine(
                np.concatenate([np.zeros((0, self.program.size)), *(o.rows for o in outs)]),
                np.concatenate([np.zeros(0), *(o.const for o in outs)]),
            )
        return x.after(self.net.weights[-1].numpy(), self.net.biases[-1].numpy())

    def _relu(self, a: Affine) -> Affine:
        none = Affine(np.zeros_like(a.rows), np.zeros_like(a.const))
        if self.pattern is not None:
            active = next(self.pattern)
            sign = -1.0 if active else 1.0
            self.program.at_most_zero(Affine(sign * a.rows, sign * a.const))
            return a if active else none
        low, high = (float(b[0]) for b in self.program.interval(a))
        if low < 0 < high and getattr(self.controller, "tighten", True):
            low, high = self.program.tightest(a, low, high)
        # Beyond this the solver's own tolerance decides, and tiny constants only confuse it.
        if low >= -_NEGLIGIBLE:
            return a
        if high <= _NEGLIGIBLE:
            return none
        z, d = self.program.new([0.0], [high]), self.program.new([0.0], [1.0])
        self.program.binary[self.program.used - 1] = 1
        self.program.at_most_zero(Affine(a.rows - z.rows, a.const))
        # z <= a - low (1 - d)
        self.program.at_most_zero(Affine(z.rows - a.rows - low * d.rows, low - a.const))
        self.program.at_most_zero(Affine(z.rows - high * d.rows, z.const))
        return z


def certify(controller: Controller, state: Tensor) -> tuple[float, int]:
    """The least cost of any plan, by trying every pattern of active ReLUs.

    Each pattern is a linear program without binaries or big constants, so the answer rests on
    none of the bounds that :class:`MixedInteger` computes. A pattern of the first steps that no
    action reaches is not tried any further.

    Returns
    -------
    The least cost, and the number of linear programs solved.
    """
    count = controller.net.compact().count(RELU)
    solved, patterns, best = 0, [()], np.inf
    for step in range(1, controller.horizon + 1):
        reached = []
        for before, more in itertools.product(
            patterns, itertools.product((False, True), repeat=count)
        ):
            program, _ = _Builder(controller, state, (*before, *more)).build(step)
            solution, cost, _, _ = program.solve()
            solved += 1
            if solution is not None:
                reached.append((*before, *more))
                if step == controller.horizon:
                    best = min(best, cost)
        patterns = reached
    return float(best), solved
