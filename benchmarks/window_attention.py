"""Time the window executor against dense attention, prefill and decode, pair by pair.

    python benchmarks/window_attention.py [--threads 1] [--lengths 1024,2048,4096,8192]

Each repetition runs dense (torch's fused causal attention, no mask), window, and the same
pattern under a dense mask, back to back in turning order; the figure is the median over
repetitions of the ratio within a pair, so a slow moment of the machine hits both sides. The
masks of the window are made once per forward pass and shared by all layers; ``first layer``
includes making them. ``picked`` is what ``backend="auto"`` runs, by its cost rule.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.core.pattern import Window
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import choose, run
from gossamer.methods.attention.index import WindowIndex
from gossamer.methods.attention.layout import Layout

EVERYTHING = 1 << 40


def synchronise(tensor: Tensor) -> None:
    """Wait for the device a tensor lies on."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def clock(function: Callable[[], Tensor]) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    synchronise(function())
    return time.perf_counter() - begin


def paired(
    first: Callable[[], Tensor], second: Callable[[], Tensor], repeats: int
) -> tuple[float, float]:
    """Median seconds of the first, and median over pairs of first / second."""
    first(), second()
    times, ratios = [], []
    for turn in range(repeats):
        if turn % 2:
            b, a = clock(second), clock(first)
        else:
            a, b = clock(first), clock(second)
        times.append(a)
        ratios.append(a / b)
    return statistics.median(times), statistics.median(ratios)


def measure(
    queries: int, length: int, sink: int, recent: int, call: Call, repeats: int
) -> tuple[float, float, float, float, str]:
    """Dense milliseconds and the speed of window, its first layer, and mask over dense."""

    def layout() -> Layout:
        return Layout(
            len(call.query),
            queries,
            length,
            query_offset=length - queries,
            device=call.query.device,
        )

    kept, full = WindowIndex(layout(), sink, recent), WindowIndex(layout(), sink, EVERYTHING)

    def dense() -> Tensor:
        return run("dense", call, full)

    def window() -> Tensor:
        return run("window", call, kept)

    def first_layer() -> Tensor:
        return run("window", call, WindowIndex(layout(), sink, recent))

    def masked() -> Tensor:
        return run("masked", call, kept)

    seconds, speed = paired(dense, window, repeats)
    _, fresh = paired(dense, first_layer, repeats)
    _, under_mask = paired(dense, masked, max(3, repeats // 2))
    return 1e3 * seconds, speed, fresh, under_mask, choose(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--windows", default="252,0.3,0.5,0.8", help="recent keys, or a sparsity")
    parser.add_argument("--heads", default="8,2", help="query and key-value heads")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads, shared = map(int, options.heads.split(","))
    dtype = getattr(torch, options.dtype)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(
        f"torch {torch.__version__}, {name}, {options.threads} threads, {options.dtype}, batch 1, "
        f"{heads} heads over {shared} key-value heads of width {options.width}, 4 sinks, "
        f"median of {options.repeats} pairs; speed is dense time / other time"
    )
    print("phase     length  window  sparsity  dense ms  window x  first layer x  masked x  picked")
    for length in map(int, options.lengths.split(",")):
        for text in options.windows.split(","):
            number = float(text)
            recent = int(number) if number >= 1 else Window.for_sparsity(number, length, 4).recent
            if recent + 4 >= length:
                continue
            sparsity = Window(4, recent).sparsity_at(length)
            for queries in (length, 1):
                make = {"dtype": dtype, "device": options.device}
                call = Call(
                    torch.randn(1, heads, queries, options.width, **make),
                    torch.randn(1, shared, length, options.width, **make),
                    torch.randn(1, shared, length, options.width, **make),
                )
                repeats = options.repeats if queries > 1 else 10 * options.repeats
                with torch.no_grad():
                    row = measure(queries, length, 4, recent, call, repeats)
                phase = "prefill" if queries > 1 else "decode"
                print(
                    f"{phase:<8} {length:>7} {recent:>7}  {sparsity:>8.3f}  {row[0]:>8.3f}  "
                    f"{row[1]:>8.2f}  {row[2]:>13.2f}  {row[3]:>8.2f}  {row[4]}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
