"""Putting a gated model's decode steps on kernels, and taking them off again."""

import copy
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, unknown
from gossamer.kernels.gather_gemv import native
from gossamer.kernels.gather_gemv.rows import DTYPES, rows
from gossamer.kernels.measured import DENSE, ChoiceRow
from gossamer.methods.activations.execution.choice import Chooser, How
from gossamer.methods.activations.execution.layers import (
    Replaced,
    head_forward,
    sparse_forward,
    unchanged,
)
from gossamer.methods.activations.execution.program import Program, build
from gossamer.methods.activations.execution.step import Step
from gossamer.methods.activations.execution.structure import model_parts
from gossamer.methods.activations.gates import Gate, Gates
from gossamer.models import Progress, SiteMap, at_work

__all__ = ["Execution", "accelerate"]

_OFF = {torch.float32: 1e-2, torch.bfloat16: 1e-1}  # most distance of the native step, relative


class Execution:
    """Kernels at work in a gated model; :meth:`remove` takes them off.

    Attributes
    ----------
    table : what was chosen for every gated layer.
    nbytes : of the rows made beside the model's weights.
    whole : the whole decode step is one native call.
    active : something other than dense runs.
    """

    def __init__(self, table: list[ChoiceRow], most: int) -> None:
        self.table, self.most = table, most
        self.nbytes = 0
        self.active = False
        self.step: Step | None = None
        self.program: Program | None = None
        self._handles: list[Replaced] = []

    @property
    def whole(self) -> bool:
        """The whole decode step is one native call."""
        return self.step is not None

    def replace(self, module: nn.Module, forward: Any) -> None:
        """Let a module run something else until :meth:`remove`."""
        self._handles.append(Replaced(module, forward))

    def remove(self) -> None:
        """Put every forward back and drop the rows. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self.step = self.program = None
        self.active, self.nbytes = False, 0

    def read(self) -> float | None:
        """Share of the gated channels that native steps read so far; None before the first."""
        if self.program is None:
            return None
        read, all_ = self.program.counters.sum(0).tolist()
        return read / all_ if all_ else None

    def notes(self) -> tuple[str, ...]:
        """What runs how, and what it costs in memory."""
        count = sum(row.chosen != DENSE for row in self.table)
        where = "one native call a step" if self.whole else "layer by layer"
        notes = [
            f"decode steps of up to {self.most} rows run on kernels ({where}): {count} of "
            f"{len(self.table)} gated layers skip channels, the others are dense; prefill is "
            f"masked dense; {self.nbytes:,} bytes of channel-major weights beside the model"
        ]
        if (read := self.read()) is not None:
            notes.append(f"native steps read {read:.1%} of the gated channels so far")
        return tuple(notes)


def _checked(batch_sizes: Iterable[int]) -> tuple[int, list[ChoiceRow]]:
    """The most rows kernels will take, and rows of the table for sizes that stay dense."""
    sizes = sorted(set(batch_sizes))
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise GossamerError(f"batch_sizes are {sizes!r}; give whole numbers, at least 1")
    within = [size for size in sizes if size <= native.MOST]
    beyond = [size for size in sizes if size > native.MOST]
    table = []
    if beyond:
        logging.getLogger("gossamer").warning(
            "batch size %s is beyond the %d rows the kernels take; such steps run dense",
            ", ".join(map(str, beyond)),
            native.MOST,
        )
        table = [ChoiceRow("all layers", (), str(size), DENSE, {}) for size in beyond]
    return max(within, default=0), table


def accelerate(
    model: nn.Module,
    sites: SiteMap,
    gates: Gates,
    batch_sizes: Iterable[int] = (1,),
    *,
    choice: How = "measured",
    progress: Progress | None = None,
) -> Execution:
    """Run the decode steps of a gated model on kernels that skip what its gates remove.

    A model whose step can run as one native call does so, once it gave what the model gives;
    else its gated linear layers run one by one. Layers for which dense is faster stay dense.

    Parameters
    ----------
    batch_sizes : rows of a decode step that will come; 1 to 4 are served, others run dense.
    choice : ``measured`` times the candidates of every kind of layer, ``predicted`` believes the
        prediction, ``axpy`` skips channels wherever some are dropped.
    progress : called with (blocks or layers done, all of them, what).

    Raises
    ------
    GossamerError
        For batch sizes below 1, another choice, or weights that are neither float32 nor bfloat16.
    """
    if choice not in get_args(How):
        raise unknown("choice", choice, get_args(How))
    most, beyond = _checked(batch_sizes)
    execution = Execution(beyond, most)
    weight = next(model.get_submodule(sites.base).parameters())
    if weight.dtype not in DTYPES:
        raise GossamerError(
            f"kernels read float32 and bfloat16 weights; these are {weight.dtype}: load the model "
            "in bfloat16"
        )
    if not most or (weight.device.type == "cpu" and not native.usable()):
        return execution
    if other := _other(model):
        logging.getLogger("gossamer").warning(
            "%s changes what blocks compute, which the kernels do not know; all layers run dense",
            other,
        )
        return execution
    chooser = Chooser(most, choice)
    try:
        if weight.device.type == "cpu" and not _whole(
            execution, model, sites, gates, chooser, progress
        ):
            chooser = Chooser(most, choice)
            _layers(execution, _places(model, sites, gates), chooser, progress)
        elif weight.device.type == "cuda":
            _on_device(execution, _places(model, sites, gates))
    except BaseException:
        execution.remove()
        raise
    execution.table += chooser.table
    return execution


def _other(model: nn.Module) -> str | None:
    """A method at work, neither gates nor pruned weights, whose hooks kernels would pass by."""
    for work in at_work(model):
        if work.method.card.family not in ("weights", "training") and not hasattr(work, "gates"):
            return work.method.key()
    return None


def _served(gates: Gates) -> bool:
    """Whether the native step knows every gate: fixed cuts on inputs or on an MLP's neurons.

    Chosen neurons take the place of a threshold on the input of ``up``.
    """
    at_work = [gate for gate in gates.gates.values() if gate.sparsity > 0]
    chosen = {gate.block for gate in at_work if gate.role == "mlp.neurons"}
    return all(
        gate.fixed
        and (
            gate.role == "mlp.neurons"
            or (gate.role.partition(".")[0] in ("attention", "mlp") and gate.name == gate.module)
        )
        and not (gate.role == "mlp.up" and gate.block in chosen)
        for gate in at_work
    )


def _whole(
    execution: Execution,
    model: nn.Module,
    sites: SiteMap,
    gates: Gates,
    chooser: Chooser,
    progress: Progress | None,
) -> bool:
    """Put the native step to work if the model has the parts and it gives what the model gives."""
    parts = model_parts(model, sites)
    # The hooks of a second gated model would be passed by.
    alone = sum(hasattr(work, "gates") for work in at_work(model)) < 2
    if parts is None or not _served(gates) or not alone:
        return False
    program = build(parts, gates.gates, chooser, progress)
    base = model.get_submodule(sites.base)
    step = Step(base, program, gates.positions, lambda: gates._counting, execution.most)
    if (distance := _probe(base, step)) > _OFF[program.parts.embed.weight.dtype]:
        logging.getLogger("gossamer").info(
            "a native step of %s is %.1e off; its layers run one by one",
            type(model).__name__,
            distance,
        )
        return False
    program.counters.zero_()
    step.know(model)
    execution.program, execution.step = program, step
    execution.nbytes, execution.active = program.nbytes, program.sparse
    execution.replace(base, step.forward)
    head = model.get_submodule(sites.head) if sites.head else None
    if type(head) is nn.Linear and head.weight.dtype in DTYPES:
        execution.replace(head, head_forward(head, execution.most))
    return True


@torch.no_grad()
def _probe(base: nn.Module, step: Step) -> float:
    """Relative distance of native from own hidden states over a few made-up tokens."""
    training = base.training
    base.eval()
    try:
        size = step.program.parts.embed.weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (1, 11), generator=generator)
        output = step.own(input_ids=ids[:, :8], use_cache=True)
        cache = output.past_key_values
        step.output = type(output)
        other, off = copy.deepcopy(cache), []
        step.positions.begin(past=8, shape=(1, 1))
        for t in range(8, 11):
            given = {"input_ids": ids[:, t : t + 1], "use_cache": True}
            if not step._fits({**given, "past_key_values": other}):
                return float("inf")
            theirs = step.own(**given, past_key_values=cache).last_hidden_state
            ours = step._step({**given, "past_key_values": other}).last_hidden_state
            off.append(float((ours - theirs).norm() / theirs.norm()))
        # A channel at its threshold may fall to either side; most tokens have none that matters.
        return sorted(off)[1]
    finally:
        step.positions.begin()
        base.train(training)


class _Place(NamedTuple):
    """A linear layer whose input holds the zeros of a gate."""

    gate: Gate
    module: nn.Module
    weight: Tensor  # (O, I)
    bias: Tensor | None


def _places(model: nn.Module, sites: SiteMap, gates: Gates) -> list[_Place]:
    found = []
    known = {site.name: site for site in sites.sites}
    for gate in gates.gates.values():
        # Neurons that are off are zeros in what enters the down projection.
        name = gate.name
        if gate.role == "mlp.neurons":
            downs = [s.name for s in sites.in_block(gate.block) if s.role == "mlp.down"]
            name = downs[0] if len(downs) == 1 and downs[0] not in gates.gates else ""
        site = known.get(name)
        module = model.get_submodule(site.module if site else gate.module)
        weight = getattr(module, "weight", None)
        if site is None or site.expert is not None or gate.sparsity <= 0 or "experts" in gate.role:
            continue
        if isinstance(weight, Tensor) and weight.dim() == 2:
            turned = weight.T if site.transposed else weight
            found.append(_Place(gate, module, turned, getattr(module, "bias", None)))
    return found


def _layers(
    execution: Execution,
    places: list[_Place],
    chooser: Chooser,
    progress: Progress | None,
) -> None:
    for number, (gate, module, weight, bias) in enumerate(places):
        layer = chooser.layer(gate.name, weight, bias, gate)
        if layer is not None:
            forward = sparse_forward(module.forward, layer, execution.most, fresh=unchanged(module))
            execution.replace(module, forward)
            execution.nbytes += layer.nbytes
            execution.active = True
        if progress is not None:
            progress(number + 1, len(places), "choosing kernels")


def _on_device(execution: Execution, places: list[_Place]) -> None:
    for gate, module, weight, bias in places:
        layer = rows(weight, bias)
        execution.replace(module, sparse_forward(module.forward, layer, execution.most))
        execution.nbytes += layer.nbytes
        execution.active = True
        shape: tuple[int, ...] = tuple(weight.shape)
        execution.table.append(ChoiceRow(gate.name, shape, f"1 to {execution.most}", "axpy", {}))
