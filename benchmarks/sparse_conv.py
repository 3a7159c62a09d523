"""How long a 1x1 convolution with few weights takes beside torch's dense one.

    python benchmarks/sparse_conv.py [--threads 1] [--rounds 25] [--parts target sweep shapes block]
        [--sparsities 0.3 0.4 0.5 0.6 0.7 0.8 0.9 0.95] [--block-sparsity 0.9] [--json FILE]

``target``: 512x512 weights on 14x14 positions at 90 % zeros; at least 1.5 times F.conv2d is
promised (one thread). ``sweep``: the same layer over sparsities, and the sparsity from which the
kernel wins. ``shapes``: the pointwise layers of MobileNetV1 and V2. ``block``: whole inverted
residuals of MobileNetV2 with depthwise convolution, normalisation and ReLU6, as torch runs them,
the same with normalisation folded into the dense convolutions, and with SparseConvNets' kernel.

Every round calls every candidate once, in turn; a time is the fastest of the rounds, so that
other programs on the machine count little, and a speed is dense time over sparse time. Results
are checked against the dense convolution before anything is timed.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gossamer import SparseConvNets
from gossamer.kernels import pack_conv, sparse_conv
from gossamer.kernels.sparse_conv.op import instruction_set
from gossamer.methods.weights.convnets.blocks import InvertedResidual, convolution

Run = Callable[[], object]
Rows = list[dict[str, object]]

# (outputs, inputs, side): MobileNetV1 from 56x56 on, then expansions and projections of V2.
SHAPES = [
    (128, 64, 56),
    (256, 128, 28),
    (512, 256, 14),
    (512, 512, 14),
    (1024, 512, 7),
    (1024, 1024, 7),
    (144, 24, 56),
    (24, 144, 56),
    (192, 32, 28),
    (32, 192, 28),
    (384, 64, 14),
    (64, 384, 14),
    (576, 96, 14),
    (96, 576, 14),
    (960, 160, 7),
    (160, 960, 7),
    (320, 960, 7),
    (1280, 320, 7),
]
# (channels, side) of inverted residuals that add their input.
BLOCKS = [(24, 56), (32, 28), (64, 14), (96, 14), (160, 7)]


def layer(outputs: int, inputs: int, sparsity: float, block: int = 1) -> tuple[Tensor, Tensor]:
    """Random weights (O, I) of which blocks of output channels are removed, and a bias."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(-(-outputs // block), inputs, generator=generator)
    removed = torch.zeros(score.numel(), dtype=torch.bool)
    removed[score.flatten().argsort()[: round(sparsity * score.numel())]] = True
    kept = ~removed.view(score.shape).repeat_interleave(block, 0)[:outputs]
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return weight * kept, torch.randn(outputs, generator=generator)


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def candidates(
    outputs: int, inputs: int, side: int, sparsity: float, forms: dict[str, int]
) -> dict[str, Run]:
    """The dense convolution and the kernel in several forms, checked."""
    x = torch.randn(1, inputs, side, side, generator=torch.Generator().manual_seed(1))
    last = x.to(memory_format=torch.channels_last)
    weight, bias = layer(outputs, inputs, sparsity)
    full, full_last = weight[:, :, None, None].clone(), weight[:, :, None, None].clone()
    full_last = full_last.to(memory_format=torch.channels_last)
    runs: dict[str, Run] = {
        "dense": lambda: conv2d(x, full, bias),
        "dense NHWC": lambda: conv2d(last, full_last, bias),
    }
    for name, block in forms.items():
        kernel, offset = layer(outputs, inputs, sparsity, block)
        packed, entry = pack_conv(kernel, offset, block), last if "NHWC" in name else x
        exact = conv2d(x.double(), kernel.double()[:, :, None, None], offset.double())
        error = float((sparse_conv(entry, packed) - exact).abs().max())
        assert error <= 1e-5, (name, error)
        runs[name] = lambda entry=entry, packed=packed: sparse_conv(entry, packed)
    return runs


