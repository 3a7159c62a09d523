"""Continued N:M training at equal tokens: held-out loss of each method, beside dense and random.

    python benchmarks/nm_training.py [MODEL] [--texts FILE] [--heldout FILE ...] [--method NAME ...]
        [--minutes 5 | --steps N] [--batch 8] [--length 256] [--lr 3e-4] [--pull 1e-4]
        [--windows 64] [--seed 0] [--device cuda] [--threads 1] [--json FILE]

One-shot SparseGPT, one-shot magnitude and a random mask trained under fixed masks, SR-STE, AST, AST
with SLoRB, CAST, progressive gradient flow, and the dense model, as it is and trained on. All see
the same batches in the same order; ``--minutes`` is the time for everything, from which the number
of updates follows after two updates of CAST, the costliest, were timed. ``--pull`` is CAST's: the
paper's 4e-7 is for batches of 4M tokens. Printed: held-out loss of each file (choose settings by
one, report another), the gap to the dense model, the sparsity, operations over a dense
training's, seconds, and peak memory on a GPU.
"""

import argparse
import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gossamer.kernels  # noqa: F401 - registers the N:M kernel
from gossamer.core import NM
from gossamer.evaluate import score
from gossamer.methods.training.ast import AST
from gossamer.methods.training.base import SparseTraining
from gossamer.methods.training.cast import CAST
from gossamer.methods.training.gradient_flow import GradientFlow
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.sr_ste import SRSTE
from gossamer.methods.weights.sparsegpt import SparseGPT
from gossamer.models import Tokens, halves, load_model, read_documents
from gossamer.models.fit import FitPlan, fit

NAMES = (
    "dense", "dense_trained", "sparsegpt", "magnitude", "random",
    "sr_ste", "ast", "ast_slorb", "cast", "gradient_flow",
)  # fmt: skip


def methods(steps: int, given: argparse.Namespace) -> dict[str, SparseTraining]:
    """The trainings by name."""
    shared: dict[str, Any] = {
        "pattern": NM(2, 4), "steps": steps, "lr": given.lr, "batch_size": given.batch,
        "seed": given.seed,
    }  # fmt: skip
    return {
        "magnitude": SRSTE(**shared, pull=0.0, every=steps + 1),
        "random": RandomPruning(**shared),
        "sr_ste": SRSTE(**shared),
        "ast": AST(**shared),
        "ast_slorb": AST(**shared, slorb=16),
        "cast": CAST(**shared, pull=given.pull),
        "gradient_flow": GradientFlow(**shared),
    }


def run(name: str, model: nn.Module, train: Tokens, steps: int, given: argparse.Namespace) -> Any:
    """Bring a model to the end of one method; what it reports."""
    if name == "dense_trained":
        plan = FitPlan(steps=steps, lr=given.lr, batch_size=given.batch, seed=given.seed, decay=1.0)
        fit(model, train, plan)
    elif name == "sparsegpt":
        return SparseGPT(pattern=NM(2, 4)).apply(model, train.slice(min(128, len(train))))
    elif name != "dense":
        return methods(steps, given)[name].apply(model, train, undo=False)
    return None


def measured(
    name: str,
    start: nn.Module,
    train: Tokens,
    tests: list[Tokens],
    steps: int,
    given: argparse.Namespace,
) -> dict[str, Any]:
    """Figures of one method on a copy of the model."""
    model = deepcopy(start)
    on_gpu = given.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work = run(name, model, train, steps, given)
    spent = time.perf_counter() - began
    flops = getattr(work, "flops", None)
    return {
        "method": name,
        "loss": [score(model, test, batch_size=given.batch).loss for test in tests],
        "sparsity": 0.0 if work is None else work.report().sparsity,
        "flops": None if flops is None else flops.share,
        "seconds": spent,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "warnings": [] if work is None else list(work.report().warnings),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--texts")
    parser.add_argument("--heldout", nargs="+")
    parser.add_argument("--method", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--pull", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_model(given.model, dtype="float32", device=given.device)
    documents = read_documents(given.texts, "calibration")
    if given.texts is None or given.heldout is not None:
        held = [read_documents(file, "heldout") for file in given.heldout or (None,)]
    else:
        documents, other = halves(documents)
        held = [other]
    cut = {"length": given.length}
    train = Tokens.from_documents(documents, loaded.tokenizer, **cut)
    tests = [
        Tokens.from_documents(one, loaded.tokenizer, **cut).slice(given.windows) for one in held
    ]
    steps = given.steps
    if steps is None:
        began = time.perf_counter()
        methods(2, given)["cast"].apply(deepcopy(loaded.model), train, undo=False)
        each = (time.perf_counter() - began) / 2
        steps = max(2, int(given.minutes * 60 / each / len(given.method)))
    tokens = steps * given.batch * given.length
    print(f"{given.model}: 2:4, {steps} updates, {tokens:,} tokens each, {given.threads} threads")
    heads = " ".join(["    loss"] * len(tests) + ["     gap"] * len(tests))
    print(f"{'method':14s} {heads} {'sparsity':>9s} {'ops':>7s} {'s':>7s} {'GiB':>6s}")
    dense = [score(loaded.model, test, batch_size=given.batch).loss for test in tests]
    rows: list[dict[str, Any]] = []
    for name in given.method:
        row = measured(name, loaded.model, train, tests, steps, given)
        row["gap"] = [found - own for found, own in zip(row["loss"], dense, strict=True)]
        rows.append(row)
        share = "" if row["flops"] is None else f"{row['flops']:.1%}"
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        print(
            f"{name:14s} {' '.join(f'{x:8.4f}' for x in row['loss'])} "
            f"{' '.join(f'{x:+8.4f}' for x in row['gap'])} {row['sparsity']:9.2%} {share:>7s} "
            f"{row['seconds']:7.1f} {peak:>6s}  {'; '.join(row['warnings'])}",
            flush=True,
        )
    if given.json is not None:
        given.json.write_text(
            json.dumps({"steps": steps, "tokens": tokens, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
