"""The native decode step of a model: its layers by rows, its thresholds, one structure."""

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gossamer.kernels.gather_gemv import native
from gossamer.kernels.gather_gemv.native import Native, linear_of, mlp_of
from gossamer.kernels.gather_gemv.rows import DTYPES, Rows, rows
from gossamer.kernels.measured import ChoiceRow
from gossamer.methods.activations.execution.choice import Chooser
from gossamer.methods.activations.execution.structure import BlockParts, ModelParts
from gossamer.methods.activations.gates import Gate
from gossamer.models import Progress

__all__ = ["Program", "build", "norm_weight"]


@dataclass(eq=False)
class Program:
    """A model as the native step reads it.

    Parameters
    ----------
    model : the structure. keep : what it points into.
    counters : int64 (layers, 2): channels read and channels, by gated place.
    names : of the gated places, in the order of the counters.
    nbytes : of the rows made for it, beside the model's own weights.
    """

    model: native.Model
    parts: ModelParts
    counters: Tensor
    keep: list[object] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    nbytes: int = 0
    sparse: bool = False


def norm_weight(norm: nn.Module) -> Tensor:
    """float32 copy of a norm's weights."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().contiguous().clone()


class _Builder:
    def __init__(self, program: Program, gates: dict[str, Gate], chooser: Chooser) -> None:
        self.program, self.gates, self.chooser = program, gates, chooser

    def held(self, tensor: Tensor) -> int:
        self.program.keep.append(tensor)
        return tensor.data_ptr()

    def seen(self, name: str) -> Tensor:
        self.program.names.append(name)
        return self.program.counters[len(self.program.names) - 1]

    def gate(self, name: str) -> Gate | None:
        gate = self.gates.get(name)
        return gate if gate is not None and gate.sparsity > 0 else None

    def neurons(self, parts: BlockParts) -> Gate | None:
        """The gate at the activated gate of this block's MLP."""
        block = parts.sites["mlp.down"].block
        here = (g for g in self.gates.values() if (g.role, g.block) == ("mlp.neurons", block))
        return next((gate for gate in here if gate.sparsity > 0), None)

    def copied(self, module: nn.Linear) -> Rows:
        made = rows(module.weight, module.bias)
        self.program.nbytes += made.nbytes
        return made

    def linear(self, parts: BlockParts, role: str) -> Native:
        module, site = parts.linears[role], parts.sites[role]
        gate = self.gate(site.name)
        chosen = self.chooser.layer(site.name, module.weight, module.bias, gate)
        if chosen is not None:
            self.program.nbytes += chosen.nbytes
            self.program.sparse = True
        return self.made(module, gate, chosen)

    def made(self, module: nn.Linear, gate: Gate | None, chosen: Rows | None) -> Native:
        layer = chosen or rows(module.weight, module.bias, major="output")
        found = linear_of(
            layer,
            None if gate is None else gate.cut,
            None if gate is None else self.seen(gate.name),
        )
        self.program.keep.append(found)
        return found

    def block(self, parts: BlockParts) -> native.Block:
        q, k, v, o = (
            self.linear(parts, f"attention.{name}").struct for name in ("q", "k", "v", "o")
        )
        gate, up, down = (self.linear(parts, f"mlp.{name}") for name in ("gate", "up", "down"))
        neurons = self.neurons(parts)
        if neurons is None:
            mlp = mlp_of(gate, up, down, parts.act)
        else:
            site, module = parts.sites["mlp.down"], parts.linears["mlp.down"]
            if not down.struct.channel_major:
                # Whether `down` alone would gain or not: its rows are found by the neurons.
                down = self.made(module, self.gate(site.name), self.copied(module))
            mlp = mlp_of(gate, up, down, parts.act, neurons.cut, self.seen(neurons.name))
            self.program.sparse = True
            shape = (module.out_features, module.in_features)
            self.chooser.table.append(ChoiceRow(neurons.name, shape, self.chooser.span, "dot", {}))
        self.program.keep.append(mlp)
        norms = [self.held(norm_weight(norm)) for norm in (*parts.norms, *(parts.head_norms or ()))]
        return native.Block(q, k, v, o, mlp.struct, *norms)


def build(
    parts: ModelParts,
    gates: dict[str, Gate],
    chooser: Chooser,
    progress: Progress | None = None,
) -> Program:
    """The native step of a model under its gates; layers in the form the chooser finds best."""
    counters = torch.zeros(len(gates) + 1, 2, dtype=torch.int64)
    program = Program(native.Model(), parts, counters)
    builder = _Builder(program, gates, chooser)
    made = []
    for block in parts.blocks:
        made.append(builder.block(block))
        if progress is not None:
            progress(len(made), len(parts.blocks), "choosing kernels")
    blocks = (native.Block * len(made))(*made)
    program.keep.append(blocks)
    hidden = parts.embed.weight
    # Keys and values are kept in the model's own dtype.
    program.model = native.Model(
        blocks=len(blocks),
        hidden=hidden.shape[1],
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        head_dim=parts.head_dim,
        rotary=parts.head_dim,
        cache_dtype=DTYPES.index(hidden.dtype),
        block=ctypes.cast(blocks, ctypes.POINTER(native.Block)),
        final_norm=builder.held(norm_weight(parts.norm)),
        epsilon=parts.epsilon,
        scaling=parts.scaling,
    )
    return program
