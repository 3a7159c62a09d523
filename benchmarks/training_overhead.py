"""What a sparse training costs beside the same training: time of an update, and memory.

    python benchmarks/training_overhead.py [--model nano] [--threads 1] [--batch 8] [--length 256]
        [--rounds 5] [--sparsity 0.9] [--method rigl gmp sr_ste ...] [--cpu-time] [--json FILE]

One figure is promised: ``sparsifier.step()`` of the methods that hold masks takes at most 3 % of a
training step (forward, backward, AdamW), where masks stay as they are. In every round a plain
update comes before the updates of each method, so that a busy machine slows all alike; printed are
the medians and, since load only ever adds time, the smallest (``--cpu-time`` counts this process's
processor time instead, for a busy machine and one thread):

- ``step()`` alone, in milliseconds and as a share of the plain update;
- a whole sparse update over the plain one (gradients are masked in it, and for N:M methods the
  optimizer updates dense weights, which then are masked anew), at an update that changes no mask;
- an update that changes masks, where the method has such.

Then the bytes held beside model and optimizer. N:M methods, which have no promise, follow mask
methods: SR-STE and gradient flow choose masks at every update, and a teacher runs forward as well.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gossamer.core import NM
from gossamer.methods.training.ast import AST
from gossamer.methods.training.base import SparseTraining
from gossamer.methods.training.cast import CAST
from gossamer.methods.training.gmp import GMP
from gossamer.methods.training.gradient_flow import GradientFlow
from gossamer.methods.training.granet import GraNet
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.set import SET
from gossamer.methods.training.sr_ste import SRSTE
from gossamer.models import load_model


def methods(sparsity: float) -> dict[str, SparseTraining]:
    """Trainings whose second update changes no mask and whose third does, where any does."""
    often: dict[str, Any] = {"sparsity": sparsity, "steps": 9999, "every": 3}
    nm: dict[str, Any] = {"pattern": NM(2, 4), "steps": 9999}
    return {
        "random_pruning": RandomPruning(sparsity=sparsity, steps=9999),
        "set": SET(**often),
        "rigl": RigL(**often),
        "gmp": GMP(**often),
        "gmp_returning": GMP(**often, keep_removed=True),
        "granet": GraNet(**often),
        "sr_ste": SRSTE(**nm),
        "sr_ste_every_3": SRSTE(**nm, every=3),
        "ast": AST(**nm, every=3, distill=0.0),
        "ast_slorb": AST(**nm, every=3, slorb=16, distill=0.0),
        "cast": CAST(**nm, every=3, distill=0.0),
        "cast_taught": CAST(**nm, every=3),
        "gradient_flow": GradientFlow(**nm, dense=0.0),
    }


MASKED = ("random_pruning", "set", "rigl", "gmp", "gmp_returning", "granet")


class Bed:
    """A model, its optimizer, and one batch that every update takes."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model: Any = load_model(given.model).model.float().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.clock = time.process_time if given.cpu_time else time.perf_counter
        size = (given.batch, given.length)
        self.ids = torch.randint(3, self.model.config.vocab_size, size)

    def update(self, after: Callable[[], Any] = lambda: None) -> tuple[float, float]:
        """Seconds of an update with what follows it, and of that alone."""
        start = self.clock()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        between = self.clock()
        after()
        end = self.clock()
        self.optimizer.zero_grad()
        return end - start, end - between


def measured(method: SparseTraining, bed: Bed, found: dict[str, list[float]]) -> dict[str, int]:
    """Add the times of one round, and return the bytes held."""
    before = bed.update()[0]
    sparsifier = method.attach(bed.model, bed.optimizer)
    try:
        bed.update(sparsifier.step)
        whole, holding = bed.update(sparsifier.step)
        changing = bed.update(sparsifier.step)[0]
        for name, value in {
            "plain": before,
            "step": holding,
            "share": holding / before,
            "update": whole,
            "ratio": whole / before,
            "change": changing,
        }.items():
            found.setdefault(name, []).append(value)
        return {name: size for name, size in sparsifier.memory().items() if size}
    finally:
        sparsifier.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--method", nargs="+", default=list(methods(0.9)), choices=methods(0.9))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    bed = Bed(given)
    bed.update()
    times: dict[str, dict[str, list[float]]] = {name: {} for name in given.method}
    memory: dict[str, dict[str, int]] = {}
    for _ in range(given.rounds):
        for name in given.method:
            memory[name] = measured(methods(given.sparsity)[name], bed, times[name])
    weights = sum(p.numel() for p in bed.model.parameters())
    print(
        f"{given.model}: {weights:,} weights, {given.batch} x {given.length} tokens, "
        f"{given.threads} threads, {given.rounds} rounds; median (smallest)"
    )
    print(f"{'':15s} {'plain ms':>15s} {'step() ms':>15s} {'share':>15s} "
          f"{'update / plain':>15s} {'change ms':>15s}")  # fmt: skip
    for name in given.method:
        at = times[name]
        low = min(at["step"]) / min(at["plain"])
        whole = min(at["update"]) / min(at["plain"])
        print(
            f"{name:15s} {_ms(at['plain'])} {_ms(at['step'])} "
            f"{statistics.median(at['share']):7.2%} ({low:.2%}) "
            f"{statistics.median(at['ratio']):7.3f} ({whole:.3f}) {_ms(at['change'])}",
            flush=True,
        )
    holding = [name for name in given.method if name in MASKED]
    if holding:
        shares = [min(times[n]["step"]) / min(times[n]["plain"]) for n in holding]
        kept = "kept" if max(shares) <= 0.03 else "NOT kept"
        print(f"masks held: at most {max(shares):.2%} of a plain update; promised 3 %: {kept}")
    print("bytes beside model and optimizer:")
    for name in given.method:
        print(f"  {name}: " + ", ".join(f"{k} {v:,}" for k, v in memory[name].items()))
    if given.json is not None:
        given.json.write_text(json.dumps({"times": times, "memory": memory}, indent=1) + "\n")


def _ms(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):7.1f} ({1e3 * min(seconds):.1f})".rjust(15)


if __name__ == "__main__":
    main()
