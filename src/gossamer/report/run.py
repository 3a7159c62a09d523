"""From the folder of a comparison to its page."""

import json
from pathlib import Path
from typing import Any

from gossamer.claims.runner import ledger
from gossamer.core import GossamerError
from gossamer.report.build import build

__all__ = ["from_run"]


def from_run(folder: str | Path) -> Path:
    """Build ``index.html`` in the output folder of a comparison.

    A run that was interrupted has no ``rows.json`` yet; its finished cells are then shown.

    Raises
    ------
    GossamerError
        If the folder holds no comparison, or its files are damaged.
    """
    folder = Path(folder)
    try:
        if (folder / "rows.json").is_file():
            content = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
            rows, meta = list(content["rows"]), dict(content["meta"])
        else:
            rows, meta = _cells(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GossamerError(f"{folder} holds damaged records ({error}); run again") from None
    if not rows:
        raise GossamerError(f"{folder} holds no comparison; name the --out folder of one")
    return build(rows, ledger(), meta, folder / "index.html")


def _cells(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    paths = sorted((folder / "cells").glob("*.json"))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows.sort(key=lambda row: (row["method"] != "dense", row["method"], row["sparsity"]))
    run = folder / "run.json"
    held = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
    meta = {"model": held.get("signature", {}).get("model"), "commands": [held.get("command", "")]}
    return rows, meta
