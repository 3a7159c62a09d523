"""Sparse neural dynamics: a model of a few ReLUs that a solver can plan through to the optimum.

Most ReLUs of a learned dynamics model can be linear or go; what is left is piecewise linear with
few pieces, and a mixed-integer program finds the best plan where sampling only guesses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count, unknown
from gossamer.methods.weights.dynamics.data import Trajectories, as_trajectories
from gossamer.methods.weights.dynamics.mip import MixedInteger
from gossamer.methods.weights.dynamics.network import (
    IDENTITY,
    KINDS,
    RELU,
    SparseNet,
    chain,
    check_chain,
)
from gossamer.methods.weights.dynamics.planning import MPPI, Controller, Cost, RandomShooting
from gossamer.methods.weights.dynamics.training import (
    Thinning,
    discretise,
    fit,
    prediction_error,
    thin,
)
from gossamer.models import Applied, Progress, Report, SiteRow, State

__all__ = ["SparseDynamics", "SparseDynamicsModel"]

Planner = Literal["mip", "shooting", "mppi"]
_PLANNERS: dict[str, type[Controller]] = {
    "mip": MixedInteger,
    "shooting": RandomShooting,
    "mppi": MPPI,
}


class _Kinds:
    """What a ReLU module computes instead: every unit its own kind."""

    def __init__(self, kinds: Tensor) -> None:
        self.kinds = kinds

    def __call__(self, a: Tensor) -> Tensor:
        kinds = self.kinds.to(a.device)
        return torch.where(kinds == RELU, a.relu(), torch.where(kinds == IDENTITY, a, 0))


class SparseDynamicsModel(Applied):
    """A dynamics model with few ReLUs left, and planners that use it.

    The model computes the thinned network in place, at its dense size: ``simulated`` is True. What
    is gained is in :attr:`net`, the network without its dead units, and in the size of the
    mixed-integer program.

    Attributes
    ----------
    net : the thinned network without dead units, in main memory.
    errors : prediction error before and after, on the training data: root mean square over the
        steps of a trajectory, in units of the usual change in a step. Empty after loading.
    """

    simulated = True

    def __init__(self, method: "SparseDynamics", model: nn.Module, thinned: SparseNet) -> None:
        super().__init__(method, model)
        self.thinned = thinned
        self.net = thinned.compact().to("cpu")
        self.errors: dict[str, float] = {}
        self._names = _relu_names(model)
        self._before = {k: v.detach().clone() for k, v in model.state_dict().items()}
        linears, self._relus = chain(model)
        with torch.no_grad():
            for layer, weight, bias in zip(linears, thinned.weights, thinned.biases, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        for relu, kinds in zip(self._relus, thinned.kinds, strict=True):
            # Assigned past Module.__setattr__: an attribute of this module alone.
            vars(relu)["forward"] = _Kinds(kinds)
        self._join()

    def _undo(self) -> None:
        for relu in self._relus:
            vars(relu).pop("forward", None)
        state = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in self._before.items():
                state[name].copy_(tensor)

    def state(self) -> State:
        tensors = {f"kinds.{i}": k.to(torch.uint8) for i, k in enumerate(self.thinned.kinds)}
        tensors |= {f"weight.{i}": w.clone() for i, w in enumerate(self.thinned.weights)}
        tensors |= {f"bias.{i}": b.clone() for i, b in enumerate(self.thinned.biases)}
        return State({"layers": len(self.thinned.weights)}, tensors)

    def report(self) -> Report:
        rows = tuple(
            SiteRow(name, "relu", i, len(kinds), 1.0 - float((kinds == RELU).float().mean()))
            for i, (name, kinds) in enumerate(zip(self._names, self.thinned.kinds, strict=True))
        )
        counts = ", ".join(f"{self.thinned.count(k)} {name}" for k, name in enumerate(KINDS))
        notes = [f"{self.thinned.units} hidden units: {counts}"]
        if self.errors:
            notes.append(
                f"prediction error {self.errors['before']:.4f} before, {self.errors['after']:.4f} "
                "after, in units of the usual change in a step"
            )
        return Report(
            self.method.to_dict(),
            rows,
            "ReLU units",
            self.thinned.units,
            self.simulated,
            tuple(notes),
        )

    def controller(
        self,
        cost: Cost,
        low: Tensor,
        high: Tensor,
        *,
        horizon: int = 5,
        planner: Planner = "mip",
        **options: Any,
    ) -> Controller:
        """A receding-horizon controller that plans with the thinned network.

        Parameters
        ----------
        cost : what to minimise. low, high : (A,) bounds of the actions.
        horizon : steps planned ahead.
        planner : ``mip`` proves its plans optimal; ``shooting`` and ``mppi`` sample.
        options : further parameters of the planner, such as ``samples`` or ``tighten``.

        Raises
        ------
        GossamerError
            For another planner, or sizes that do not fit the model.
        """
        if planner not in _PLANNERS:
            raise unknown("planner", planner, tuple(_PLANNERS))
        assert isinstance(self.method, SparseDynamics)
        residual = self.method.residual
        return _PLANNERS[planner](
            net=self.net,
            cost=cost,
            low=low,
            high=high,
            horizon=horizon,
            residual=residual,
            **options,
        )


def _relu_names(model: nn.Module) -> list[str]:
    _, relus = chain(model)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(relu)] for relu in relus]


@dataclass(frozen=True, kw_only=True)
class SparseDynamics(Method):
    """Turn most ReLUs of a learned dynamics model into identities or zeros, and plan with the rest.

    Every hidden unit learns a categorical distribution over ReLU, identity and zero, by the
    straight-through Gumbel-softmax with a falling temperature, while the number of ReLUs allowed
    shrinks. Then each unit takes its likeliest kind, and the weights are trained once more.

    Parameters
    ----------
    relus : ReLUs left, at most.
    steps : updates while ReLUs go. finetune : updates after that, with the kinds fixed.
    lr, batch_size : of Adam, on trajectories drawn with replacement; kinds learn ten times as fast.
    penalty : cost of one expected ReLU above the budget, in units of the mean squared error.
    residual : the model gives the change of the state, not the next state.
    seed : of the order of the data and the kinds drawn.

    Source: arXiv 2312.12791. Departs from the paper: perceptrons only, no graph networks; the
    budget shrinks linearly over 70 % of the updates, within one training run.
    """

    card: ClassVar = Card(
        title="Model-Based Control with Sparse Neural Dynamics",
        year=2023,
        arxiv="2312.12791",
        system="sparse_dynamics",
        family="weights",
        when="after training",
        masks="dynamic",
        site="hidden units of a dynamics model",
        score="learned",
        pattern="one of ReLU, identity, zero for every unit",
        budget="ReLUs of the whole network",
        schedule="linear over the first 70 % of the updates",
        update="training with sampled kinds, then with fixed ones",
        kernel="mixed-integer program (HiGHS)",
        departs="perceptrons only; one run with a shrinking budget; HiGHS solves the programs",
    )
    subject: ClassVar[str] = "dynamics model"
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the amount is a number of ReLUs, and training changes the weights",
    }
    example: ClassVar[Mapping[str, Any]] = {
        "relus": 2,
        "steps": 8,
        "finetune": 4,
        "batch_size": 16,
        "lr": 0.02,
    }

    relus: int = 6
    steps: int = 1500
    finetune: int = 1500
    lr: float = 1e-2
    batch_size: int = 128
    penalty: float = 0.1
    residual: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("relus", self.relus, 0)
        check_count("steps", self.steps, 1)
        check_count("finetune", self.finetune, 0)
        check_count("batch_size", self.batch_size, 1)
        for name in ("lr", "penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value <= 0:
                raise GossamerError(f"{name} is {value!r}; give a positive number")

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> SparseDynamicsModel:
        """Thin a dynamics model in place.

        Parameters
        ----------
        model : linear layers with ReLUs between them, from states and actions side by side
            (N, S + A) to the change of the state, or the next one, (N, S).
        data : :class:`~gossamer.methods.weights.dynamics.data.Trajectories`, or (states, actions).

        Raises
        ------
        GossamerError
            If the model is another kind of network, the data do not fit it, or training diverges.
        """
        trajectories = as_trajectories(data)
        dense, trajectories = self._checked(model, trajectories)
        plan = Thinning(
            relus=self.relus,
            steps=self.steps,
            finetune=self.finetune,
            lr=self.lr,
            penalty=self.penalty,
            batch_size=self.batch_size,
            seed=self.seed,
            residual=self.residual,
        )
        trained, chances = thin(dense, trajectories, plan, progress)
        thinned = fit(discretise(trained, chances, self.relus), trajectories, plan, progress)
        work = SparseDynamicsModel(self, model, thinned)
        work.errors = {
            "before": prediction_error(dense, trajectories, self.residual),
            "after": prediction_error(thinned, trajectories, self.residual),
        }
        return work

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SparseDynamicsModel:
        """Put a stored network into a model of the same shape."""
        count = int(meta["layers"])
        stored = SparseNet(
            tuple(tensors[f"weight.{i}"] for i in range(count)),
            tuple(tensors[f"bias.{i}"] for i in range(count)),
            tuple(tensors[f"kinds.{i}"].to(torch.int64) for i in range(count - 1)),
        )
        wanted = [tuple(w.shape) for w in SparseNet.dense(model).weights]
        if wanted != [tuple(w.shape) for w in stored.weights]:
            raise GossamerError(
                f"the stored network is {stored}; this model has layers of shapes {wanted}"
            )
        return SparseDynamicsModel(self, model, stored)

    def _checked(self, model: nn.Module, data: Trajectories) -> tuple[SparseNet, Trajectories]:
        """The model as a network, and the data in its dtype and place."""
        first = torch.cat([data.states[:, 0], data.actions[:, 0]], -1)
        weight = chain(model)[0][0].weight
        data = Trajectories(data.states.to(weight), data.actions.to(weight))
        check_chain(model, first.to(weight))
        dense = SparseNet.dense(model)
        if len(dense.weights[-1]) != data.states.shape[2]:
            raise GossamerError(
                f"the model has {len(dense.weights[-1])} outputs; the data's states have "
                f"{data.states.shape[2]} components"
            )
        if not all(bool(t.isfinite().all()) for t in (*dense.weights, *dense.biases)):
            raise GossamerError("the model's weights hold NaN or infinity; train it anew")
        return dense, data
