"""Sparse training over processes: replicated (DDP) and sharded (FSDP2), checked and timed.

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/sparse_training_distributed.py
        [--device cuda|cpu] [--layout ddp fsdp2] [--method rigl gmp sr_ste cast] [--steps 20]
        [--width 512] [--blocks 4] [--batch 8] [--length 256] [--tiny] [--threads 1] [--json FILE]

A Llama made from a configuration trains in bfloat16 with float32 weights and moments (autocast
under DDP, FSDP2's mixed precision): RigL and GMP at 90 %, SR-STE and CAST (with a teacher) at 2:4.
GPUs talk over NCCL, CPUs over gloo. Of every training is checked:

- ``masks``: all processes hold the same, by hash, after every update;
- ``zeros``: removed weights and their optimizer state are zero after every update (of the N:M
  methods, whose removed weights live on until the end, after ``finish``; 2:4 is exact then);
- ``resume``: from half-way on, from the state dicts of model, optimizer and sparsifier, weights and
  masks come out equal to the bit (deterministic kernels are asked for, so times are not the best).

Printed: loss at first and at last, milliseconds of an update and of ``sparsifier.step()`` in it
(medians), peak memory of a GPU, bytes of masks and teacher on one process; then ``ok``, or what
failed and exit status 1. ``--tiny`` finishes on two CPU processes within a minute.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.core import NM, pack_bits
from gossamer.methods.training.base import SparseTraining, Sparsifier
from gossamer.methods.training.cast import CAST
from gossamer.methods.training.gmp import GMP
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.sr_ste import SRSTE

VOCABULARY = 512


def methods(steps: int) -> dict[str, SparseTraining]:
    """The trainings by name."""
    return {
        "rigl": RigL(sparsity=0.9, steps=steps, every=4),
        "gmp": GMP(sparsity=0.9, steps=steps, every=4, pattern="model"),  # type: ignore[arg-type]
        "sr_ste": SRSTE(pattern=NM(2, 4), steps=steps),
        "cast": CAST(pattern=NM(2, 4), steps=steps, every=4, pull=1e-3),
    }


class Run:
    """One training on this process.

    Parameters
    ----------
    layout : ``ddp`` or ``fsdp2``.
    """

    def __init__(self, layout: str, method: SparseTraining, given: argparse.Namespace) -> None:
        self.layout, self.method, self.given = layout, method, given
        self.model: Any = self._spread(self._made())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.sparsifier: Any = None
        self.losses: list[float] = []
        self.updates: list[float] = []
        self.holding: list[float] = []
        self.same = self.zeros = True

    def _made(self) -> nn.Module:
        given = self.given
        torch.manual_seed(0)
        heads = max(1, given.width // 64)
        sizes: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": given.width,
            "intermediate_size": 2 * given.width,
            "num_hidden_layers": given.blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": given.length,
            # The attention whose backward pass adds up in a fixed order.
            "attn_implementation": "eager",
        }
        config = LlamaConfig(**sizes)
        return LlamaForCausalLM(config).to(given.device)

    def _spread(self, net: Any) -> Any:
        if self.layout == "ddp":
            where = [torch.device(self.given.device)] if self.given.device != "cpu" else None
            return nn.parallel.DistributedDataParallel(net, device_ids=where)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        kind = torch.device(self.given.device).type
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in (*net.model.layers, net):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return net

    def attach(self, state: Any = None) -> "Run":
        """Make it sparse; the teacher, where one is needed, is the model as it was made."""
        more: dict[str, Any] = {}
        if getattr(self.method, "distilled_share", 0.0):
            teacher = self._made()
            more["teacher"] = self._spread(teacher) if self.layout == "fsdp2" else teacher
        self.sparsifier = self.method.attach(self.model, self.optimizer, state=state, **more)
        return self

    @property
    def net(self) -> Any:
        """The bare model."""
        return self.model.module if self.layout == "ddp" else self.model

    def tokens(self, step: int) -> Tensor:
        """Counting in steps that differ by row: (batch, length), other rows on every process."""
        given = self.given
        seed = step * dist.get_world_size() + dist.get_rank()
        generator = torch.Generator().manual_seed(seed)
        begin = torch.randint(0, VOCABULARY, (given.batch, 1), generator=generator)
        pace = torch.randint(1, 8, (given.batch, 1), generator=generator)
        return ((begin + pace * torch.arange(given.length)) % VOCABULARY).to(given.device)

    def train(self, steps: range) -> None:
        """Run updates, and check after each of them."""
        kind = torch.device(self.given.device).type
        half = torch.autocast(kind, torch.bfloat16) if self.layout == "ddp" else nullcontext()
        for step in steps:
            _wait(self.given.device)
            start = time.perf_counter()
            ids = self.tokens(step)
            with half:
                loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            _wait(self.given.device)
            before = time.perf_counter()
            self.sparsifier.step()
            _wait(self.given.device)
            self.holding.append(time.perf_counter() - before)
            self.optimizer.zero_grad()
            self.updates.append(time.perf_counter() - start)
            self.losses.append(float(loss.detach()))
            self.same &= _agree(digest(self.sparsifier))
            if not isinstance(self.method, SRSTE | CAST):
                self.zeros &= _all(self.holds_zeros())

    def holds_zeros(self) -> bool:
        """Whether removed weights and their optimizer state are zero on this process."""
        return not any(
            bool(tensor.detach()[~one.mask].any())
            for one in self.sparsifier.held.values()
            for tensor in one.tensors(self.optimizer)
        )

    def state(self) -> Any:
        """Copies of the three state dicts."""
        weights = {name: value.clone() for name, value in self.net.state_dict().items()}
        return weights, deepcopy(self.optimizer.state_dict()), self.sparsifier.state_dict()

    def load(self, state: Any) -> "Run":
        """Go on from copies."""
        weights, moments, saved = state
        self.net.load_state_dict(weights)
        self.optimizer.load_state_dict(moments)
        return self.attach(saved)


def digest(sparsifier: Sparsifier) -> str:
    """Of all masks as wholes."""
    masks = (sparsifier.mask(layer.name) for layer in sparsifier.layers)
    packed = b"".join(pack_bits(mask).cpu().numpy().tobytes() for mask in masks)
    return hashlib.sha256(packed).hexdigest()


def equal(one: Run, other: Run) -> bool:
    """Whether two trainings ended with the same weights and masks here."""
    pairs = zip(one.sparsifier.held.values(), other.sparsifier.held.values(), strict=True)
    return all(torch.equal(a.mask, b.mask) and torch.equal(a.shown, b.shown) for a, b in pairs)


def exact(run: Run) -> bool:
    """Whether no group of four here keeps more than two, where the pattern is 2:4."""
    if run.method.pattern != NM(2, 4):
        return True
    return all(
        int(one.shown.reshape(-1, 4).count_nonzero(1).max()) <= 2
        for one in run.sparsifier.held.values()
        if one.shown.numel()
    )


def _agree(text: str) -> bool:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, text)
    return len(set(found)) == 1


def _all(holds: bool) -> bool:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, holds)
    return all(found)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measured(layout: str, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One training, its second half once more from the saved states, and what both showed."""
    method = methods(given.steps)[name]
    if given.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    whole = Run(layout, method, given).attach()
    whole.train(range(given.steps // 2))
    state = whole.state()
    whole.train(range(given.steps // 2, given.steps))
    peak = torch.cuda.max_memory_allocated() if given.device != "cpu" else 0
    again = Run(layout, method, given).load(state)
    again.train(range(given.steps // 2, given.steps))
    resumed = _all(equal(whole, again))
    memory = whole.sparsifier.memory()
    report = whole.sparsifier.finish().report()
    zeros = whole.zeros and _all(whole.holds_zeros() and exact(whole))
    return {
        "layout": layout,
        "method": name,
        "sparsity": report.sparsity,
        "first": whole.losses[0],
        "last": whole.losses[-1],
        "update_ms": 1e3 * statistics.median(whole.updates[2:]),
        "step_ms": 1e3 * statistics.median(whole.holding[2:]),
        "peak_gib": peak / 2**30,
        "masks_bytes": memory["masks"],
        "teacher_bytes": memory.get("teacher", 0),
        "masks": whole.same and again.same,
        "zeros": zeros,
        "resume": resumed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layout", nargs="+", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2"])
    parser.add_argument("--method", nargs="+", default=list(methods(8)), choices=list(methods(8)))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.tiny:
        given.steps, given.width, given.blocks, given.batch, given.length = 8, 64, 2, 2, 16
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if given.device != "cpu":
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        given.device = f"cuda:{local}"
    dist.init_process_group("gloo" if given.device == "cpu" else "nccl")
    first = dist.get_rank() == 0
    began, rows = time.perf_counter(), []
    if first:
        print(f"torch {torch.__version__}, {dist.get_world_size()} processes, {dist.get_backend()}")
        print(
            "layout method  sparsity   first    last  update ms  step() ms  peak GiB   masks MB "
            "teacher MB  masks  zeros resume"
        )
    for layout in given.layout:
        for name in given.method:
            row = measured(layout, name, given)
            rows.append(row)
            if first:
                marks = " ".join(f"{'ok' if row[x] else 'NO':>6s}" for x in MARKS)
                print(
                    f"{layout:6s} {name:7s} {row['sparsity']:8.2%} {row['first']:7.3f} "
                    f"{row['last']:7.3f} {row['update_ms']:10.1f} {row['step_ms']:10.2f} "
                    f"{row['peak_gib']:9.2f} {row['masks_bytes'] / 1e6:10.2f} "
                    f"{row['teacher_bytes'] / 1e6:10.2f} {marks}",
                    flush=True,
                )
    failed = [f"{r['layout']} {r['method']} {x}" for r in rows for x in MARKS if not r[x]]
    if first:
        seconds = time.perf_counter() - began
        print(f"{seconds:.0f} s: " + ("ok" if not failed else f"failed: {', '.join(failed)}"))
        if given.json is not None:
            values = {"torch": torch.__version__, "backend": dist.get_backend(), "rows": rows}
            given.json.write_text(json.dumps(values, indent=1) + "\n")
    dist.destroy_process_group()
    sys.exit(bool(failed))


MARKS = ("masks", "zeros", "resume")

if __name__ == "__main__":
    main()
