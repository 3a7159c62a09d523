"""What activation sparsity costs: every method on the same masked tokens, by bytes not read.

Thresholds come from calibration text, losses from other text, all tokens but the first of every
window are masked. One comparison per calibration seed lies under --out, each a folder that
``gossamer report`` turns into a page; the table printed here has, for every method, the share of
the blocks' weight bytes that a token need not read when perplexity has grown by 1 % (PPL-1%, on a
straight line between the measured points), and the perplexity at each sparsity. A method counts
against itself what it reads besides: low-rank factors, changes of basis, the gate matrix.

    python benchmarks/activation_quality.py MODEL --out OUT [--data TEXT --calibration TEXT]
        [--seeds 3] [--windows 16] [--samples 16] [--length 512] [--threads 1] [--jobs 1]
        [--device cuda]
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from gossamer import compare
from gossamer.models import find_sites, load_model

INPUTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
NEURONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
METHODS: dict[str, Sequence[float]] = {
    "teal": INPUTS,
    "teal:allocation=greedy": INPUTS,
    "teal:allocation=global": INPUTS,
    "wina": INPUTS,
    "wina:policy=quantile": INPUTS,
    "wina:transform=true": INPUTS,
    "r_sparse": INPUTS,
    "cats": NEURONS,
    "chess": NEURONS,
    "chess:attention=false": NEURONS,
    "invariant": NEURONS,
    "cett": NEURONS,
}


def block_bytes(model: Any) -> int:
    """Weight bytes in the linear layers of all blocks."""
    return sum(s.size * s.weight(model).element_size() for s in find_sites(model).sites)


def spared(row: dict[str, Any], blocks: int) -> float:
    """Share of the blocks' weight bytes that a token need not read."""
    return (row["bytes_moved"] - row["bytes_moved_limit"]) / blocks


def at_growth(points: list[tuple[float, float]], dense: float, percent: float) -> float:
    """Share spared where the loss first passes that of ``percent`` more perplexity."""
    wanted = dense + log(1 + percent / 100)
    last = (0.0, dense)
    for point in sorted(points):
        if point[1] > wanted:
            return last[0] + (point[0] - last[0]) * (wanted - last[1]) / (point[1] - last[1])
        last = point
    return last[0]


def spread(values: list[float]) -> float:
    """Standard deviation, 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    """Run the comparisons that are not there yet and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="nano, a folder or a hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", help="text to evaluate on")
    parser.add_argument("--calibration", help="text to calibrate on")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in (
        ("windows", 16),
        ("samples", 16),
        ("length", 512),
        ("threads", 1),
        ("jobs", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--percent", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    cells = [f"{name}:sparsity={s}" for name in given.methods for s in METHODS.get(name, INPUTS)]
    blocks = block_bytes(load_model(given.model, device=given.device).model)
    found: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    headline: dict[str, list[float]] = defaultdict(list)
    dense = 0.0
    for seed in range(given.seeds):
        rows = compare(
            given.model,
            cells,
            out=given.out / f"seed-{seed}",
            data=given.data,
            calibration=given.calibration,
            samples=given.samples,
            length=given.length,
            windows=given.windows,
            seed=seed,
            device=given.device,
            threads=given.threads,
            jobs=given.jobs,
            timed=False,
            on_row=lambda row, done, total: print(f"\r{done}/{total}", end="", flush=True),
        )
        dense = rows[0]["loss"]
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            if row["method"] in given.methods:
                found[row["method"]][row["sparsity"]].append(row)
                loss = float("inf") if row["loss"] is None else row["loss"]
                points[row["method"]].append((spared(row, blocks), loss))
        for name, own in points.items():
            headline[name].append(at_growth(own, dense, given.percent))
    print(f"\ndense perplexity {exp(dense):.3f}; bytes spared at +{given.percent:g} % perplexity:")
    for name in sorted(headline, key=lambda n: -mean(headline[n])):
        values = headline[name]
        print(f"| {name} | {mean(values):.1%} ± {spread(values):.1%} |", end=" ")
        for own in found[name].values():
            ppl = [exp(row["loss"]) for row in own if row["loss"] is not None]
            print(f"{mean(spared(r, blocks) for r in own):.1%}: {mean(ppl):.2f}", end="; ")
        print()
    summary = {"dense": dense, "percent": given.percent, "spared": dict(headline)}
    (given.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
