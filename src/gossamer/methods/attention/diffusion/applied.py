"""Sparse attention by denoising step at work in a bidirectional model: run, count, undo."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.attention.diffusion.calls import AttentionCalls
from gossamer.methods.attention.diffusion.steps import Denoising, now
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import EXECUTORS, choose, run
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.models import Applied, Report, SiteRow, State

if TYPE_CHECKING:
    from gossamer.methods.attention.sparsed import SparseD

__all__ = ["DiffusionAttention", "block_pairs"]

Choice = Callable[[Call, Layout, int], BlockIndex]


@dataclass(eq=False)
class _Generation:
    """What one generation decided, and the pairs it read."""

    indices: dict[int, BlockIndex] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    read: Counter[int] = field(default_factory=Counter)
    total: Counter[int] = field(default_factory=Counter)


class DiffusionAttention(Applied):
    """Attention that is full in the first denoising steps and sparse in all later ones.

    It acts inside a generation, which :func:`sample` opens itself and :func:`denoising` opens
    around any other sampler; outside of one, attention stays full.

    Parameters
    ----------
    choice : (call, layout, prompt tokens) to the blocks all later steps read.

    Attributes
    ----------
    ran : how many attention calls each executor ran. outside : forward passes outside of any
        generation.
    """

    method: "SparseD"

    def __init__(self, method: "SparseD", model: nn.Module, choice: Choice) -> None:
        super().__init__(method, model)
        self.ran: Counter[str] = Counter()
        self.outside = 0
        self._choice = choice
        self._rows: tuple[tuple[int, int], ...] = ()
        self._own_forward = vars(model).get("forward")
        self._forward = model.forward
        model.forward = self._step
        self._join()

    def _undo(self) -> None:
        if self._own_forward is None:
            del self.model.forward
        else:
            self.model.forward = self._own_forward

    def _step(self, *args: Any, **options: Any) -> Any:
        """The model's forward; inside a generation one denoising step."""
        current = now()
        if current is None:
            self.outside += 1
            return self._forward(*args, **options)
        if current.step > current.steps:
            raise GossamerError(
                f"step {current.step} of a generation of {current.steps}; tell denoising() how "
                "many forward passes the sampler makes"
            )
        generation = current.memo.setdefault(self, _Generation())

        def attend(call: Call, layout: Layout, layer: int) -> Tensor:
            return self._attend(call, layout, layer, current, generation)

        with AttentionCalls(attend) as calls:
            out = self._forward(*args, **options)
        if not calls.count:
            raise GossamerError(
                f"{type(self.model).__name__} made no call of scaled_dot_product_attention; load "
                "it with attn_implementation='sdpa'"
            )
        current.step += 1
        self._rows = tuple(
            (generation.read[layer], generation.total[layer]) for layer in range(calls.count)
        )
        return out

    def _attend(
        self, call: Call, layout: Layout, layer: int, current: Denoising, held: _Generation
    ) -> Tensor:
        last = self.method.dense_steps(current.steps)
        if current.step == last:
            index = held.indices[layer] = self._choice(call, layout, current.prompt)
            held.sizes[layer] = block_pairs(index)
        total = _own_pairs(call, layout)
        held.total[layer] += total
        if current.step <= last:
            held.read[layer] += total
            return self._full(call, layout)
        index = held.indices[layer]
        if index.layout.shape != layout.shape:
            raise GossamerError(
                f"the sequences were {index.layout.shape} when their blocks were chosen and are "
                f"{layout.shape} at step {current.step}; keep batch and length through a generation"
            )
        kept, whole = held.sizes[layer]
        held.read[layer] += kept
        if kept == whole:
            return self._full(call, layout)
        name = choose(index, self.method.backend, call)
        if not any(self.ran[n] for n in self.ran if n != "dense"):
            self.simulated = False
        self.simulated = self.simulated or EXECUTORS[name].simulated
        self.ran[name] += 1
        return run(name, call, index)

    def _full(self, call: Call, layout: Layout) -> Tensor:
        """The model's own attention; a mask of padding is one row, never (T, T)."""
        self.ran["dense"] += 1
        mask = None if layout.padding is None else layout.padding[:, None, None]
        return nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, mask, call.dropout, scale=call.scale
        )

    def state(self) -> State:
        return State({"rows": [list(row) for row in self._rows], "simulated": self.simulated})

    def remember(self, meta: dict[str, Any]) -> None:
        """Take over what the last generation before saving read."""
        self._rows = tuple((int(read), int(total)) for read, total in meta["rows"])
        self.simulated = bool(meta["simulated"])

    def report(self) -> Report:
        """Pairs the last generation did not read, full steps included."""
        rows = tuple(
            SiteRow(f"attention {i}", "attention.scores", i, total, 1.0 - read / total)
            for i, (read, total) in enumerate(self._rows)
        )
        ran = ", ".join(f"{name} {count}" for name, count in sorted(self.ran.items()))
        notes = [
            "pairs are those of all heads and steps of the last generation, full steps included",
            f"attention calls run: {ran or 'none yet'}",
        ]
        if not rows:
            notes.insert(0, "no generation has run yet: sample(), or denoising() round a sampler")
        if self.outside:
            notes.append(f"{self.outside} forward passes outside of a generation stayed full")
        return Report(
            method=self.method.to_dict(),
            rows=rows,
            unit="attention pairs",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=tuple(notes),
        )


def _own_pairs(call: Call, layout: Layout) -> int:
    """Pairs of real tokens, over all rows and heads."""
    batch, heads, queries = call.query.shape[:3]
    if layout.padding is None:
        return batch * heads * queries * layout.keys
    real = layout.padding.sum(1)
    return heads * int((real * real).sum())


def block_pairs(index: BlockIndex) -> tuple[int, int]:
    """Pairs of real tokens in the listed blocks and in all, without a (T, T) mask."""
    layout, (high, wide) = index.layout, index.block
    blocks = index.blocks()
    shape = layout.batch, layout.keys
    real = blocks.new_ones(shape) if layout.padding is None else layout.padding
    sizes = []
    for width in (high, wide):
        padded = nn.functional.pad(real.long(), (0, -layout.keys % width))
        sizes.append(padded.view(layout.batch, -1, width).sum(-1))
    pairs = sizes[0][:, None, :, None] * sizes[1][:, None, None, :]
    return int((pairs * blocks).sum()), int(pairs.sum()) * blocks.shape[1]
