"""ProSparse against dense training on the same tokens: sparsity and loss, penalty by penalty.

    python benchmarks/prosparse.py [--model nano] [--steps 600] [--penalties 0,0.01,0.05,0.2]
        [--text FILE] [--held FILE] [--device cuda] [--threads 1] [--out curve.json]

Every arm starts from the same weights and sees the same samples in the same order: the SiLU model
trained on, ReLU only (penalty 0), and ProSparse with each penalty. Training text is Python's own
standard library unless --text names a file; it is in the domain of the packaged model, whose
held-out text measures loss and sparsity. A row holds when at least 80 % of the hidden activations
are zero and the loss is within 2 % of the dense arm's. About four minutes on one H200 with the
defaults; on a CPU lower --steps, --batch and --megabytes.
"""

import argparse
import json
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gossamer.evaluate import score
from gossamer.methods.activations.prosparse import ProSparse
from gossamer.methods.activations.training.hidden import measure_activity
from gossamer.methods.activations.training.loop import fit
from gossamer.models import Tokens, load_model, read_documents


def standard_library(megabytes: float) -> list[str]:
    """Python files that come with the interpreter, largest packages and tests left out."""
    home = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings"}
    texts, left = [], int(megabytes * 1e6)
    for path in sorted(home.rglob("*.py")):
        if skip & set(path.relative_to(home).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")[:left]
        left -= len(text)
        texts += [text] if text else []
        if not left:
            break
    return texts


def shares(model: Any, held: Tokens, batch: int) -> tuple[float, float]:
    """Sparsity over held-out tokens and the least live share of a layer."""
    found = measure_activity(model, held, batch_size=batch).values()
    live = [a.live for a in found if a.live is not None]
    return 1 - sum(a.nonzero for a in found) / len(found), min(live)


def say(row: dict[str, Any], dense: float) -> None:
    """Print one arm."""
    change = row["loss"] / dense - 1
    met = row["sparsity"] >= 0.8 and change <= 0.02
    print(
        f"{row['arm']:<18} {row['penalty']:>8g} {row['sparsity']:>9.1%} {row['at_zero']:>9.1%} "
        f"{row['live']:>7.1%} {row['loss']:>8.4f} {change:>+8.2%} {row['loss_at_zero']:>8.4f} "
        f"{row['seconds']:>7.1f}  {'holds' if met else ''}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", help="training text; default: Python's standard library")
    parser.add_argument("--held", help="held-out text; default: the packaged one")
    parser.add_argument("--megabytes", type=float, default=24.0, help="of standard library")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=200, help="held-out windows")
    parser.add_argument("--penalties", default="0,0.005,0.02,0.05,0.1")
    parser.add_argument("--rise", default="sine", choices=("sine", "constant"))
    parser.add_argument("--threshold", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")

    def fresh() -> Any:
        return load_model(options.model, dtype="float32", device=options.device).model

    tokenizer = load_model(options.model).tokenizer
    texts = read_documents(options.text, "calibration") if options.text else None
    data = Tokens.from_documents(
        texts or standard_library(options.megabytes), tokenizer, length=options.length
    )
    held = Tokens.from_documents(
        read_documents(options.held, "heldout"), tokenizer, length=options.length
    ).slice(options.windows)
    base = ProSparse(
        steps=options.steps,
        penalty=0.0,
        rise=options.rise,
        threshold=options.threshold,
        lr=options.lr,
        batch_size=options.batch,
        seed=options.seed,
    )
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    seen = options.steps * options.batch * options.length
    print(
        f"{options.model}, {name}, torch {torch.__version__}, {options.threads} threads, TF32; "
        f"{options.steps} steps, {seen:,} tokens an arm of {data.count:,} training tokens, "
        f"held out {held.count:,}, lr {options.lr:g}, {options.rise}, seed {options.seed}"
    )
    print(
        f"{'arm':<18} {'penalty':>8} {'sparsity':>9} {'at t=0':>9} {'live':>7} {'loss':>8} "
        f"{'change':>8} {'at t=0':>8} {'seconds':>7}"
    )

    def loss(model: Any) -> float:
        return score(model, held, batch_size=options.batch).loss

    rows: list[dict[str, Any]] = []

    def row(arm: str, penalty: float, loss: float, begun: float, **more: float) -> None:
        plain = {"sparsity": 0.0, "at_zero": 0.0, "live": 1.0, "loss_at_zero": loss}
        seconds = round(time.perf_counter() - begun, 1)
        rows.append({**plain, "arm": arm, "penalty": penalty, "loss": loss, "seconds": seconds})
        rows[-1].update(more)

    begun = time.perf_counter()
    model = fresh()
    row("untrained further", 0.0, loss(model), begun)
    begun = time.perf_counter()
    fit(model, data, base.plan())
    row("dense", 0.0, loss(model), begun)
    dense = rows[1]["loss"]
    for one in rows:
        say(one, dense)
    for penalty in map(float, options.penalties.split(",")):
        begun = time.perf_counter()
        model = fresh()
        replace(base, penalty=penalty).apply(model, data)
        found = {}
        found["sparsity"], found["live"] = shares(model, held, options.batch)
        final = loss(model)
        for module in model.modules():
            if hasattr(module, "threshold"):
                module.threshold = 0.0
        found["at_zero"], _ = shares(model, held, options.batch)
        found["loss_at_zero"] = loss(model)
        row("ProSparse" if penalty else "ReLU only", penalty, final, begun, **found)
        say(rows[-1], dense)
    if options.out:
        options.out.write_text(json.dumps({"options": vars(options), "rows": rows}, default=str))


if __name__ == "__main__":
    main()
