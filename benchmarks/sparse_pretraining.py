"""Sparse pre-training from scratch: which window is best, and which size predicts the loss.

    python benchmarks/sparse_pretraining.py windows law report --texts FILE [--out runs/small_lm]
        [--device cuda --gpus 8 --per-gpu 6] [--seconds 400] [--scale 1.0] [--plot law.svg]

``windows``: a model of bytes with 0.9M parameters to 50 % sparsity, over eleven windows, the linear
curve, a random static mask and a dense training, 3 seeds, all for as many operations as 4000 dense
updates. ``law``: dense trainings of six sizes (0.4M to 7.4M) and four lengths, and sparse ones of
four sizes to 50 and 80 %. ``report`` prints the tables of what is there: the law fitted to dense
runs alone and its error on sparse ones by average, final and initial size; and laws of all runs,
each measured on runs left out. Results lie as JSON in ``--out``, a file for each training; what is
there is not computed again. Try it: ``--tiny --scale 0.01 --windows 8``. ``windows --long`` needs
no text: seven windows for the claims' perceptron over eight letters (18 thousand weights, head
dense), 83 letters a weight, minutes of one core.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gossamer
from gossamer.core import GossamerError
from gossamer.methods.training.scaling.law import fit_scaling_law
from gossamer.report.svg import Frame, svg, tag
from small_lm import Job, arguments, fixed_share, read, run_all

BUDGET = 4000
SIZE = "0.9M"
SEEDS = (0, 1, 2)
LAW_SIZES = ("0.4M", "0.9M", "1.8M", "3.1M", "4.7M", "7.4M")
LONG = 6000
FEW = ("0-0", "0-0.25", "0-0.5", "0.25-0.75", "0.5-0.5", "0.5-1", "0.75-1")
WINDOWS = (
    "0-0", "0-0.25", "0-0.5", "0-1", "0.25-0.25", "0.25-0.5", "0.25-0.75", "0.5-0.5", "0.5-0.75",
    "0.5-1", "0.75-1",
)  # fmt: skip
KINDS = {"average": "average over tokens", "final": "final", "parameters": "initial"}
Row = Mapping[str, Any]


def windows(given: argparse.Namespace) -> list[Job]:
    """Equal operations for every window."""
    size = "test" if given.tiny else "letters" if given.long else SIZE
    budget = (LONG if given.long else BUDGET) * given.scale
    shared: dict[str, Any] = {"size": size}
    if given.long:
        shared["lr"] = 5e-3
    names = FEW if given.long else WINDOWS
    _, fixed = fixed_share(size)
    jobs: list[Job] = []
    for seed in SEEDS:
        every = max(1, round(50 * given.scale))
        variants = [("0.25-0.75", "cubic"), *((name, "cubic") for name in names)]
        variants += [] if given.long else [("0.25-0.75", "linear")]
        for window, curve in dict.fromkeys(variants):
            text = f"sparse_pretraining:sparsity=0.5:window={window}:curve={curve}:every={every}"
            # Twice: the share of so few updates depends on how many they are.
            steps = round(budget)
            for _ in range(2):
                steps = round(budget / gossamer.method(text, steps=steps, fixed=fixed).share)
            name = f"window-{window}-{curve}-{seed}"
            jobs.append(Job(name=name, method=text, steps=steps, seed=seed, **shared))
        text = "random_pruning:sparsity=0.5:allocation=uniform"
        steps = round(budget / (fixed + (1 - fixed) * 0.5))
        jobs.append(
            Job(name=f"window-random-{seed}", method=text, steps=steps, seed=seed, **shared)
        )
        dense = Job(
            name=f"window-dense-{seed}", method="dense", steps=round(budget), seed=seed, **shared
        )
        jobs.append(dense)
    return jobs


def law(given: argparse.Namespace) -> list[Job]:
    """Dense runs to fit to, sparse ones to predict; the longest, which end last, come first."""
    sizes = ["test"] if given.tiny else list(LAW_SIZES)
    lengths = [round(n * given.scale) for n in (1500, 3000, 750, 6000)]
    dense = [
        Job(name=f"law-dense-{size}-{steps}", size=size, method="dense", steps=steps)
        for steps in lengths
        for size in sizes
    ]
    sparse = [
        Job(
            name=f"law-{sparsity}-{size}-{steps}",
            size=size,
            method=f"sparse_pretraining:sparsity={sparsity}:every={max(1, steps // 100)}",
            steps=steps,
        )
        for steps in sorted(set(lengths) - {min(lengths)} or lengths)
        for sparsity in (0.5, 0.8)
        for size in (sizes if given.tiny else sizes[2:])
    ]
    return sorted([*dense, *sparse], key=lambda job: -job.steps)


def show_windows(rows: Sequence[Row]) -> None:
    """Loss by window, and how far 25-75 is from the best."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["name"].startswith("window-"):
            groups.setdefault(row["name"].rpartition("-")[0].removeprefix("window-"), []).append(
                row
            )
    if not groups:
        return
    first = next(iter(groups.values()))[0]
    print(f"\n{first['size']}: 50 % sparsity, equal operations; loss in nats per byte")
    print(f"{'window':18s} {'loss':>8s} {'sd':>7s} {'seeds':>5s} {'updates':>8s} {'average':>9s} "
          f"{'operations':>10s}")  # fmt: skip
    spread = {}
    for name, runs in sorted(groups.items(), key=lambda item: mean(r["loss"] for r in item[1])):
        losses = [r["loss"] for r in runs]
        spread[name] = (mean(losses), stdev(losses) if len(losses) > 1 else math.nan)
        print(
            f"{name:18s} {spread[name][0]:8.4f} {spread[name][1]:7.4f} {len(runs):5d} "
            f"{runs[0]['steps']:8d} {mean(r['average'] for r in runs) / 1e6:8.3f}M "
            f"{mean(r['dense_updates'] for r in runs):10.0f}"
        )
    ours = "0.25-0.75-cubic"
    sparse = {k: v for k, v in spread.items() if k.endswith("cubic")}
    if ours in sparse:
        best = min(sparse, key=lambda k: sparse[k][0])
        gap = sparse[ours][0] - sparse[best][0]
        noise = max(sparse[ours][1], sparse[best][1])
        paired = paired_gap(groups[ours], groups[best])
        print(
            f"25-75 % is {gap:+.4f} from the best of {len(sparse)} ({best}); spread of the seeds "
            f"{noise:.4f}{paired}: {'within' if gap <= noise else 'NOT within'} the spread"
        )


