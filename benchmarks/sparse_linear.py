"""How long x Wᵀ takes for a W with few weights: packed layouts beside dense and other CSR.

    python benchmarks/sparse_linear.py [--threads 1 2] [--batches 1 4 16] [--rounds 7]
        [--sparsities 0.5 0.7 0.8 0.9 0.95] [--dtypes float32 bfloat16] [--clock cpu] [--json FILE]

Three figures are promised (batch 1, 4096 x 11008 float32, 2 threads): at least 4 times as fast
as ``F.linear`` at sparsity 0.9, at least 2 times at 0.8, never slower at 0.5.

Every round runs every operation a few times, in turn, so that a busy machine slows all alike; a
speed is the median of the rounds' ratios. Packed matrices are rotated over copies that together
exceed the last cache. Results are checked before anything is timed. ``moved`` is the bytes of the
matrix; its share of the stream is of what ``Tensor.sum`` over a large tensor reads before the
rounds. ``--clock cpu`` (one thread) counts the time the thread ran, for a machine that others use.
"""

import argparse
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import scipy.sparse
import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer.kernels import Packed, pack, sparse_linear
from gossamer.kernels.sparse_linear.op import backend_for, instruction_set

CALLS = 3
CACHE = 3 * 32 << 20  # rotated copies take at least this many bytes

Run = Callable[[], object]
PROMISES = {0.5: 1.0, 0.8: 2.0, 0.9: 4.0}


def make(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> Tensor:
    """A random matrix, the same share kept in every row, at random places."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    score = torch.rand(rows, columns, generator=generator)
    kept = score.topk(round((1 - sparsity) * columns), dim=1).indices
    mask = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, kept, True)
    # A weight drawn as 0 would be one less in its row.
    return torch.where(mask, torch.where(weight == 0, 1, weight), 0).to(dtype)


def copies(packed: Packed) -> list[Packed]:
    """The matrix at so many addresses that no cache holds it until its turn comes again."""
    count = max(4, -(-CACHE // packed.nbytes))
    names = ("values", "index", "start")
    return [replace(packed, **{n: getattr(packed, n).clone() for n in names}) for _ in range(count)]


def rotating(function: Callable[[Packed], Tensor], packed: Packed) -> Run:
    """The function over the copies, the next one at every call."""
    turn = itertools.cycle(copies(packed))
    return lambda: function(next(turn))


def operations(weight: Tensor, x: Tensor, layouts: dict[str, Packed]) -> dict[str, Run]:
    """What is timed, by name; dense first."""
    runs: dict[str, Run] = {"dense F.linear": lambda: linear(x, weight)}
    for name, packed in layouts.items():
        runs[name] = rotating(lambda p: sparse_linear(x, p), packed)
    if weight.dtype == torch.float32:
        csr = scipy.sparse.csr_matrix(weight.numpy())
        columns = x.T.contiguous().numpy() if len(x) > 1 else x[0].numpy()
        runs["scipy CSR"] = lambda: csr @ columns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says that torch's CSR is in beta
            theirs = weight.to_sparse_csr()
        vector = x.T.contiguous()
        runs["torch CSR"] = lambda: theirs @ vector
    return runs


def check(weight: Tensor, layouts: dict[str, Packed], batch: int) -> None:
    """The results that are about to be timed are right."""
    x = torch.randn(batch, weight.shape[1])
    some = torch.arange(0, len(weight), 97)
    expected = x.double() @ weight[some].double().T
    for packed in layouts.values():
        error = (sparse_linear(x, packed)[:, some] - expected).abs().max()
        assert float(error) < 1e-3, (packed, float(error))


def measure(
    runs: dict[str, Run], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of a call in every round, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin = clock()
            for _ in range(CALLS):
                run()
            if turn:
                times[name].append((clock() - begin) / CALLS)
    return times


def show(
    times: dict[str, list[float]], moved: dict[str, int], setting: dict[str, object]
) -> list[dict[str, object]]:
    """Print the rows of one setting and return them as plain values."""
    stream = setting["stream"]
    assert isinstance(stream, float)
    rows: list[dict[str, object]] = []
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        speed = statistics.median(
            d / s for d, s in zip(times["dense F.linear"], seconds, strict=True)
        )
        rate = moved[name] / middle / 1e9
        rows.append(
            {**setting, "operation": name, "seconds": seconds, "moved": moved[name], "speed": speed}
        )
        print(
            f"{setting['dtype']:>9} {setting['threads']:>2} {setting['batch']:>3} "
            f"{setting['sparsity']:>5}  {name:<15}{1e3 * middle:>8.2f} "
            f"({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})".ljust(64)
            + f"{speed:>6.2f}x {moved[name] / 1e6:>7.1f} MB {rate:>6.1f} GB/s "
            f"{rate / stream:>5.0%}",
            flush=True,
        )
    return rows


def stream_rate(threads: int, clock: Callable[[], float]) -> float:
    """GB/s that a sum over 256 MB reads, the best of 9."""
    torch.set_num_threads(threads)
    data, best = torch.ones(1 << 26), float("inf")
    for _ in range(9):
        begin = clock()
        data.sum()
        best = min(best, clock() - begin)
    return data.numel() * 4 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.clock == "cpu" and given.threads != [1]:
        parser.error("--clock cpu counts the calling thread only: give --threads 1")
    clock = time.thread_time if given.clock == "cpu" else time.perf_counter
    rows: list[dict[str, object]] = []
    stream = {threads: stream_rate(threads, clock) for threads in given.threads}
    print(
        f"torch {torch.__version__}, {given.shape[0]} x {given.shape[1]}, kernel: "
        f"{instruction_set()}, load average {os.getloadavg()[0]:.2f}; stream GB/s by threads: "
        + ", ".join(f"{t}: {rate:.1f}" for t, rate in stream.items())
    )
    print("    dtype  t   B sparsity  operation      ms: median (lowest to highest)     over dense")
    for dtype_name, sparsity in itertools.product(given.dtypes, given.sparsities):
        dtype = getattr(torch, dtype_name)
        weight = make(*given.shape, sparsity, dtype)
        layouts = {name: pack(weight, name) for name in ("bitmask", "csr", "fanin")}
        for batch in given.batches:
            x = torch.randn(batch, given.shape[1]).to(dtype)
            assert backend_for(x, layouts["csr"]) == "cpu"
            check(weight, layouts, batch)
            dense = weight.numel() * weight.element_size()
            other = int((weight != 0).sum())
            moved = {name: packed.nbytes for name, packed in layouts.items()}
            moved |= {"dense F.linear": dense, "scipy CSR": 8 * other, "torch CSR": 12 * other}
            runs = operations(weight, x, layouts)
            for threads in given.threads:
                torch.set_num_threads(threads)
                setting = {
                    "dtype": dtype_name,
                    "threads": threads,
                    "batch": batch,
                    "sparsity": sparsity,
                    "clock": given.clock,
                    "stream": stream[threads],
                    "load": os.getloadavg()[0],
                }
                rows += show(measure(runs, given.rounds, clock), moved, setting)
    for sparsity, wanted in PROMISES.items():
        found = [
            row
            for row in rows
            if (row["dtype"], row["threads"], row["batch"]) == ("float32", 2, 1)
            and row["sparsity"] == sparsity
            and row["operation"] in layouts
        ]
        if found:
            best = max(found, key=lambda row: row["speed"])
            verdict = "holds" if best["speed"] >= wanted else "MISSED"
            print(
                f"batch 1, float32, 2 threads, sparsity {sparsity}: {best['operation']} "
                f"{best['speed']:.2f}x dense (at least {wanted:g}x: {verdict})"
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
