"""Time and memory of training with stored connections beside the same training under a mask.

    python benchmarks/quickselection.py [--threads 1] [--features 5000] [--hidden 1000]
        [--samples 500] [--sparsity 0.97] [--epochs 3] [--rounds 3] [--json FILE]

Trains QuickSelection's autoencoder twice from the same random numbers: with connections stored
(what the method does) and with dense matrices under a mask. At 97 % sparsity the stored form is to
take at most a third of the time and a quarter of the memory.

Time: one epoch, its rewiring included; the fastest of the epochs of all rounds. Memory: how far the
resident memory of a fresh process rises above what it held before training (VmHWM, reset after a
warm-up; Linux), the standardised and the noisy copy of the table included; beside it the same
without those two copies. Every form and round runs in a process of its own, in turn. Both must end
with the same strengths, or nothing is printed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from gossamer.kernels.sparse_training.op import instruction_set
from gossamer.methods.training.quickselection import QuickSelection

FORMS = ("stored", "masked")


def table(samples: int, features: int) -> Tensor:
    """Features made of 50 hidden ones, and noise."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(50, features, generator=generator) / 50**0.5
    hidden = torch.randn(samples, 50, generator=generator)
    return (hidden @ mix).add_(torch.randn(samples, features, generator=generator), alpha=0.5)


def resident(name: str) -> int:
    """VmHWM or VmRSS of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def child(form: str, args: argparse.Namespace) -> dict[str, object]:
    """Train once in this process."""
    torch.set_num_threads(args.threads)
    method = QuickSelection(
        hidden=args.hidden, sparsity=args.sparsity, epochs=args.epochs, lr=args.lr
    )
    QuickSelection(hidden=20, epochs=2, sparsity=0.5).fit(table(200, 30), form=form)
    data = table(args.samples, args.features)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    moments = [time.perf_counter()]
    fitted = method.fit(data, form=form, progress=lambda *_: moments.append(time.perf_counter()))
    peak = resident("VmHWM") - before
    # The last epoch does not rewire; the first includes the random start.
    epochs = [b - a for a, b in pairwise(moments[1:-1])]
    return {
        "epoch_s": min(epochs),
        "peak_bytes": peak,
        "strengths": fitted.strengths[:: max(1, args.features // 50)].tolist(),
        "loss": fitted.losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--features", type=int, default=5000)
    parser.add_argument("--hidden", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.epochs < 3:
        parser.error("at least 3 epochs are needed: first and last are not timed")
    if args.form:
        print(json.dumps(child(args.form, args)))
        return
    runs: dict[str, list[dict[str, object]]] = {form: [] for form in FORMS}
    for _ in range(args.rounds):
        for form in FORMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[form].append(json.loads(done.stdout))
    strengths = [torch.tensor(runs[form][0]["strengths"]) for form in FORMS]
    gap = float((strengths[0] - strengths[1]).abs().max() / strengths[1].abs().max())
    if gap > 1e-3:
        raise SystemExit(f"the two forms end {gap:.1e} apart: figures would mean nothing")
    copies = 2 * 4 * args.samples * args.features
    rows = {
        form: {
            "epoch_ms": 1e3 * min(float(str(r["epoch_s"])) for r in runs[form]),
            "peak_mb": min(int(str(r["peak_bytes"])) for r in runs[form]) / 1e6,
        }
        for form in FORMS
    }
    print(
        f"{args.features} features, {args.hidden} hidden units, {args.samples} samples in batches "
        f"of 100, sparsity {args.sparsity}, {args.threads} threads, {instruction_set()}, torch "
        f"{torch.__version__}, load average {os.getloadavg()[0]:.1f}"
    )
    for form, row in rows.items():
        print(
            f"{form:>7}: {row['epoch_ms']:8.1f} ms an epoch, peak {row['peak_mb']:7.1f} MB, "
            f"{row['peak_mb'] - copies / 1e6:7.1f} MB without the copies of the table"
        )
    speed = rows["masked"]["epoch_ms"] / rows["stored"]["epoch_ms"]
    share = rows["stored"]["peak_mb"] / rows["masked"]["peak_mb"]
    print(f"stored is {speed:.1f} times as fast and takes {share:.3f} of the memory")
    if args.json:
        result = {"rows": rows, "speed": speed, "memory": share, "gap": gap, **vars(args)}
        args.json.write_text(json.dumps(result, indent=2, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