def paired_gap(ours: Sequence[Row], best: Sequence[Row]) -> str:
    """Mean and standard error of the difference at equal seeds."""
    other = {r["seed"]: r["loss"] for r in best}
    gaps = [r["loss"] - other[r["seed"]] for r in ours if r["seed"] in other]
    if len(gaps) < 2:
        return ""
    return f", paired {mean(gaps):+.4f} +- {stdev(gaps) / math.sqrt(len(gaps)):.4f}"


def columns(rows: Sequence[Row], kind: str) -> tuple[list[float], list[float], list[float]]:
    """Sizes of one kind, tokens and losses."""
    return (
        [float(r[kind]) for r in rows],
        [float(r["tokens"]) for r in rows],
        [float(r["loss"]) for r in rows],
    )


def show_law(rows: Sequence[Row], plot: Path | None) -> None:
    """The law of dense runs on sparse ones, and laws of all on those left out."""
    rows = [r for r in rows if r["name"].startswith(("law-", "window-"))]
    # A random mask is no pre-training towards sparsity; its average is its final size.
    rows = [r for r in rows if not r["method"].startswith("random")]
    dense = [r for r in rows if r["method"] == "dense"]
    sparse = [r for r in rows if r["method"] != "dense"]
    if not dense or not sparse:
        return
    try:
        fitted = fit_scaling_law(*columns(dense, "parameters"))
    except GossamerError as error:
        print(f"\nno law: {error}")
        return
    print(f"\nDense runs alone ({len(dense)}); N without embeddings and positions, D in bytes")
    print(fitted)
    groups = {"all sparse runs": sparse}
    for percent in sorted({round(100 * r["sparsity"]) for r in sparse}):
        alike = [r for r in sparse if round(100 * r["sparsity"]) == percent]
        groups[f"law runs, {percent} %"] = [r for r in alike if r["name"].startswith("law-")]
        groups[f"windows, {percent} %"] = [r for r in alike if r["name"].startswith("window-")]
    print("\nMean |error| of the dense law on sparse runs, nats per byte (bias), by what N is")
    print(f"{'':22s} {'runs':>4s} " + " ".join(f"{name:>22s}" for name in KINDS.values()))
    for name, runs in groups.items():
        if not runs:
            continue
        cells = []
        for kind in KINDS:
            n, d, measured = columns(runs, kind)
            off = [float(p) - m for p, m in zip(fitted.law.loss(n, d), measured, strict=True)]
            cells.append(f"{mean(map(abs, off)):.4f} ({mean(off):+.4f})")
        print(f"{name:22s} {len(runs):4d} " + " ".join(f"{cell:>22s}" for cell in cells))
    print("\nLaws of all runs, each fitted to three quarters and measured on the rest, in turn")
    settings = sorted({(r["size"], r["method"], r["steps"]) for r in rows})
    part = {setting: index % 4 for index, setting in enumerate(settings)}
    for kind, name in KINDS.items():
        off = {"dense": [0.0][:0], "sparse": [0.0][:0]}
        for fold in range(4):
            of = [part[r["size"], r["method"], r["steps"]] for r in rows]
            inside = [r for r, p in zip(rows, of, strict=True) if p != fold]
            outside = [r for r, p in zip(rows, of, strict=True) if p == fold]
            try:
                one = fit_scaling_law(*columns(inside, kind), draws=0).law
            except GossamerError as error:
                print(f"  {name}: {error}")
                break
            n, d, measured = columns(outside, kind)
            for row, p, m in zip(outside, one.loss(n, d), measured, strict=True):
                off["dense" if row["method"] == "dense" else "sparse"].append(abs(float(p) - m))
        said = ", ".join(f"{mean(v):.4f} on {len(v)} {k} runs" for k, v in off.items() if v)
        print(f"  N {name:20s} mean |error| {said}")
    if plot is not None:
        plot.write_text(drawing(fitted.law, dense, sparse))
        print(f"\n{plot} shows them")


