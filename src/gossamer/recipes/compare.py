"""Compare: the main job. Methods side by side on one model, always with dense and random.

A comparison with an output folder is a run: ``run.json`` says what it is, ``cells/`` holds one
record per finished cell, written atomically as it ends. Killed and started again with the same
arguments, it goes on where it was.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core import GossamerError, Pattern
from gossamer.evaluate.environment import environment
from gossamer.models import Progress
from gossamer.models.store import write_json
from gossamer.recipes.bench import Bench, Setup
from gossamer.recipes.cells import Cell, grid
from gossamer.recipes.engines import Engine, on_processes, on_ray

__all__ = ["Comparison", "compare"]

Row = dict[str, Any]
OnRow = Callable[[Row, int, int], None]


class Comparison:
    """A planned comparison; :meth:`run` yields the rows as they come.

    Parameters
    ----------
    setup : model, texts, seeds. cells : what to run. out : folder of the run, or None.
    command : how to repeat it, for the report.
    """

    def __init__(
        self, setup: Setup, cells: Sequence[Cell], out: str | Path | None = None, command: str = ""
    ) -> None:
        self.setup, self.cells, self.command = setup, list(cells), command
        self.out = None if out is None else Path(out)
        if self.out is not None:
            self._open()

    @property
    def signature(self) -> dict[str, Any]:
        """What makes two runs the same: the setup (not where it runs), and the version."""
        plain = {k: v for k, v in asdict(self.setup).items() if k not in ("threads", "timed")}
        return {"gossamer": version("gossamer"), **plain}

    def _open(self) -> None:
        assert self.out is not None
        file = self.out / "run.json"
        if file.is_file():
            try:
                held = json.loads(file.read_text(encoding="utf-8"))["signature"]
            except (ValueError, KeyError):
                raise GossamerError(
                    f"{file} is damaged; name another folder or remove it"
                ) from None
            if held != self.signature:
                names = sorted(
                    k for k in held | self.signature if held.get(k) != self.signature.get(k)
                )
                raise GossamerError(
                    f"{self.out} holds a different run ({', '.join(names)} differ); "
                    "name another folder or remove it"
                )
            return
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise GossamerError(f"{self.out} exists and holds no run; name a new folder")
        try:
            (self.out / "cells").mkdir(parents=True, exist_ok=True)
            write_json(file, {"signature": self.signature, "command": self.command})
        except OSError as error:
            raise GossamerError(
                f"cannot write to {self.out}: {error.strerror}; name a folder you may write to"
            ) from None

    def _path(self, cell: Cell) -> Path | None:
        return None if self.out is None else self.out / "cells" / f"{cell.name}.json"

    def _held(self, cell: Cell) -> Row | None:
        path = self._path(cell)
        if path is None or not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None

    def run(
        self,
        *,
        jobs: int = 1,
        engine: Engine = "local",
        model: nn.Module | None = None,
        tokenizer: Any = None,
        progress: Progress | None = None,
        on_row: OnRow | None = None,
    ) -> list[Row]:
        """Run what is missing and return all rows in the order of the cells.

        Parameters
        ----------
        jobs : cells at once, each in its own process with its own copy of the model.
        engine : ``local`` or ``ray``.
        model, tokenizer : use these objects instead of loading ``setup.model``; jobs must be 1.
        on_row : called with (row, rows done, rows in all) as each cell ends.
        """
        if jobs < 1:
            raise GossamerError(f"jobs is {jobs}; give a whole number, at least 1")
        if engine not in ("local", "ray"):
            raise GossamerError(f"engine is {engine!r}; choose local or ray")
        if model is not None and (jobs > 1 or engine == "ray"):
            raise GossamerError("a model object runs in this process; give jobs=1, engine='local'")
        rows: dict[str, Row] = {}
        for cell in self.cells:
            if (held := self._held(cell)) is not None:
                rows[cell.name] = held
        left = [cell for cell in self.cells if cell.name not in rows]
        if rows and on_row is not None:
            on_row(next(iter(rows.values())), len(rows), len(self.cells))
        for cell, row in self._rows(left, jobs, engine, model, tokenizer, progress):
            self._write(cell, row)
            rows[cell.name] = row
            if on_row is not None:
                on_row(row, len(rows), len(self.cells))
        return [rows[cell.name] for cell in self.cells]

    def _rows(
        self,
        cells: Sequence[Cell],
        jobs: int,
        engine: Engine,
        model: nn.Module | None,
        tokenizer: Any,
        progress: Progress | None,
    ) -> Iterator[tuple[Cell, Row]]:
        if not cells:
            return
        if engine == "ray":
            yield from on_ray(self.setup, cells, jobs)
        elif jobs > 1:
            yield from on_processes(self.setup, cells, jobs)
        else:
            bench = Bench(self.setup, model, tokenizer, progress)
            try:
                for cell in cells:
                    yield cell, bench.run(cell, progress)
            finally:
                bench.close()

    def _write(self, cell: Cell, row: Row) -> None:
        path = self._path(cell)
        if path is None:
            return
        try:
            write_json(path, row)
        except OSError as error:
            raise GossamerError(
                f"cannot write {path}: {error.strerror}; free space and run again to resume"
            ) from None

    def finish(self, rows: Sequence[Row], started: float) -> dict[str, Any]:
        """Write ``rows.json``, from which the report is built; return its content."""
        content = {"meta": self.meta(rows, started), "rows": list(rows)}
        if self.out is not None:
            write_json(self.out / "rows.json", content)
        return content

    def meta(self, rows: Sequence[Row], started: float) -> dict[str, Any]:
        """What the report says of the run as a whole."""
        setup = self.setup
        where = setup.data or "the packaged held-out text"
        return {
            "model": setup.model,
            "parameters": rows[0]["model_parameters"] if rows else None,
            "data": where,
            "context": setup.length,
            "tokens": setup.windows * (setup.length - 1),
            "calibration": f"{setup.samples} windows of {setup.length} tokens",
            "commands": [self.command] if self.command else [],
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 1),
            "cells_seconds": round(sum(row["seconds"] for row in rows), 1),
            "seed": setup.seed,
            **environment(setup.device),
        }


def compare(
    model: str | nn.Module,
    methods: Sequence[str],
    *,
    sparsity: float | Sequence[float] = 0.5,
    pattern: str | Pattern | Sequence[str | Pattern] = (),
    out: str | Path | None = None,
    tokenizer: Any = None,
    jobs: int = 1,
    engine: Engine = "local",
    progress: Progress | None = None,
    on_row: OnRow | None = None,
    **setup: Any,
) -> list[Row]:
    """Compare methods on a model; dense and random are always included.

    Parameters
    ----------
    model : ``nano``, a folder, a hub id, or a model object (then give its tokenizer).
    methods : text forms such as ``"wanda"`` or ``"magnitude:allocation=erk"``.
    sparsity, pattern : one or several; every method runs at all that apply to it.
    out : folder for the records; an unfinished run there is resumed. ``gossamer report OUT``
        makes the page.
    setup : further fields of :class:`gossamer.recipes.bench.Setup`: data, samples, seed ...

    Returns
    -------
    One row per cell, in order: method, sparsity, achieved_sparsity, pattern, perplexity, kl,
    agreement, bytes_stored, bytes_moved, tokens_per_second, simulated, seconds, seed and more.

    Raises
    ------
    GossamerError
        For unknown names or values out of range, before anything runs.
    """
    started = time.time()
    sparsities = [sparsity] if isinstance(sparsity, int | float) else list(sparsity)
    patterns = [pattern] if isinstance(pattern, str | Pattern) else list(pattern)
    source = model if isinstance(model, str) else str(getattr(model, "name_or_path", "model"))
    plan = Setup(model=source, **setup)
    cells = grid(list(methods), sparsities, patterns, plan.seed)
    run = Comparison(plan, cells, out, command=" ".join(sys.argv))
    rows = run.run(
        jobs=jobs,
        engine=engine,
        model=None if isinstance(model, str) else model,
        tokenizer=tokenizer,
        progress=progress,
        on_row=on_row,
    )
    run.finish(rows, started)
    return rows
