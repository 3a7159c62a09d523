"""Build: from the rows of a comparison to one page that needs nothing else."""

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gossamer.core import GossamerError
from gossamer.report import numbers
from gossamer.report.charts import quality_chart, series_class, speed_chart
from gossamer.report.findings import findings, join
from gossamer.report.layers import heat_key, layer_maps
from gossamer.report.rows import BLOCKS, USABLE, Row, Series, Table

__all__ = ["build", "render", "write_page"]

_META = (
    "model",
    "parameters",
    "data",
    "context",
    "tokens",
    "commands",
    "device",
    "threads",
    "seconds",
)
_CLAIM = (
    "method", "claim", "sentence", "experiment", "paper", "ours", "verdict", "seeds", "device",
    "commit", "date", "tier",
)  # fmt: skip
VERDICTS = ("holds", "weaker", "fails", "not testable here")


def build(
    rows: Sequence[Mapping[str, Any]],
    claims: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    out: str | Path,
) -> Path:
    """Write the report of a comparison: one HTML file, complete in itself.

    Parameters
    ----------
    rows : of :func:`gossamer.compare`; a figure that is null, NaN or infinite marks a model that
        no longer predicts. Simulated rows get no speed, whatever they carry.
    claims : records of ``gossamer claim``.
    meta : model, data, context, tokens, commands, versions, device, threads, commit, started,
        seconds ...; what is missing is left out of the page.
    out : the file, or a folder that gets ``index.html``. Written whole or not at all.

    Returns
    -------
    Path of the file.

    Raises
    ------
    GossamerError
        If a row names no method, or the file cannot be written.
    """
    return write_page(render(rows, claims, meta), out)


def write_page(text: str, out: str | Path) -> Path:
    """Write a page whole or not at all.

    Parameters
    ----------
    out : the file, or a folder that gets ``index.html``.

    Raises
    ------
    GossamerError
        If the file cannot be written.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        path = path / "index.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise GossamerError(
            f"cannot write to {path.parent}: {error.strerror}; name a folder you may write to"
        ) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise GossamerError(
            f"cannot write {path}: {error.strerror}; free space or name another file"
        ) from None
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def render(
    rows: Sequence[Mapping[str, Any]],
    claims: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
) -> str:
    """The page of :func:`build` as text."""
    table = Table(rows)
    maps, even, left_out = layer_maps(table)
    timed = [r for r in table.rows if r.tokens_per_second is not None]
    drawable = [r for r in timed if r.perplexity is not None and r.speedup is not None]
    verdicts = Counter(str(claim.get("verdict", "")) for claim in claims)
    context = {
        "meta": {**dict.fromkeys(_META), **meta},
        "model": _title(str(meta.get("model") or "model")),
        "notes": [row for row in table.rows if row.note],
        "table": table,
        "dense": table.dense,
        "methods": len({row.method for row in table.rows if row.role == "method"}),
        "findings": findings(table),
        "best": table.best(),
        "series": table.series(),
        "charts": _quality_charts(table),
        "speed_charts": [
            (shape, speed_chart(table, *size)) for shape, size in _SIZES if len(drawable) > 1
        ],
        "timed": timed,
        "simulated": [row for row in table.rows if row.simulated],
        "maps": maps,
        "even": sorted({table.name(row) for row in even}),
        "maps_left_out": left_out,
        "claims": [{**dict.fromkeys(_CLAIM), **claim} for claim in claims],
        "verdicts": [(name, verdicts[name]) for name in VERDICTS if verdicts[name]],
        "usable": USABLE,
        "blocks": BLOCKS,
        "facts": _facts(meta),
    }
    return _environment().get_template("page.html.j2").render(context)


_SIZES = (("wide", (1040, 400)), ("narrow", (360, 300)))
_HALF = (("wide", (505, 320)), ("narrow", (360, 300)))


def _quality_charts(table: Table) -> list[tuple[str, list[Series], list[tuple[str, Any]], bool]]:
    """(unit, lines, [(shape, drawing)], full width) for each unit; few lines take half a page."""
    units = table.series()
    small = [unit for unit, lines in units.items() if len(lines) <= 4]
    # In pairs: a lone small chart would leave half a line empty.
    halves = set(small[len(small) % 2 :])
    charts = []
    for unit, lines in units.items():
        sizes = _HALF if unit in halves else _SIZES
        drawn = [(shape, quality_chart(table, lines, unit, *size)) for shape, size in sizes]
        charts.append((unit, lines, drawn, unit not in halves))
    return charts


def _title(model: str) -> str:
    """The model's name: a hub id as it is, of a folder's path the last part."""
    parts = [part for part in model.replace("\\", "/").split("/") if part]
    return parts[-1] if parts and (len(parts) > 2 or model[:1] in "./~") else model


def _facts(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the numbers were measured with, as (name, value)."""
    versions = meta.get("versions") or {}
    threads, cores = meta.get("threads"), meta.get("cores")
    processor = f"{threads} of {cores} cores" if threads and cores else threads
    facts = [
        ("Model", meta.get("model")),
        ("Evaluated on", meta.get("data")),
        ("Calibrated on", meta.get("calibration")),
        ("Device", meta.get("device")),
        ("Threads", processor),
        ("Commit", meta.get("commit")),
        ("Seed", meta.get("seed")),
        ("Started", meta.get("started")),
        ("Took", numbers.duration(meta["seconds"]) if meta.get("seconds") is not None else None),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _relative(row: Row, table: Table, field: str) -> str:
    """A size as a percentage of dense, or nothing to say."""
    base = getattr(table.dense, field) if table.dense else None
    value = getattr(row, field)
    if not base or value is None or row.dense:
        return ""
    return numbers.percent(value / base, 0)


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("gossamer.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "fixed", "megabytes", "percent", "perplexity", "rate", "duration"):
        env.filters[name] = getattr(numbers, name)
    env.filters["join_words"] = lambda words: join(list(words)) if words else ""
    env.filters["series_class"] = series_class
    env.globals |= {"relative": _relative, "heat_key": heat_key}
    return env
