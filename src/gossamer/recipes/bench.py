"""The bench a comparison runs on: one model, its texts, its dense predictions, one cell a time."""

import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gossamer.core import check_count
from gossamer.evaluate import Reference, Speed, footprint, score, speed
from gossamer.execute import accelerate
from gossamer.models import (
    Applied,
    Progress,
    Tokens,
    check_vocabulary,
    context_length,
    find_sites,
    find_tokenizer,
    halves,
    read_documents,
)
from gossamer.recipes.cells import Cell
from gossamer.recipes.recipe import load

__all__ = ["Bench", "Setup"]


@dataclass(frozen=True)
class Setup:
    """All that a worker needs to build a bench; plain values, so it can travel.

    Parameters
    ----------
    model : source as for :func:`gossamer.load`. dtype, device : how to load it.
    data : text to evaluate on, or None for the packaged held-out text.
    calibration : text to calibrate on. None takes the packaged calibration text, or, where
        ``data`` is given, its first half; the second half is then evaluated.
    samples, length : calibration windows and the tokens of every window.
    windows : windows evaluated, the first of the text.
    batch_size : windows per forward pass. seed : draws calibration windows.
    threads : CPU threads of a worker, or None to leave them.
    timed : measure speed where a method really runs faster.
    accelerate : run pruned weights on the kernels that measure fastest, and time that.
    """

    model: str
    dtype: str | None = None
    device: str = "cpu"
    data: str | None = None
    calibration: str | None = None
    samples: int = 32
    length: int = 512
    windows: int = 32
    batch_size: int = 8
    seed: int = 0
    threads: int | None = None
    timed: bool = True
    allow_pickle: bool = False
    accelerate: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "windows", "batch_size"):
            check_count(name, getattr(self, name), 1)
        check_count("length", self.length, 2)
        check_count("seed", self.seed, 0)


_REFERENCE_BYTES = 128 * 2**20
"""Dense predictions kept on disk: thousands of positions, at a small share of a cell's time."""


