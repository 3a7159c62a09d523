"""Fine-tuning to a sparse language model with few trained parameters: held-out loss by method.

    python benchmarks/pst.py [MODEL] [--data FILE] [--sparsity 0.8] [--steps 400] [--batch 8]
        [--length 128] [--lr 1e-3 3e-3 1e-2] [--arm NAME ...] [--seeds 3] [--rank 1] [--windows 64]
        [--device cuda] [--jobs 1] [--threads 1] [--seconds 300] [--json FILE]

Arms, all with equally many trained parameters except ``short``: ``pst``; ``plain``, the same with
a larger update and no learned score (gradual magnitude pruning); ``short``, without the score and
no larger update (the ablation α₁ = α₂ = 0); ``magnitude`` and ``random``, a mask chosen at the
start and a low-rank update under it; ``dense``, that update alone. ``--data`` is the text tuned to,
three fifths to train on, a fifth to choose the rate by and a fifth to report; left out, the
reference of the Python language that comes with Python. Rates of the last three arms are ten times
those of ``--lr``, since their updates start ten times smaller. ``--jobs`` trains that many at once,
spread over the GPUs there are; no training is begun after ``--seconds``. Printed for every arm: its
best rate, the loss of every seed, trained parameters, seconds.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any

import torch

from gossamer.claims.tuning.baselines import MaskedLoRA
from gossamer.evaluate import score
from gossamer.methods.tuning.base import Tuning
from gossamer.methods.tuning.pst import PST
from gossamer.models import Tokens, load_model, read_documents

ARMS = ("pst", "plain", "short", "magnitude", "random", "dense")


def method(arm: str, rank: int, sparsity: float, shared: dict[str, Any]) -> Tuning:
    """An arm with its number of trained parameters: 2 rank + 1 per row and column."""
    if arm in ("pst", "plain", "short"):
        scores = {} if arm == "pst" else {"alpha1": 0.0, "alpha2": 0.0}
        own = 2 * rank + 1 if arm == "plain" else rank
        return PST(sparsity=sparsity, rank=own, score_rank=rank, **scores, **shared)
    mask = "random" if arm == "random" else "magnitude"
    kept = 0.0 if arm == "dense" else sparsity
    return MaskedLoRA(sparsity=kept, rank=2 * rank + 1, mask=mask, **shared)


def texts(data: str | None) -> list[str]:
    """Texts of the domain, in pieces of a page."""
    if data is not None:
        whole = "\n\n".join(read_documents(data))
        return [whole[at : at + 4000] for at in range(0, len(whole), 4000)]
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics)]


@cache
def bench(model: str, data: str | None, length: int, windows: int, device: str) -> Any:
    """The model, and windows to train on, to choose by, to report."""
    torch.set_num_threads(1)
    loaded = load_model(model, dtype="float32", device=device)
    pages = texts(data)
    parts = [[p for i, p in enumerate(pages) if i % 5 in kept] for kept in ((0, 1, 2), (3,), (4,))]
    cut = [Tokens.from_documents(part, loaded.tokenizer, length=length) for part in parts]
    return loaded.model, cut[0], cut[1].slice(windows), cut[2].slice(windows)


def device_of(name: str) -> str:
    """This process's GPU of those there are."""
    count = torch.cuda.device_count() if name == "cuda" else 0
    workers = [int(part) for part in current_process().name.split("-") if part.isdigit()]
    return f"cuda:{workers[-1] % count}" if count and workers else name


def train(given: argparse.Namespace, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """One training: losses on both held-out parts."""
    place = device_of(given.device)
    model, data, choose, report = bench(given.model, given.data, given.length, given.windows, place)
    if arm == "untuned":
        return {
            "arm": arm, "lr": 0.0, "seed": 0, "share": "nothing trained", "seconds": 0.0,
            "choose": score(model, choose).loss, "report": score(model, report).loss,
        }  # fmt: skip
    shared = {"steps": given.steps, "batch_size": given.batch, "lr": lr, "seed": seed}
    began = time.perf_counter()
    work = method(arm, given.rank, given.sparsity, shared).apply(model, data)
    seconds = time.perf_counter() - began
    try:
        return {
            "arm": arm, "lr": lr, "seed": seed, "seconds": seconds,
            "share": f"{work.share:.2%} trained", "sparsity": work.report().sparsity,
            "choose": score(model, choose).loss, "report": score(model, report).loss,
        }  # fmt: skip
    finally:
        work.restore()


def cells(given: argparse.Namespace) -> list[tuple[str, float, int]]:
    """Every training, first seeds first."""
    found = [("untuned", 0.0, 0)]
    for seed in range(given.seeds):
        for arm in given.arm:
            tenfold = 10.0 if arm in ("magnitude", "random", "dense") else 1.0
            found += [(arm, round(lr * tenfold, 6), seed) for lr in given.lr]
    return found


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All trainings begun within the time, as they end."""
    rows: list[dict[str, Any]] = []
    began, left = time.perf_counter(), cells(given)

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print(
            f"{row['arm']:>10} lr {row['lr']:<8g} seed {row['seed']}: loss {row['report']:.4f}, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )

    if given.jobs == 1:
        for cell in left:
            if time.perf_counter() - began < given.seconds:
                note(train(given, *cell))
        return rows
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(train, given, *cell) for cell in left[: given.jobs]}
        left = left[given.jobs :]
        while running:
            done = next(as_completed(running))
            running.remove(done)
            if left and time.perf_counter() - began < given.seconds:
                running.add(pool.submit(train, given, *left.pop(0)))
            if (failure := done.exception()) is not None:
                print(f"{type(failure).__name__}: {failure}", flush=True)
            else:
                note(done.result())
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    """The best rate of every arm, by the part to choose by, and its losses on the other."""
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        by_rate = {
            lr: [row for row in mine if row["lr"] == lr]
            for lr in sorted({row["lr"] for row in mine})
        }
        most = max(map(len, by_rate.values()))
        full = {lr: found for lr, found in by_rate.items() if len(found) == most}
        best = min(full, key=lambda lr: sum(r["choose"] for r in full[lr]))
        losses = [row["report"] for row in sorted(full[best], key=lambda r: r["seed"])]
        mean = sum(losses) / len(losses)
        print(
            f"{arm:>10} lr {best:<8g} loss {mean:.4f} ({', '.join(f'{x:.4f}' for x in losses)}); "
            f"{full[best][0]['share']}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--data")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = measure(given)
    table(rows)
    if given.json is not None:
        setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
        given.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
