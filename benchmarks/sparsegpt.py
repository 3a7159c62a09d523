"""How long SparseGPT takes for a layer, beside the operations it needs and other solvers.

    python benchmarks/sparsegpt.py [--shapes 4096x4096] [--patterns layer 2:4] [--threads 1 2]
        [--rounds 3] [--device cuda] [--json FILE]

Operations needed (multiplications and additions): n³/3 for the factor of the Hessian and m n²
for carrying the losses of an m x n layer from block to block. Compared, in turn in every round:

- ``gossamer``: factor and solver, as the method runs them;
- ``published schedule``: the paper's order of work written out plainly (invert the Hessian, factor
  the inverse, column by column inside a block, then all later columns);
- ``llmcompressor``: its ``sparsify_weight``, when that package is installed.

Before anything is timed, the squared errors of the layer's outputs must agree to 1 %.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import gossamer.kernels  # noqa: F401 - registers the N:M kernel
from gossamer.core import NM, Budget, Pattern, Site, Stat, parse_pattern
from gossamer.evaluate.environment import environment
from gossamer.methods.weights.base import LayerView
from gossamer.methods.weights.compensate import factorise
from gossamer.methods.weights.sparsegpt import SparseGPT
from gossamer.methods.weights.wanda import Wanda

SPARSITY, BLOCK, DAMPING = 0.5, 128, 0.01

Solver = Callable[[], Tensor]


def problem(rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """A weight and H = (2 / T) sum of x xᵀ of correlated inputs, 1 % of the channels louder."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    common = torch.randn(64, columns, generator=generator)
    x = torch.randn(columns, 64, generator=generator) @ common / 8
    x += torch.randn(columns, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[: columns // 100]] *= 30
    x = x.to(device)
    return weight, x.T @ x * (2 / columns)


def view(weight: Tensor, hessian: Tensor) -> LayerView:
    site = Site("layer", "mlp.up", 0, "layer", "weight", (weight.shape[0], weight.shape[1]))
    stats = {Stat.HESSIAN: hessian, Stat.INPUT_L2: hessian.diagonal().sqrt()}
    return LayerView(site, weight, stats, 0)


def budget_of(pattern: Pattern) -> Budget:
    return Budget(keep=pattern.keep) if isinstance(pattern, NM) else Budget(sparsity=SPARSITY)


def ours(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    method = SparseGPT(pattern=pattern, block_size=BLOCK, damping=DAMPING)
    new = method.prune(view(weight, hessian), pattern, budget_of(pattern)).weight
    assert new is not None
    return new


def published(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """The paper's schedule: every block writes to all columns after it."""
    w, h = weight.clone(), hessian.clone()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    pivots = upper.diagonal()
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        tile, errors = w[:, start:end], torch.zeros(len(w), end - start, device=w.device)
        keep = torch.ones_like(tile, dtype=torch.bool)
        if not isinstance(pattern, NM):
            score = tile.square() / pivots[start:end].square()
            keep = pattern.select(score, budget_of(pattern)).mask()
        for j in range(end - start):
            if isinstance(pattern, NM) and j % pattern.of == 0:
                own = slice(j, j + pattern.of)
                score = tile[:, own].square() / pivots[start + j : start + j + pattern.of].square()
                keep[:, own] = pattern.select(score).mask()
            dropped = torch.where(keep[:, j], 0.0, tile[:, j])
            errors[:, j] = dropped / pivots[start + j]
            tile[:, j:] -= errors[:, j, None] * upper[start + j, start + j : end]
        tile.masked_fill_(~keep, 0)
        w[:, end:] -= errors @ upper[start:end, end:]
    return w


def installed() -> Callable[[Tensor, Tensor, Pattern], Tensor] | None:
    """llm-compressor's solver as a function like ours, or None when it cannot be imported."""
    try:
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
    except ImportError:
        return None

    def run(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        groups = (pattern.of - pattern.keep, pattern.of) if isinstance(pattern, NM) else (0, 0)
        _, new = sparsify_weight(
            module=module,
            hessians_dict={module: hessian.clone()},
            sparsity=SPARSITY,
            prune_n=groups[0],
            prune_m=groups[1],
            block_size=BLOCK,
            dampening_frac=DAMPING,
            preserve_sparsity_mask=False,
        )
        return new

    return run


def error(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs over that of removing everything."""
    lost = weight - new
    return float(((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum())


def timed(solver: Solver, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    solver()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    shape: tuple[int, int], pattern: Pattern, threads: int, rounds: int, device: str
) -> dict[str, object]:
    torch.set_num_threads(threads)
    weight, hessian = problem(*shape, device)
    functions = {"gossamer": ours, "published schedule": published}
    if (other := installed()) is not None:
        functions["llmcompressor"] = other
    errors = {name: error(weight, f(weight, hessian, pattern), hessian) for name, f in
              functions.items()}  # fmt: skip
    for name, value in errors.items():
        assert abs(value / errors["gossamer"] - 1) < 0.01, (name, errors)
    row = NM(pattern.keep, pattern.of) if isinstance(pattern, NM) else parse_pattern("row")
    wanda = Wanda().prune(view(weight, hessian), row, budget_of(row)).selection.mask()
    errors["wanda"] = error(weight, weight * wanda, hessian)
    solvers: dict[str, Solver] = {
        name: lambda f=f: f(weight, hessian, pattern) for name, f in functions.items()
    }
    solvers["factor alone"] = lambda: factorise(hessian, DAMPING).upper
    times: dict[str, list[float]] = {name: [] for name in solvers}
    for _ in range(rounds):
        for name, solver in solvers.items():
            times[name].append(timed(solver, device))
    m, n = shape
    needed = n**3 / 3 + m * n**2
    seconds = statistics.median(times["gossamer"])
    return {
        "shape": f"{m}x{n}",
        "pattern": str(pattern),
        "threads": threads,
        "device": device,
        "seconds": {k: [statistics.median(v), min(v), max(v)] for k, v in times.items()},
        "ratio_to_gossamer": {
            k: statistics.median(a / b for a, b in zip(v, times["gossamer"], strict=True))
            for k, v in times.items()
        },
        "gflop_needed": needed / 1e9,
        "gflop_needed_per_second": needed / 1e9 / seconds,
        "error": errors,
    }


def show(result: dict[str, object]) -> None:
    print(f"\n{result['shape']}, {result['pattern']}, {result['threads']} threads, "
          f"{result['device']}: {result['gflop_needed']:.0f} GFLOP needed, "
          f"{result['gflop_needed_per_second']:.0f} GFLOP/s reached")  # fmt: skip
    seconds, ratio, errors = (result[k] for k in ("seconds", "ratio_to_gossamer", "error"))
    assert isinstance(seconds, dict)
    assert isinstance(ratio, dict)
    assert isinstance(errors, dict)
    for name, (middle, low, high) in seconds.items():
        lost = f"  error {errors[name]:.5f}" if name in errors else ""
        print(f"  {name:20s} {middle:8.2f} s ({low:.2f} to {high:.2f})  x{ratio[name]:.2f}{lost}")
    print(f"  {'wanda, no update':20s} error {errors['wanda']:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="rows x columns")
    parser.add_argument("--patterns", nargs="+", default=["layer", "2:4"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for shape in options.shapes:
        rows, columns = (int(side) for side in shape.split("x"))
        for text in options.patterns:
            for threads in options.threads:
                results.append(
                    measure(
                        (rows, columns),
                        parse_pattern(text),
                        threads,
                        options.rounds,
                        options.device,
                    )
                )
                show(results[-1])
    if options.json is not None:
        options.json.write_text(json.dumps({"results": results, **environment()}, indent=1))


if __name__ == "__main__":
    main()