class Bench:
    """Runs cells one after the other on one model and gives it back unchanged each time.

    Attributes
    ----------
    model, tokenizer : what is compared on. evaluation, calibration : its tokens.
    """

    def __init__(
        self,
        setup: Setup,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        progress: Progress | None = None,
    ) -> None:
        self.setup = setup
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        if model is None:
            loaded = load(
                setup.model,
                dtype=setup.dtype,
                device=setup.device,
                allow_pickle=setup.allow_pickle,
            )
            model, tokenizer = loaded.model, loaded.tokenizer
        self.model: Any = model
        self.tokenizer = find_tokenizer(self.model) if tokenizer is None else tokenizer
        self.sites = find_sites(self.model)
        # Of the dense model: a method may put other modules in the place of the matrices.
        self.bytes_blocks = footprint(self.model, sites=self.sites).bytes_blocks
        self.calibration, self.evaluation = self._texts()
        self.reference = Reference.record(
            self.model,
            self.evaluation,
            max_bytes=_REFERENCE_BYTES,
            batch_size=setup.batch_size,
            progress=progress,
        )

    def _texts(self) -> tuple[Tokens, Tokens]:
        setup = self.setup
        length = min(setup.length, context_length(self.model) or setup.length)
        evaluated = read_documents(setup.data, "heldout")
        if setup.calibration is not None or setup.data is None:
            calibrated = read_documents(setup.calibration, "calibration")
        else:
            calibrated, evaluated = halves(evaluated)
        calibration = Tokens.from_documents(
            calibrated, self.tokenizer, length=length, samples=setup.samples, seed=setup.seed
        )
        evaluation = Tokens.from_documents(evaluated, self.tokenizer, length=length)
        for tokens in (calibration, evaluation):
            check_vocabulary(tokens, self.model)
        return calibration, evaluation.slice(setup.windows)

    def close(self) -> None:
        """Free the disk space of the dense predictions."""
        self.reference.close()

    def run(self, cell: Cell, progress: Progress | None = None) -> dict[str, Any]:
        """The row of one cell; the model is dense again afterwards, whatever happens."""
        start = time.perf_counter()
        with ExitStack() as stack:
            applied: Applied | None = None
            if cell.method is not None:
                applied = stack.enter_context(cell.method.apply(self.model, self.calibration))
            row = self._row(cell, applied, progress)
        if cell.method is not None and row["tokens_per_second"] is not None:
            # Timed on the restored model straight after: the machine's mood is the same for both.
            row["dense_tokens_per_second"] = round(self._speed().decode.median, 2)
        row["seconds"] = round(time.perf_counter() - start, 3)
        return row

    def _speed(self) -> Speed:
        prompt = max(1, self.evaluation.length - 32)
        return speed(self.model, prompt_tokens=prompt, new_tokens=32, repeats=3)

    def _row(
        self, cell: Cell, applied: Applied | None, progress: Progress | None
    ) -> dict[str, Any]:
        setup = self.setup
        with nullcontext() if applied is None else applied.measuring():
            found = score(
                self.model,
                self.evaluation,
                reference=self.reference,
                batch_size=setup.batch_size,
                progress=progress,
            )
        sizes = footprint(self.model, applied, context=self.evaluation.length, sites=self.sites)
        report = None if applied is None else applied.report()
        simulated = applied is not None and applied.simulated
        rate, moved, note = None, sizes.bytes_moved, None
        if setup.timed and not simulated:
            rate = self._speed()
        elif simulated and setup.accelerate and report and report.unit == "weights":
            with accelerate(self.model, keep_dense=True, report=None) as faster:
                simulated = not faster.layers
                moved += faster.bytes_moved() - faster.dense_bytes
                note = str(faster).splitlines()[0]
                if setup.timed and not simulated:
                    rate = self._speed()
        return {
            "method": cell.label,
            "family": cell.method.card.family if cell.method else None,
            "sparsity": cell.sparsity,
            "achieved_sparsity": 0.0 if report is None else report.sparsity,
            "sparsity_all": 0.0 if report is None else report.sparsity_all,
            "unit": None if report is None else report.unit,
            "pattern": cell.pattern,
            "loss": _finite(found.loss),
            "perplexity": _finite(found.perplexity),
            "kl": _finite(found.kl),
            "agreement": found.agreement,
            "tokens": found.tokens,
            "context": found.context,
            "calibration": f"{len(self.calibration)} windows of {self.calibration.length} tokens",
            "kl_positions": len(self.reference.positions),
            "bytes_stored": sizes.bytes_stored,
            "bytes_moved": moved,
            "bytes_moved_limit": sizes.bytes_moved_limit,
            "bytes_blocks": self.bytes_blocks,
            "tokens_per_second": None if rate is None else round(rate.decode.median, 2),
            "dense_tokens_per_second": None,
            "prefill_tokens_per_second": None if rate is None else round(rate.prefill.median, 2),
            "simulated": simulated,
            "seed": cell.seed,
            "settings": cell.method.to_dict() if cell.method else {},
            "model_parameters": sizes.parameters,
            "layers": [] if report is None else [_layer(row) for row in report.rows],
            "note": None if report is None else _joined(report.notes, report.warnings, note),
            "warnings": [] if report is None else list(report.warnings),
        }


def _joined(notes: tuple[str, ...], warnings: tuple[str, ...], own: str | None) -> str | None:
    return "; ".join([*notes, *warnings, *([own] if own else [])]) or None


def _finite(value: float | None) -> float | None:
    """JSON has no NaN or infinity: a destroyed model's figure is null."""
    return value if value is not None and abs(value) < float("inf") else None


def _layer(row: Any) -> dict[str, Any]:
    return {
        "name": row.name,
        "role": row.role,
        "block": row.block,
        "sparsity": round(row.sparsity, 6),
    }