def drawing(fitted: Any, dense: Sequence[Row], sparse: Sequence[Row]) -> str:
    """Measured loss against the dense law's, by what N is."""
    frame = Frame(560, 480, right=24)
    points = [("dense", "parameters", "#888888", r) for r in dense]
    colours = {"average": "#0072b2", "final": "#d55e00", "parameters": "#009e73"}
    points += [(KINDS[kind], kind, colours[kind], r) for kind in KINDS for r in sparse]
    found = [
        (name, colour, float(fitted.loss(r[kind], r["tokens"])), float(r["loss"]))
        for name, kind, colour, r in points
    ]
    values = [v for _, _, x, y in found for v in (x, y)]
    low, high = min(values) - 0.01, max(values) + 0.01

    def place(value: float, start: float, end: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    def x(value: float) -> float:
        return place(value, frame.left, frame.x1)

    def y(value: float) -> float:
        return place(value, frame.y1, frame.top)

    text = {"font_family": "sans-serif", "font_size": 12}
    parts = [tag("rect", x=0, y=0, width=frame.width, height=frame.height, fill="white")]
    parts.append(tag("line", x1=x(low), y1=y(low), x2=x(high), y2=y(high), stroke="#cccccc"))
    for i in range(5):
        at = low + (high - low) * i / 4
        parts.append(
            tag("text", f"{at:.2f}", x=x(at), y=frame.y1 + 18, text_anchor="middle", **text)
        )
        parts.append(
            tag("text", f"{at:.2f}", x=frame.left - 6, y=y(at) + 4, text_anchor="end", **text)
        )
    middle = (frame.left + frame.x1) / 2
    said = "loss the law of the dense runs predicts, nats per byte"
    parts.append(tag("text", said, x=middle, y=frame.height - 8, text_anchor="middle", **text))
    parts.append(tag("text", "measured", x=frame.left, y=14, text_anchor="middle", **text))
    parts += [
        tag("circle", cx=x(a), cy=y(b), r=3.0, fill=colour, fill_opacity="0.75")
        for _, colour, a, b in found
    ]
    legend = {"dense": "#888888"} | {KINDS[k]: c for k, c in colours.items()}
    for i, (name, colour) in enumerate(legend.items()):
        up = frame.top + 14 + 18 * i
        parts.append(tag("circle", cx=frame.left + 14, cy=up - 4, r=4.0, fill=colour))
        label = name if name == "dense" else f"sparse, N {name}"
        parts.append(tag("text", label, x=frame.left + 24, y=up, **text))
    drawn = svg(frame, "Measured loss against the loss predicted", parts)
    return str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def main() -> None:
    parser = arguments((__doc__ or "").partition("\n")[0], ("windows", "law", "report"))
    given = parser.parse_args()
    jobs: list[Job] = []
    if "law" in given.command:
        jobs += law(given)
    if "windows" in given.command:
        # Behind the law's longest trainings, before its others.
        first = sum(job.steps == jobs[0].steps for job in jobs) if jobs else 0
        jobs[first:first] = windows(given)
    if jobs:
        run_all(jobs, given)
    if "report" in given.command:
        rows = read(given.out)
        show_windows(rows)
        show_law(rows, given.plot)


if __name__ == "__main__":
    main()
