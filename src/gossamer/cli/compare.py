"""``gossamer compare``: methods side by side, with dense and random, resumable."""

import shlex
import sys
import time
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from gossamer.cli.show import bar, console, print_json, table, warn
from gossamer.recipes.bench import Setup
from gossamer.recipes.cells import grid
from gossamer.recipes.compare import Comparison
from gossamer.report import from_run
from gossamer.report.rows import Table

__all__ = ["compare"]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[float]:
    from gossamer.core import check_sparsity

    return [check_sparsity(word) for word in _words(text)]  # type: ignore[arg-type]


def compare(
    model: str,
    *,
    methods: str,
    sparsity: str = "0.5",
    pattern: str = "",
    data: str | None = None,
    calibration: str | None = None,
    out: str | None = None,
    samples: int = 32,
    length: int = 512,
    windows: int = 32,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    jobs: int = 1,
    engine: Literal["local", "ray"] = "local",
    timed: bool = True,
    accelerate: Annotated[bool, Parameter(negative=())] = False,
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Compare methods on one model; dense and random are always included.

    A run with --out can be interrupted, even killed, and started again: it resumes.

    Parameters
    ----------
    model
        nano (packaged), a folder, or a hub id.
    methods
        Keys, separated by commas; a parameter can be fixed as in magnitude:allocation=erk.
    sparsity
        Fractions removed, separated by commas.
    pattern
        Shapes, separated by commas, such as row,2:4. By default each method's own.
    data
        Text to evaluate on: a text, JSONL or parquet file. Without it the packaged text. Unless
        --calibration is given, its first half calibrates and its second half is evaluated.
    calibration
        Text to calibrate on.
    out
        Folder for the records, rows.json and the report page index.html. An unfinished run
        there is resumed: nothing that ended is run again.
    samples
        Calibration windows.
    length
        Tokens per window, at most the model's context.
    windows
        Windows evaluated.
    batch_size
        Windows per forward pass.
    seed
        Draws the calibration windows, and the methods' own randomness.
    dtype
        float32, bfloat16 or float16; by default float32 on CPU, bfloat16 on GPU.
    device
        cpu or cuda.
    jobs
        Cells at once, each with its own copy of the model.
    engine
        local, or ray for a Ray cluster ($RAY_ADDRESS; a local one without it).
    timed
        Measure speed where a method really runs faster; --no-timed skips it.
    accelerate
        Run pruned weights on the kernels that measure fastest here, and time that.
    allow_pickle
        Read a model that has only .bin weights (as tensors only, no code).
    json
        Print the rows as JSON.
    """
    started = time.time()
    setup = Setup(
        model=model,
        dtype=dtype,
        device=device,
        data=data,
        calibration=calibration,
        samples=samples,
        length=length,
        windows=windows,
        batch_size=batch_size,
        seed=seed,
        timed=timed,
        accelerate=accelerate,
        allow_pickle=allow_pickle,
    )
    cells = grid(_words(methods), _numbers(sparsity), _words(pattern), seed)
    command = shlex.join(["gossamer", *sys.argv[1:]])
    run = Comparison(setup, cells, out, command)
    with bar(f"comparing on {model}", quiet=json) as progress:
        rows = run.run(
            jobs=jobs,
            engine=engine,
            on_row=lambda row, done, total: progress(done, total, _name(row)),
        )
    content = run.finish(rows, started)
    page = None if run.out is None else from_run(run.out)
    if json:
        print_json(rows)
        return
    console.print(rows_table(content["meta"], rows))
    _footnotes(rows)
    if page is not None:
        console.print(f"report: {page}", markup=False, highlight=False)


def _name(row: dict[str, Any]) -> str:
    return f"{row['method']} {row['sparsity']:.0%}" if row["sparsity"] else row["method"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_COLUMNS = (
    # name, needs a wide terminal, text of a row
    ("method", False, lambda r: r["method"]),
    ("pattern", False, lambda r: r["pattern"] or "-"),
    ("sparsity", False, lambda r: f"{r['achieved_sparsity']:.1%}"),
    ("read", False, lambda r: _number(r["read"], ".1%")),
    ("perplexity", False, lambda r: _perplexity(r["perplexity"])),
    ("loss +", False, lambda r: _number(r["loss_more"], "+.3f")),
    ("KL", True, lambda r: _number(r["kl"], ".3f")),
    ("agree", False, lambda r: _number(r["agreement"], ".1%")),
    ("stored MB", True, lambda r: f"{r['bytes_stored'] / 1e6:.1f}"),
    ("moved MB", True, lambda r: f"{r['bytes_moved'] / 1e6:.1f}"),
    ("limit MB", True, lambda r: f"{r['bytes_moved_limit'] / 1e6:.1f}"),
    (
        "tok/s",
        False,
        lambda r: "sim." if r["simulated"] else _number(r["tokens_per_second"], ",.0f"),
    ),
    ("x dense", False, lambda r: _number(r["gain"], ".2f")),
    ("seconds", True, lambda r: f"{r['seconds']:.1f}"),
)


_SPARSE = {"read": "read", "x dense": "gain"}
"""Columns left out where no row has their figure, by the name of the figure."""


def _perplexity(value: float | None) -> str:
    return _number(value, ".2f" if value is None or value < 1000 else ",.0f")


def rows_table(meta: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    """The comparison as a table that fits the terminal."""
    dense = next((r["loss"] for r in rows if r["method"] == "dense"), None)
    known = [
        {
            **r,
            "loss_more": None if None in (r["loss"], dense) else r["loss"] - dense,
            "read": seen.read,
            # Over the dense model timed beside the row: the dense row's time is another moment's.
            "gain": None if seen.dense else seen.speedup,
        }
        for r, seen in zip(rows, Table(rows).rows, strict=True)
    ]
    columns = [
        column
        for column in _COLUMNS
        if (console.width >= 120 or not column[1])
        and (column[0] not in _SPARSE or any(r[_SPARSE[column[0]]] is not None for r in known))
    ]
    title = f"{meta['model']}: {meta['tokens']:,} held-out tokens, context {meta['context']}"
    shown = [[text(r) for _, _, text in columns] for r in known]
    return table(title, [name for name, *_ in columns], shown, right=2)


def _footnotes(rows: list[dict[str, Any]]) -> None:
    seen = Table(rows).rows
    if any(row.read is not None for row in seen):
        console.print(
            "read: share of the blocks' weight bytes a token still reads. Methods count "
            "sparsity over different matrices: compare these rows at equal read.",
            style="dim",
        )
    if any(row.speedup is not None and not row.dense for row in seen):
        console.print("x dense: speed over the dense model timed right after it.", style="dim")
    if any(r["simulated"] for r in rows):
        console.print(
            "loss +: nats per token over dense. agree: same most likely token as dense. "
            "sim.: the zeros are there but the arithmetic is dense, so no speed is claimed.",
            style="dim",
        )
    for r in rows:
        for text in r.get("warnings", ()):
            warn(f"{_name(r)}: {text}")
