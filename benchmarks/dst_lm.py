"""Dynamic sparse training of a small language model at 90 %, at equal training operations.

    python benchmarks/dst_lm.py main sweep width report --texts FILE [--out runs/dst_lm]
        [--device cuda --gpus 8 --per-gpu 6] [--seconds 400] [--scale 1.0]

A model of bytes with 3.1M parameters, from scratch, to 90 % of its blocks' matrices, 3 seeds; each
training costs as many operations as 500 dense updates, so sparse ones get more updates. ``main``:
dense, random static masks (ERK, uniform), SET, RigL, GraNet from half and from all weights, GMP.
``sweep``: RigL with other intervals, shares exchanged, shares of layers, learning rates, optimizer
state of grown weights, and three times as long. ``width``: dense and static masks of five sizes,
for equal updates: the gap that width closes. ``report`` prints the tables. Results lie as JSON in
``--out``; what is there is not computed again. Try it: ``--tiny --scale 0.02 --windows 8``.
``main --long`` needs no text: five methods for the claims' perceptron over eight letters (18
thousand weights, head dense), 900 letters for each weight at work, minutes of one core.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gossamer
from small_lm import SIZES, Job, arguments, fixed_share, read, run_all, steps_within

BUDGET = 500
SPARSITY = 0.9
SEEDS = (0, 1, 2)
MAIN = {
    "static ERK": "random_pruning:allocation=erk",
    "static uniform": "random_pruning:allocation=uniform",
    "SET": "set:allocation=erk:every={every}",
    "RigL": "rigl:allocation=erk:every={every}",
    "GraNet s2s": "granet:initial=0.5:every={every}",
    "GraNet d2s": "granet:initial=0:every={every}",
    "GMP": "gmp:every={every}",
    "GMP all layers": "gmp:pattern=model:every={every}",
}
LONG = 3000
LONG_NAMES = ("static ERK", "RigL", "SET", "GraNet s2s")
WIDTHS = ("0.4M", "0.9M", "1.8M", "3.1M", "7.4M")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A method in text form, and what is different beside it.

    Parameters
    ----------
    options : see ``small_lm.train``. lr : peak learning rate. budget : of dense updates, times
        that of the others.
    """

    text: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 2e-3
    budget: float = 1.0


def variants(every: Sequence[int]) -> dict[str, Variant]:
    """RigL's variants by name."""
    found: dict[str, Variant] = {}
    rigl = "rigl:allocation=erk:every={every}"
    for interval in every:
        for share in (0.1, 0.3):
            text = f"{rigl}:exchange={share}".format(every=interval)
            found[f"RigL every {interval} share {share}"] = Variant(text)
    middle = every[1]
    usual = rigl.format(every=middle)
    found["RigL second moments"] = Variant(usual, {"moments": True})
    found["RigL uniform"] = Variant(f"rigl:allocation=uniform:every={middle}")
    found["RigL until half"] = Variant(f"{usual}:until=0.5")
    found["SET zeros"] = Variant(f"set:allocation=erk:every={middle}:grown_std=0")
    found["GraNet s2s per layer"] = Variant(f"granet:initial=0.5:every={middle}:pattern=layer")
    for lr in (1e-3, 4e-3):
        found[f"RigL lr {lr:g}"] = Variant(usual, lr=lr)
        found[f"static ERK lr {lr:g}"] = Variant("random_pruning:allocation=erk", lr=lr)
    found["RigL 3 x as long"] = Variant(usual, budget=3.0)
    found["static ERK 3 x as long"] = Variant("random_pruning:allocation=erk", budget=3.0)
    return found


def intervals(given: argparse.Namespace) -> tuple[int, ...]:
    """Updates between changes, scaled with the training."""
    return tuple(max(1, round(n * given.scale)) for n in (50, 100, 200, 500))


def job(name: str, size: str, variant: Variant, seed: int, budget: float) -> Job:
    """A training of so many dense updates' operations."""
    _, fixed = fixed_share(size)
    text = f"{variant.text}:sparsity={SPARSITY}"
    steps = steps_within(gossamer.method(text), budget * variant.budget, fixed)
    return Job(name=f"{name}-{seed}", size=size, method=text, steps=steps, seed=seed,
               lr=variant.lr, options=variant.options)  # fmt: skip


def main_jobs(given: argparse.Namespace) -> list[Job]:
    """Every method at equal operations, and dense for as many and for ten times as many."""
    size = "test" if given.tiny else "letters" if given.long else "3.1M"
    budget, every = (LONG if given.long else BUDGET) * given.scale, intervals(given)[1]
    jobs: list[Job] = []
    for seed in SEEDS:
        dense = {"size": size, "method": "dense", "seed": seed}
        jobs.append(Job(name=f"main-dense-{seed}", steps=round(budget), **dense))
        for name, text in MAIN.items():
            if name in LONG_NAMES or not given.long:
                variant = Variant(text.format(every=every))
                jobs.append(job(f"main-{name}", size, variant, seed, budget))
    if given.long:
        return [replace(one, lr=5e-3) for one in jobs]
    # What equal updates would give: the ceiling, far dearer.
    longest = max(one.steps for one in jobs)
    jobs.append(Job(name="main-dense as long-0", size=size, method="dense", steps=longest))
    return jobs


