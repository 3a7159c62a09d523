"""What sparse attention costs on long-context tasks: method x sparsity x task, with verdicts.

Every training-free method of the attention family, found in the package's directory, answers the
same prompts as the dense model at a ladder of sparsities; the oracle and random keys bracket them.
A cell passes when the paired bootstrap, corrected by Holm over all methods and tasks of its rung,
rejects a loss of more than --margin. Density and rho (attention mass kept) are measured on one
prompt of each task, over the causal pairs of the phases the method acts on. Then the orderings of
The Sparse Frontier (arXiv:2504.17768) are checked. Train the model first:

    python -m gossamer.models.recall.train --out recall --time-limit 560
    python benchmarks/sparse_frontier.py recall --length 1024 --samples 128 --margin 0.05
        [--ladder 0.5 0.9] [--methods quest snapkv] [--tasks niah_single ...] [--device cuda]
        [--question unseen] [--jobs 8] [--threads 1] [--out table.json]
"""

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any

import torch

from gossamer.core import GossamerError
from gossamer.evaluate.environment import environment
from gossamer.evaluate.long_context import TASKS, suite
from gossamer.evaluate.verdict import samples_needed
from gossamer.models import recall
from gossamer.recipes import frontier

_held: dict[str, Any] = {}
PREFILL_BLOCKS = ("flexprefill", "minference", "zipvl", "blasst", "oracle_top_k:block_size=32")
TASK_LIST = (*(t for t in TASKS if t != "variable_tracking"), "variable_tracking:4x2")


def prepare(options: argparse.Namespace) -> None:
    """Load model and prompts in this process; processes share out the GPUs there are."""
    torch.set_num_threads(options.threads)
    device = options.device
    if device == "cuda":
        process = current_process()._identity  # pyright: ignore[reportAttributeAccessIssue]
        device = f"cuda:{sum(process) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    loaded = recall.load(options.model, dtype=options.dtype, device=device)
    prompts = suite(
        loaded.tokenizer,
        length=options.length,
        count=options.samples,
        tasks=tuple(options.tasks),
        seed=options.seed,
    )
    _held.update(loaded=loaded, suite=prompts, options=options)


def cell(job: tuple[str, float] | None, dense: Any = None) -> frontier.Cell | str:
    """One cell; a refusal in words where the method cannot do it."""
    options = _held["options"]
    settings = {"batch_size": options.batch_size, "question": options.question}
    if job is None:
        if options.device != "cpu":
            # Run twice: the first pass pays for loading kernels.
            frontier.measure(_held["loaded"], _held["suite"], None, **settings)
        return frontier.measure(_held["loaded"], _held["suite"], None, **settings)
    name, sparsity = job
    try:
        method = frontier.at_amount(name, sparsity, options.length)
        return frontier.measure(
            _held["loaded"],
            _held["suite"],
            method,
            name=name,
            sparsity=sparsity,
            dense=dense,
            timed=options.timed,
            **settings,
        )
    except (GossamerError, RuntimeError, NotImplementedError) as error:
        return f"{name} at {sparsity}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"


def orderings(found: frontier.Frontier) -> list[str]:
    """The card's two orderings, and the controls', in sentences."""
    lines: list[str] = []
    names = list(found.passing)
    # By measured savings: methods mean different things by the same amount.
    blocks = {n: found.saved(n) for n in names if n in PREFILL_BLOCKS}
    if "quest" in found.passing and blocks:
        best, pages = max(blocks.values()), found.saved("quest")
        lines.append(
            f"decode tolerates more than prefill: quest passes while it removes {pages:.1%} of its "
            f"phase's pairs, block-sparse prefill {best:.1%} "
            f"({', '.join(f'{n} {s:.1%}' for n, s in blocks.items())}): "
            + ("holds" if pages > best else "does not hold")
        )
    at = [s for _, s in found.cells if s >= 0.9]
    if at:
        rung = min(at)
        split = [
            n
            for n, s in found.cells
            if s == rung and 0 < len(found.failed(n, s)) < len(found.tasks)
        ]
        lines.append(
            f"at {rung:g} some task fails while another passes, so a mean would hide it: "
            f"{', '.join(split) or 'no method'}: " + ("holds" if split else "does not hold")
        )
    for (name, sparsity), own in found.cells.items():
        oracle = found.cells.get(("oracle_top_k", sparsity))
        random = found.cells.get(("random_keys", sparsity))
        if oracle is None or random is None or name in frontier.CONTROLS:
            continue
        for task in found.tasks:
            row = own.rows[task]
            low, high = random.rows[task], oracle.rows[task]
            if row.score < low.score - 0.05:
                lines.append(f"{name} at {sparsity:g} is below random keys on {task}")
            # The oracle is a ceiling for what acts on the same phases and reads as little.
            alike = row.phase == high.phase and (row.density or 1) <= (high.density or 0) + 0.05
            if alike and row.score > high.score + 0.05:
                lines.append(f"{name} at {sparsity:g} is above the oracle on {task}")
    return lines


