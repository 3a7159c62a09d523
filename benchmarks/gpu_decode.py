"""How long x Wᵀ of a few inputs takes on a GPU, reading 2:4 or any sparse weights directly.

    python benchmarks/gpu_decode.py [--shapes 8192x28672 4096x4096] [--batches 1 4 16]
        [--sparsities 0.7] [--dtype bfloat16] [--segments 8 16 32] [--unroll 1 2] [--json FILE]

Two figures are promised on an H200 (8192 x 28672 bfloat16, batch 1): 2:4 at least 1.55 times
as fast as cuBLAS, gaps at 70 % sparsity at least 2 times.

Dense and sparse are each captured in a CUDA graph of 20 products over copies of the matrix that
together exceed the second cache four times, so nothing is read twice from it; graphs are replayed
in turn. Times are medians of the rounds, with lowest and highest; speed is the median of the
rounds' ratios. Results are checked against float64 sums before anything is timed. ``limit`` is the
ratio of bytes, at equal bandwidth.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gossamer.kernels.sparse_linear.tiled import Tiled, tile
from gossamer.kernels.sparse_linear.tiled_op import _run, usable

CALLS, ROUNDS = 20, 15
PROMISES = {("2:4", 0.5): 1.55, ("gaps", 0.7): 2.0}


def make(rows: int, columns: int, sparsity: float | None, dtype: torch.dtype) -> Tensor:
    """Random weights: every row equally sparse, or 2:4 for None."""
    generator = torch.Generator("cuda").manual_seed(rows + columns)
    weight = torch.randn(rows, columns, device="cuda", generator=generator).to(dtype)
    for part in weight.split(1024):
        score = torch.rand(part.shape, device="cuda", generator=generator)
        if sparsity is None:
            places = score.view(len(part), -1, 4).argsort(2) >= 2
            part.masked_fill_(places.view(part.shape), 0)
        else:
            part.masked_fill_(score.argsort(1) < round(sparsity * columns), 0)
    return weight


def copies(nbytes: int) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-4 * cache // nbytes))


def graph(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The calls, repeated to 20, captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for k in range(CALLS):
            calls[k % len(calls)]()
    return captured


def timed(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, list[float]]:
    """Milliseconds of one product in every round."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(ROUNDS + 2):
        for name, captured in graphs.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            captured.replay()
            after.record()
            after.synchronize()
            if turn >= 2:
                times[name].append(before.elapsed_time(after) / CALLS)
    return times


def check(weight: Tensor, tiled: Tiled, x: Tensor, unroll: int) -> None:
    """Right to the rounding of the result's type, and the same at every call."""
    got = _run(x, tiled, unroll)
    scale = x.double().abs() @ weight[:512].double().abs().T
    error = (got[:, :512].double() - x.double() @ weight[:512].double().T).abs()
    wide = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-11
    limit = 1e-5 * scale + wide * got[:, :512].double().abs() + 1e-6
    assert bool((error <= limit).all()), float((error / limit).max())
    assert torch.equal(got, _run(x, tiled, unroll))
    whole = torch.nn.functional.linear(x, weight)
    assert float((got - whole).float().norm() / whole.float().norm()) < 1e-2


def cloned(tiled: Tiled) -> Tiled:
    names = ("values", "codes", "start", "first", "order")
    return replace(tiled, **{name: getattr(tiled, name).clone() for name in names})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["8192x28672", "4096x4096"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.7])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--segments", type=int, nargs="*", default=[])
    parser.add_argument("--unroll", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    assert usable("cuda"), "needs a GPU and triton"
    dtype = getattr(torch, given.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.dtype}")
    records: list[dict[str, object]] = []
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        for sparsity in [None, *given.sparsities]:
            kind = "2:4" if sparsity is None else "gaps"
            weight = make(rows, columns, sparsity, dtype)
            variants = {
                (parts, unroll): tile(weight, kind, segments=parts)
                for parts in (given.segments or [None])
                for unroll in given.unroll
            }
            many = [weight] + [weight.clone() for _ in range(copies(weight.nbytes) - 1)]
            stored = {k: [cloned(t) for _ in range(copies(t.nbytes))] for k, t in variants.items()}
            for batch in given.batches:
                x = torch.randn(batch, columns, device="cuda").to(dtype)
                graphs = {"dense": graph([partial(torch.nn.functional.linear, x, w) for w in many])}
                for (parts, unroll), tiled in variants.items():
                    check(weight, tiled, x, unroll)
                    name = f"{kind} s{tiled.values.shape[1]} u{unroll}"
                    graphs[name] = graph(
                        [partial(_run, x, t, unroll) for t in stored[parts, unroll]]
                    )
                times = timed(graphs)
                sizes = {"dense": weight.nbytes}
                for (_, unroll), tiled in variants.items():
                    sizes[f"{kind} s{tiled.values.shape[1]} u{unroll}"] = tiled.nbytes
                for name, ms in times.items():
                    speed = statistics.median(
                        d / m for d, m in zip(times["dense"], ms, strict=True)
                    )
                    middle, moved = statistics.median(ms), sizes[name]
                    limit = sizes["dense"] / moved
                    print(
                        f"{shape:>11} {sparsity or 0.5:>4.0%} batch {batch:>2} {name:<12}"
                        f"{1e3 * middle:8.1f} us ({1e3 * min(ms):.1f} to {1e3 * max(ms):.1f})"
                        f" {moved / middle / 1e9:5.2f} TB/s {speed:5.2f}x limit {limit:.2f}x",
                        flush=True,
                    )
                    wanted = PROMISES.get((kind, sparsity or 0.5))
                    if name != "dense" and (shape, batch) == ("8192x28672", 1) and wanted:
                        verdict = "holds" if speed >= wanted else "MISSED"
                        print(f"  {kind}: at least {wanted:g}x: {verdict}")
                    records.append(
                        {"shape": shape, "sparsity": sparsity or 0.5, "batch": batch}
                        | {"name": name, "ms": ms, "bytes": moved, "speed": speed, "limit": limit}
                    )
                del graphs
            del weight, many, stored, variants
            torch.cuda.empty_cache()
    if given.json:
        given.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
