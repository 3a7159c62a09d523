"""From which size on a Monarch product is faster than a dense one.

    python benchmarks/monarch.py [--device cuda] [--threads 2] [--sizes 1024 4096]
        [--batches 1 4096] [--nblocks 4 16 32] [--dtype bfloat16] [--rounds 7]
        [--seconds 50] [--json FILE]

On a GPU: n x n layers in bfloat16, forward only; at n >= 4096, batch >= 4096 and nblocks >= 16
(n²/8 parameters or fewer) at least 1.5 times nn.Linear is promised. On a CPU: float32, no promise.
Every round runs dense and Monarch in turn; a speed is the median of the rounds' ratios. Results
are checked against the multiplied-out matrix before anything is timed. Settings that would start
after ``--seconds`` are left out and named. The last lines say, for every batch and nblocks, the
smallest n from which on Monarch is faster.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from gossamer.methods.weights.structured.monarch import MonarchLinear

PROMISE = 1.5


def timer(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """Seconds of a call, over several calls."""

    def cpu(run: Callable[[], object], calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls

    def cuda(run: Callable[[], object], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return cuda if device.type == "cuda" else cpu


def check(layer: MonarchLinear, x: torch.Tensor) -> None:
    """The product about to be timed is right."""
    some = x[:8]
    expected = some.double() @ layer.dense().double().T
    error = (layer(some).double() - expected).norm() / expected.norm()
    assert float(error) < (2e-2 if x.dtype == torch.bfloat16 else 1e-4), float(error)


@torch.no_grad()
def measure(
    n: int, batch: int, blocks: list[int], place: dict[str, object], rounds: int
) -> dict[int, tuple[float, float, float]]:
    """By nblocks (0 for dense): median seconds, median speed over dense, sparsity."""
    x = torch.randn(batch, n, **place)
    layers: dict[int, nn.Module] = {0: nn.Linear(n, n, bias=False, **place)}
    for nblocks in blocks:
        made = MonarchLinear(n, n, False, nblocks=nblocks, **place)
        check(made, x)
        layers[nblocks] = made
    seconds = timer(x.device)
    runs = {name: (lambda m=layer: m(x)) for name, layer in layers.items()}
    # About 10 ms a measurement, by a first look at the dense product.
    for run in runs.values():
        seconds(run, 2)
    calls = max(1, min(200, int(0.01 / max(1e-6, seconds(runs[0], 2)))))
    times: dict[int, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, calls))
    return {
        name: (
            statistics.median(found),
            statistics.median(d / s for d, s in zip(times[0], found, strict=True)),
            0.0 if name == 0 else layers[name].shape.sparsity,  # type: ignore[union-attr]
        )
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--nblocks", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--dtype")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    gpu = given.device.startswith("cuda")
    sizes = given.sizes or (
        [1024, 2048, 4096, 8192, 16384] if gpu else [256, 512, 1024, 2048, 4096]
    )
    batches = given.batches or ([16, 512, 4096, 16384] if gpu else [1, 16, 256])
    name = given.dtype or ("bfloat16" if gpu else "float32")
    place = {"device": torch.device(given.device), "dtype": getattr(torch, name)}
    what = torch.cuda.get_device_name() if gpu else f"{given.threads} threads"
    load = "" if gpu else f", load average {os.getloadavg()[0]:.2f}"
    print(f"torch {torch.__version__}, {given.device} ({what}), {name}{load}")
    print(
        "     n  batch  dense ms | "
        + " | ".join(f"nblocks {b:>3}: ms, speed" for b in given.nblocks)
    )
    rows: list[dict[str, object]] = []
    left_out: list[str] = []
    begin = time.perf_counter()
    for n, batch in itertools.product(sizes, batches):
        if time.perf_counter() - begin > given.seconds:
            left_out.append(f"{n} x {batch}")
            continue
        found = measure(n, batch, given.nblocks, place, given.rounds)
        cells = [f"{1e3 * found[b][0]:>13.3f} {found[b][1]:>5.2f}x  " for b in given.nblocks]
        print(f"{n:>6} {batch:>6} {1e3 * found[0][0]:>9.3f} | " + " | ".join(cells), flush=True)
        for nblocks, (seconds, speed, sparsity) in found.items():
            setting = {"n": n, "batch": batch, "nblocks": nblocks, "sparsity": sparsity}
            rows.append({**setting, "seconds": seconds, "speed": speed})
    if left_out:
        print(f"left out after {given.seconds:g} s: {', '.join(left_out)}")
    for batch, nblocks in itertools.product(batches, given.nblocks):
        speeds = {
            r["n"]: r["speed"] for r in rows if (r["batch"], r["nblocks"]) == (batch, nblocks)
        }
        slower = [n for n, speed in speeds.items() if speed <= 1.0]
        faster = [n for n in speeds if not slower or n > max(slower)]
        where = f"from n = {min(faster)} on" if faster else "nowhere here"
        print(f"batch {batch}, {nblocks} blocks: Monarch is faster {where}")
    promised = [
        r for r in rows if gpu and r["n"] >= 4096 and r["batch"] >= 4096 and r["nblocks"] >= 16
    ]
    if promised:
        worst = min(promised, key=lambda r: r["speed"])
        verdict = "holds" if worst["speed"] >= PROMISE else "MISSED"
        print(
            f"n >= 4096, batch >= 4096, n²/8 parameters or fewer: least {worst['speed']:.2f}x at "
            f"n = {worst['n']}, batch {worst['batch']}, {worst['nblocks']} blocks "
            f"(at least {PROMISE}x: {verdict})"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