def sweep_jobs(given: argparse.Namespace) -> list[Job]:
    """RigL's variants at the same cost."""
    size = "test" if given.tiny else "3.1M"
    found = variants(intervals(given))
    return [
        job(f"sweep-{name}", size, variant, seed, BUDGET * given.scale)
        for seed in SEEDS[:2]
        for name, variant in found.items()
        if variant.budget == 1.0 or seed == 0
    ]


def width_jobs(given: argparse.Namespace) -> list[Job]:
    """Dense and static masks for equal updates, by size."""
    steps = round(2000 * given.scale)
    texts = {
        "dense": "dense",
        "erk": f"random_pruning:allocation=erk:sparsity={SPARSITY}",
        "uniform": f"random_pruning:allocation=uniform:sparsity={SPARSITY}",
    }
    return [
        Job(name=f"width-{name}-{size}-{seed}", size=size, method=text, steps=steps, seed=seed)
        for seed in SEEDS[:2]
        for size in (("test",) if given.tiny else WIDTHS)
        for name, text in texts.items()
    ]


def grouped(rows: Sequence[Row], prefix: str) -> dict[str, list[Row]]:
    """Runs of the seeds by name."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["name"].startswith(prefix):
            groups.setdefault(row["name"].rpartition("-")[0].removeprefix(prefix), []).append(row)
    return groups


def spread(values: Sequence[float]) -> float:
    """Standard deviation, NaN of one."""
    return stdev(values) if len(values) > 1 else math.nan


def show(groups: Mapping[str, Sequence[Row]], title: str, static: Sequence[Row]) -> None:
    """Loss by method, and its difference from the static ERK mask at equal seeds."""
    if not groups:
        return
    base = {r["seed"]: r["loss"] for r in static}
    print(f"\n{title}")
    print(f"{'method':28s} {'loss':>8s} {'sd':>7s} {'from static ERK':>17s} {'updates':>8s} "
          f"{'dense updates':>13s} {'sparsity':>8s} {'seeds':>5s}")  # fmt: skip
    for name, runs in sorted(groups.items(), key=lambda item: mean(r["loss"] for r in item[1])):
        losses = [r["loss"] for r in runs]
        gaps = [r["loss"] - base[r["seed"]] for r in runs if r["seed"] in base]
        gap = f"{mean(gaps):+.4f} +- {spread(gaps):.4f}" if gaps else ""
        print(
            f"{name:28s} {mean(losses):8.4f} {spread(losses):7.4f} {gap:>17s} "
            f"{runs[0]['steps']:8d} {mean(r['dense_updates'] for r in runs):13.0f} "
            f"{runs[0]['sparsity']:8.2%} {len(runs):5d}"
        )


def show_width(groups: Mapping[str, Sequence[Row]]) -> None:
    """The gap of static masks to dense by size."""
    sizes = [size for size in SIZES if f"dense-{size}" in groups]
    if not sizes:
        return
    print(f"\nStatic masks at {SPARSITY:.0%}, equal updates: loss above dense, by size")
    print(f"{'parameters':>10s} {'layers':>6s} {'width':>5s} {'dense':>8s} {'ERK':>8s} "
          f"{'uniform':>8s}  (seeds)")  # fmt: skip
    for size in sizes:
        dense = mean(r["loss"] for r in groups[f"dense-{size}"])
        gaps = []
        for name in ("erk", "uniform"):
            runs = groups.get(f"{name}-{size}", ())
            gaps.append(f"{mean(r['loss'] for r in runs) - dense:+8.4f}" if runs else " " * 8)
        layers, width = SIZES[size]
        print(f"{size:>10s} {layers:6d} {width:5d} {dense:8.4f} {' '.join(gaps)}  "
              f"({len(groups[f'dense-{size}'])})")  # fmt: skip


def main() -> None:
    parser = arguments((__doc__ or "").partition("\n")[0], ("main", "sweep", "width", "report"))
    parser.set_defaults(out=Path("runs/dst_lm"))
    given = parser.parse_args()
    jobs: list[Job] = []
    for name, make in (("main", main_jobs), ("sweep", sweep_jobs), ("width", width_jobs)):
        if name in given.command:
            jobs += make(given)
    if jobs:
        run_all(jobs, given)
    if "report" in given.command:
        rows = read(given.out)
        groups = grouped(rows, "main-")
        static = groups.get("static ERK", [])
        show(groups, f"{SPARSITY:.0%} sparsity, operations of so many dense updates", static)
        show(grouped(rows, "sweep-"), "Variants at the same cost", static)
        show_width(grouped(rows, "width-"))


if __name__ == "__main__":
    main()