def show(label: str, times: dict[str, list[float]], base: str = "dense") -> dict[str, object]:
    """Print a line a candidate; return the row."""
    for name, values in times.items():
        speed = min(times[base]) / min(values)
        print(
            f"{label:<26} {name:<14} {min(values):8.4f} ms  median {statistics.median(values):8.4f}"
            f"  {speed:6.2f}x",
            flush=True,
        )
    return {"label": label, "milliseconds": times}


FORMS = {"sparse": 1, "sparse 2x1": 2, "sparse 4x1": 4, "sparse NHWC": 1}


def target(given: argparse.Namespace) -> Rows:
    times = measure(candidates(512, 512, 14, 0.9, FORMS), given.rounds)
    row = show("512x512, 14x14, 0.9", times)
    speed = min(times["dense"]) / min(times["sparse"])
    print(f"at least 1.5x F.conv2d: {speed:.2f}x, {'holds' if speed >= 1.5 else 'MISSED'}")
    return [row]


def sweep(given: argparse.Namespace) -> Rows:
    rows, speeds = [], []
    for sparsity in given.sparsities:
        times = measure(candidates(512, 512, 14, sparsity, {"sparse": 1}), given.rounds)
        rows.append(show(f"512x512, 14x14, {sparsity}", times))
        speeds.append((sparsity, min(times["dense"]) / min(times["sparse"])))
    for (low, a), (high, b) in pairwise(speeds):
        if a < 1 <= b:
            even = low + (high - low) * (1 - a) / (b - a)
            print(f"break-even at {even:.0%} zeros")
    return rows


def shapes(given: argparse.Namespace) -> Rows:
    rows = []
    for outputs, inputs, side in SHAPES:
        runs = candidates(outputs, inputs, side, 0.9, {"sparse": 1, "sparse 4x1": 4})
        rows.append(show(f"{outputs}x{inputs}, {side}x{side}, 0.9", measure(runs, given.rounds)))
    return rows


def folded(residual: InvertedResidual) -> InvertedResidual:
    """A copy with every normalisation folded into its convolution: the dense chain at its best."""
    twin, parts = copy.deepcopy(residual), []
    for module in residual.body:
        if isinstance(module, nn.BatchNorm2d):
            parts[-1] = fuse_conv_bn_eval(parts[-1], module)
        else:
            parts.append(module)
    twin.body = nn.Sequential(*parts)
    return twin.eval()


def block(given: argparse.Namespace) -> Rows:
    rows = []
    for channels, side in BLOCKS:
        torch.manual_seed(0)
        # The first convolution of a model stays dense, so the block comes second.
        stem = nn.Sequential(*convolution(3, channels, 3))
        dense = nn.Sequential(stem, InvertedResidual(channels, channels)).eval()
        sparse = nn.Sequential(stem, InvertedResidual(channels, channels)).eval()
        sparse.load_state_dict(dense.state_dict())
        method = SparseConvNets(sparsity=given.block_sparsity, execute="sparse")
        method.apply(sparse, undo=False)
        SparseConvNets(sparsity=given.block_sparsity, execute="dense").apply(dense, undo=False)
        x = torch.randn(1, channels, side, side)
        with torch.inference_mode():
            error = float((sparse[1](x) - dense[1](x)).abs().max())
            assert error <= 1e-4, error
            best = folded(dense[1])
            runs: dict[str, Run] = {
                "dense": lambda dense=dense, x=x: dense[1](x),
                "dense folded": lambda other=best, x=x: other(x),
                "sparse": lambda sparse=sparse, x=x: sparse[1](x),
            }
            label = f"block {channels}, {side}x{side}, {given.block_sparsity}"
            rows.append(show(label, measure(runs, given.rounds)))
    return rows


PARTS = {"target": target, "sweep": sweep, "shapes": shapes, "block": block}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    )
    parser.add_argument("--block-sparsity", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"torch {torch.__version__}, kernel: {instruction_set()}, {given.threads} threads, load "
        f"average {os.getloadavg()[0]:.2f}"
    )
    rows: Rows = []
    with torch.no_grad():
        for part in given.parts:
            rows += [{"part": part, "threads": given.threads, **r} for r in PARTS[part](given)]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