def show(found: frontier.Frontier, sparsities: list[float]) -> None:
    """The table as Markdown."""
    tasks = list(found.dense.scores)
    print(f"| method | phase | sparsity | density | rho | {' | '.join(tasks)} | passes |")
    print("|---" * (6 + len(tasks)) + "|")
    dense = [f"{found.dense.rows[t].score:.2f}" for t in tasks]
    print(f"| dense | all | 0 | 1 | 1 | {' | '.join(dense)} | |")
    for name in found.passing:
        for sparsity in sparsities:
            own = found.cells.get((name, sparsity))
            if own is None:
                continue
            rows = own.rows
            known = [r for r in rows.values() if r.density is not None and r.rho is not None]
            density = sum(r.density or 0 for r in known) / max(1, len(known))
            rho = sum(r.rho or 0 for r in known) / max(1, len(known))
            words = []
            for task in tasks:
                verdict = found.verdicts.get((name, sparsity, task))
                mark = "" if verdict is None else " ok" if verdict.passes else " no"
                words.append(f"{rows[task].score:.2f}{mark}")
            phase = next(iter(rows.values())).phase
            print(
                f"| {name} | {phase} | {sparsity:g} | {density:.3f} | {rho:.3f} | "
                f"{' | '.join(words)} | {'yes' if found.passes(name, sparsity) else 'no'} |"
            )


def main() -> None:
    """Run the cells and print table, verdicts and orderings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder of the trained recall model")
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument("--tasks", nargs="*", default=list(TASK_LIST))
    parser.add_argument("--ladder", nargs="*", type=float, default=list(frontier.LADDER))
    parser.add_argument("--question", choices=("seen", "unseen"), default="seen")
    for name, value in (
        ("length", 1024),
        ("samples", 128),
        ("batch-size", 32),
        ("seed", 0),
        ("threads", 1),
        ("jobs", 1),
        ("seconds", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--margin", type=float, default=0.05)
    parser.add_argument("--least", type=float, default=frontier.ABLE)
    parser.add_argument("--timed", action="store_true", help="time one call of each method too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    names = options.methods or [*frontier.candidates(), "oracle_top_k:block_size=32"]
    names = [*frontier.CONTROLS, *(n for n in names if n not in frontier.CONTROLS)]
    jobs = [(name, rung) for rung in options.ladder for name in names]
    needed = samples_needed(options.margin, tests=len(names) * len(options.tasks))
    print(
        f"{options.samples} prompts a task of {options.length} tokens; {needed} equal answers are "
        f"needed to pass {len(names)} methods x {len(options.tasks)} tasks at {options.margin:g}",
        flush=True,
    )
    cells: list[frontier.Cell] = []
    refused: list[str] = []

    def took(result: frontier.Cell | str) -> None:
        if isinstance(result, str):
            refused.append(result)
        else:
            cells.append(result)
            scores = " ".join(f"{t} {r.score:.2f}" for t, r in result.rows.items())
            rho = next(iter(result.rows.values())).rho
            print(
                f"{time.perf_counter() - began:.0f} s: {result.name} {result.sparsity:g} density "
                f"{result.density or 0:.3f} rho {rho or 0:.3f}: {scores}",
                flush=True,
            )

    if options.jobs == 1:
        prepare(options)
        dense = cell(None)
        assert isinstance(dense, frontier.Cell)
        for job in jobs:
            if options.seconds and time.perf_counter() - began > options.seconds:
                print(f"stopped after {options.seconds} s", file=sys.stderr)
                break
            took(cell(job, dense))
    else:
        pool = ProcessPoolExecutor(
            options.jobs, get_context("spawn"), initializer=prepare, initargs=(options,)
        )
        with pool:
            dense = pool.submit(cell, None).result()
            assert isinstance(dense, frontier.Cell)
            waiting = [pool.submit(cell, job, dense) for job in jobs]
            try:
                left = options.seconds - (time.perf_counter() - began) if options.seconds else None
                for future in as_completed(waiting, timeout=left):
                    took(future.result())
            except TimeoutError:
                print(f"stopped after {options.seconds} s", file=sys.stderr)
                for future in waiting:
                    future.cancel()
    cells.sort(key=lambda c: (names.index(c.name), c.sparsity))
    found = frontier.climb(dense, cells, margin=options.margin, least=options.least)
    show(found, sorted(options.ladder))
    if found.unable:
        print(f"dense cannot do these, so they are not judged: {', '.join(found.unable)}")
    for name, sparsity in found.passing.items():
        print(f"{name}: largest sparsity that passes every task: {sparsity:g}")
    for line in (*orderings(found), *refused):
        print(f"- {line}")
    if options.out:
        record = {
            "command": "python benchmarks/sparse_frontier.py "
            + " ".join(word.rpartition("/")[2] for word in sys.argv[1:]),
            "margin": options.margin,
            "samples": options.samples,
            "seconds": round(time.perf_counter() - began, 1),
            "rows": [
                {**row.to_dict(), "sparsity": own.sparsity}
                for own in (dense, *cells)
                for row in own.rows.values()
            ],
            "verdicts": [{**v.to_dict(), "sparsity": s} for (_, s, _), v in found.verdicts.items()],
            "passing": found.passing,
            "unable": found.unable,
            "orderings": orderings(found),
            "refused": refused,
            "environment": environment(options.device),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
