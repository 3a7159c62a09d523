"""Time SparseD in whole generations of a masked-diffusion model, and find where it pays.

    python benchmarks/sparsed.py [--threads 1] [--lengths 512,1024,2048,4096] [--steps 20]

The model has two layers, 4 heads of 64 channels and random weights: time does not depend on them.
Each repetition runs one generation with full attention and one with SparseD, in turning order;
``speed`` is the median over repetitions of dense / SparseD for the whole generation, choosing
included. ``dense``, ``choose`` and ``sparse`` are median seconds of one step: with full attention,
with full attention and the choice of blocks, and over the chosen blocks. ``pays from`` is the
fewest steps at which SparseD takes no longer, from those three. ``ran`` is the executor that
``--backend`` led to; ``attention`` is the speed of one layer's attention call alone.
"""

import argparse
import statistics
import time
from itertools import pairwise

import torch
from torch import nn

from gossamer.methods.attention.diffusion.blocks import keep_isolated
from gossamer.methods.attention.diffusion.calls import bidirectional_layout
from gossamer.methods.attention.diffusion.model import DiffusionConfig, MaskedDiffusionLM
from gossamer.methods.attention.diffusion.steps import denoising
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import execute
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.sparsed import SparseD

VOCABULARY, WIDTH, HEADS = 1000, 256, 4


@torch.no_grad()
def generation(model: nn.Module, ids: torch.Tensor, steps: int) -> list[float]:
    """Seconds of every step."""
    times = [time.perf_counter()]
    with denoising(prompt=ids.shape[1] // 2, steps=steps):
        for _ in range(steps):
            model(ids)
            times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


@torch.no_grad()
def attention_speed(length: int, method: SparseD, repeats: int) -> float:
    """Dense seconds over sparse seconds of one layer's attention, blocks already chosen."""
    query, key, value = torch.randn(3, 1, HEADS, length, WIDTH // HEADS)
    call, layout = Call(query, key, value), bidirectional_layout(query)
    blocks = -(-length // method.block)
    kept = keep_isolated(torch.rand(1, HEADS, blocks, blocks), blocks // 2, 1 - method.sparsity)
    index = BlockIndex.from_blocks(layout, kept, (method.block, method.block))
    ratios = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        nn.functional.scaled_dot_product_attention(query, key, value)
        between = time.perf_counter()
        execute(call, index, method.backend)
        ratios.append((between - start) / (time.perf_counter() - between))
    return statistics.median(ratios[1:])


def measure(length: int, method: SparseD, steps: int, repeats: int) -> str:
    """One row of the table."""
    config = DiffusionConfig(vocabulary=VOCABULARY, mask=VOCABULARY - 1, width=WIDTH, heads=HEADS)
    model = MaskedDiffusionLM(config).eval()
    ids = torch.randint(VOCABULARY, (1, length))
    full = method.dense_steps(steps)
    speeds, dense, choose, sparse = [], [], [], []
    ran = "none"

    def with_method() -> list[float]:
        nonlocal ran
        with method.apply(model) as work:
            times = generation(model, ids, steps)
            ran = ", ".join(name for name in work.ran if name != "dense") or "dense"
        return times

    generation(model, ids, 1)
    for turn in range(repeats):
        if turn % 2:
            ours, theirs = with_method(), generation(model, ids, steps)
        else:
            theirs, ours = generation(model, ids, steps), with_method()
        speeds.append(sum(theirs) / sum(ours))
        dense += theirs
        choose.append(ours[full - 1])
        sparse += ours[full:]
    one, chosen, later = map(statistics.median, (dense, choose, sparse))
    saved = one - later
    pays = "never"
    if saved > 0:
        later_steps = ((s, s - method.dense_steps(s)) for s in range(2, 100_000))
        pays = str(next(s for s, left in later_steps if left * saved >= chosen - one))
    return (
        f"{length:>6} {statistics.median(speeds):>7.2f} {one:>8.4f} {chosen:>8.4f} {later:>8.4f} "
        f"{pays:>10} {attention_speed(length, method, repeats + 2):>10.2f}  {ran}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time SparseD in whole generations.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--backend", default="gather")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    method = SparseD(sparsity=given.sparsity, block=given.block, backend=given.backend)
    print(
        f"{method}; {given.steps} steps, {method.dense_steps(given.steps)} of them full; "
        f"{given.threads} thread(s)"
    )
    print("length   speed    dense   choose   sparse  pays from  attention  ran")
    for length in map(int, given.lengths.split(",")):
        print(measure(length, method, given.steps, given.repeats), flush=True)


if __name__ == "__main__":
    main()
