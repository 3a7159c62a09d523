"""Compare: the main job. Methods side by side on one model, always with dense and random.

A comparison with an output folder is a run: ``run.json`` says what it is, ``cells/`` holds one
record per finished cell, written atomically as it ends. Killed and started again with the same
arguments, it goes on where it was.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core import GossamerError, Pattern, check_sparsity, unknown
from gossamer.evaluate.environment import environment
from gossamer.models import Progress, resolve
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
    command : how to repeat it, for the report. model : the object, where ``run`` gets one.
    """

    def __init__(
        self,
        setup: Setup,
        cells: Sequence[Cell],
        out: str | Path | None = None,
        command: str = "",
        model: nn.Module | None = None,
    ) -> None:
        self.setup, self.cells, self.command = setup, list(cells), command
        self._content = {} if out is None else self._fingerprints(model)
        self.out = None if out is None else Path(out)
        if self.out is not None:
            self._open()

    @property
    def signature(self) -> dict[str, Any]:
        """What makes two runs the same: the setup (not where it runs), and the version."""
        plain = {k: v for k, v in asdict(self.setup).items() if k != "threads"}
        return {"gossamer": version("gossamer"), **plain, **self._content}

    def _fingerprints(self, model: nn.Module | None) -> dict[str, Any]:
        """What the paths of the setup hold now: a name alone would let two runs mix."""
        setup = self.setup
        if model is None:
            folder = resolve(setup.model, allow_pickle=setup.allow_pickle)
            known = _of_folder(folder)
        else:
            known = _of_model(model)
        texts = {
            f"{name} content": None if path is None else _digest(Path(path))
            for name, path in (("data", setup.data), ("calibration", setup.calibration))
        }
        return {"model content": known, **texts}

    def _open(self) -> None:
        assert self.out is not None
        file = self.out / "run.json"
        if file.is_file():
            try:
                held = json.loads(file.read_text(encoding="utf-8"))["signature"]
                if not isinstance(held, dict):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
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
            row = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None
        # A damaged record is run again.
        whole = isinstance(row, dict) and {"method", "loss", "seconds", "tokens"} <= row.keys()
        return row if whole else None

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
            try:
                write_json(self.out / "rows.json", content)
            except OSError as error:
                raise GossamerError(
                    f"cannot write {self.out / 'rows.json'}: {error.strerror}; "
                    "free space and run again to resume"
                ) from None
        return content

    def meta(self, rows: Sequence[Row], started: float) -> dict[str, Any]:
        """What the report says of the run as a whole."""
        setup = self.setup
        where = setup.data or "the packaged held-out text"
        return {
            "model": setup.model,
            "parameters": rows[0]["model_parameters"] if rows else None,
            "data": where,
            **{k: rows[0][k] if rows else None for k in ("context", "tokens", "calibration")},
            "commands": [self.command] if self.command else [],
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - started, 1),
            "cells_seconds": round(sum(row["seconds"] for row in rows), 1),
            "seed": setup.seed,
            **environment(setup.device),
        }


def _digest(path: Path) -> str | None:
    """Hash of a file's content; None where there is no file (the reader will say so)."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_folder(folder: Path) -> str:
    """Hash of a model folder: small files whole, large ones by size and both ends."""
    end = 1 << 20
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".safetensors", ".bin"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(end))
            if size > end:
                file.seek(max(end, size - end))
                digest.update(file.read(end))
    return digest.hexdigest()


def _of_model(model: nn.Module) -> str:
    """Hash of a model object: names, shapes and sums of its parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total = float(parameter.detach().sum(dtype=torch.float64))
        digest.update(f"{name} {tuple(parameter.shape)} {total!r} ".encode())
    return digest.hexdigest()


def compare(
    model: str | Path | nn.Module,
    methods: str | Sequence[str],
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
    names = [methods] if isinstance(methods, str) else list(methods)
    if not all(isinstance(name, str) for name in names):
        raise GossamerError(
            "methods are named by text, such as 'wanda' or 'wanda:pattern=2:4', not by objects"
        )
    sparsities = [sparsity] if isinstance(sparsity, int | float | str) else list(sparsity)
    patterns = [pattern] if isinstance(pattern, str | Pattern) else list(pattern)
    known = tuple(f.name for f in fields(Setup) if f.name != "model")
    for name in setup:
        if name not in known:
            raise unknown("option", name, known)
    source = str(model) if isinstance(model, str | Path) else None
    here = None if isinstance(model, str | Path) else model
    plan = Setup(model=source or str(getattr(model, "name_or_path", "model")), **setup)
    cells = grid(names, [check_sparsity(s) for s in sparsities], patterns, plan.seed)
    run = Comparison(plan, cells, out, command=" ".join(sys.argv), model=here)
    rows = run.run(
        jobs=jobs,
        engine=engine,
        model=here,
        tokenizer=tokenizer,
        progress=progress,
        on_row=on_row,
    )
    run.finish(rows, started)
    return rows
