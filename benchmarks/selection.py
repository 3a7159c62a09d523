"""How long selection takes beside the operations it cannot do without.

    python benchmarks/selection.py [--threads 1 2] [--rounds 7] [--json FILE]

Two figures are promised (a 4096 x 11008 layer of float32 scores, threads stated):

- selecting 50 % per row takes at most 1.5 times one ``torch.topk`` or ``torch.kthvalue`` over
  the same data;
- selecting 2:4 takes less than 2 times one elementwise pass, ``score > 0``: read a float32,
  write a bool.

Every round runs every operation once, in turn, so that a busy machine slows all of them alike;
a ratio is the median of the rounds' ratios. Correctness is asserted before anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gossamer.kernels
from gossamer.core import NM, Budget, Unstructured
from gossamer.kernels.nm_select.op import backend_for, instruction_set

ROWS, COLUMNS = 4096, 11008
KEEP = COLUMNS // 2

Times = dict[str, list[float]]


def operations(score: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name; yardsticks first."""
    row, layer, groups = Unstructured("row"), Unstructured("layer"), score.view(-1, 4)
    half, eighth = Budget(sparsity=0.5), Budget(sparsity=0.5)
    return {
        "torch.topk(sorted=False)": lambda: score.topk(KEEP, dim=1, sorted=False),
        "torch.topk": lambda: score.topk(KEEP, dim=1),
        "torch.kthvalue": lambda: score.kthvalue(KEEP, dim=1),
        "select 50 % per row": lambda: row.select(score, half),
        "torch.kthvalue, whole layer": lambda: score.view(-1).kthvalue(score.numel() // 2),
        "select 50 % per layer": lambda: layer.select(score, half),
        "score > 0": lambda: score > 0,
        "score.abs()": lambda: score.abs(),
        "select 2:4": lambda: NM(2, 4).select(score),
        "select 2:4, reference": lambda: gossamer.kernels.nm_mask(groups, 2, "reference"),
        "select 4:8": lambda: NM(4, 8).select(score, eighth),
    }


RATIOS = (
    ("select 50 % per row", "torch.topk(sorted=False)", 1.5),
    ("select 50 % per row", "torch.topk", 1.5),
    ("select 50 % per row", "torch.kthvalue", 1.5),
    ("select 50 % per layer", "torch.kthvalue, whole layer", 1.5),
    ("select 2:4", "score > 0", 2.0),
    ("select 2:4", "score.abs()", 2.0),
)


def check(score: Tensor) -> None:
    """The results that are about to be timed are right."""
    order = torch.argsort(score[:64], dim=1, descending=True, stable=True)[:, :KEEP]
    expected = torch.zeros(64, COLUMNS, dtype=torch.bool).scatter_(1, order, True)
    got = Unstructured("row").select(score, Budget(sparsity=0.5))
    assert torch.equal(got.mask()[:64], expected)
    assert got.kept == ROWS * KEEP
    groups = score[:64].reshape(-1, 4)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)[:, :2]
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(NM(2, 4).select(score).mask()[:64].reshape(-1, 4), expected)


def measure(score: Tensor, rounds: int) -> Times:
    """Seconds of every operation in every round, after one round of warm-up."""
    ops = operations(score)
    times: Times = {name: [] for name in ops}
    for turn in range(rounds + 1):
        for name, run in ops.items():
            begin = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def show(times: Times, threads: int) -> dict[str, object]:
    """Print one table and return it as plain values."""
    print(f"\n{ROWS} x {COLUMNS} float32, {threads} thread{'s' if threads > 1 else ''}")
    print(f"  {'':<30}{'median ms':>11}{'lowest':>9}{'highest':>9}")
    for name, seconds in times.items():
        values = (statistics.median(seconds), min(seconds), max(seconds))
        print(f"  {name:<30}" + "{:>11.1f}{:>9.1f}{:>9.1f}".format(*(1e3 * v for v in values)))
    ratios: dict[str, float] = {}
    for ours, theirs, limit in RATIOS:
        shares = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
        ratio = statistics.median(shares)
        ratios[f"{ours} / {theirs}"] = ratio
        verdict = "holds" if ratio <= limit else "MISSED"
        print(f"  {ours} / {theirs}: {ratio:.2f} (at most {limit}: {verdict})")
    moved = ROWS * COLUMNS * 5 / min(times["select 2:4"]) / 1e9
    copied = ROWS * COLUMNS * 5 / min(times["score > 0"]) / 1e9
    print(f"  2:4 moves {moved:.1f} GB/s at best; score > 0 moves {copied:.1f} GB/s")
    return {"threads": threads, "seconds": times, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    score = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).abs()
    check(score)
    backend = backend_for(score)
    with_what = instruction_set() if backend == "cpu" else "torch operations"
    print(f"torch {torch.__version__}; N:M selection runs on: {backend}, {with_what}")
    tables: list[dict[str, object]] = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        tables.append(show(measure(score, given.rounds), threads))
    if given.json:
        given.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
