"""The comparison's table: shares of bytes and gains that were measured together."""

from typing import Any

import pytest
from rich.console import Console

from gossamer.cli.compare import rows_table

META = {"model": "nano", "tokens": 1000, "context": 128}


def row(method: str, sparsity: float = 0.0, **more: Any) -> dict[str, Any]:
    base = {
        "method": method, "pattern": None, "sparsity": sparsity, "achieved_sparsity": sparsity,
        "unit": None, "loss": 1.0, "perplexity": 2.7, "kl": 0.1, "agreement": 0.9,
        "bytes_stored": 100, "bytes_moved": 1000, "bytes_moved_limit": 1000, "bytes_blocks": 800,
        "tokens_per_second": None, "dense_tokens_per_second": None, "simulated": True,
        "seconds": 1.0,
    }  # fmt: skip
    return {**base, **more}


def cells(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    table = rows_table(META, rows)
    return {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}


DENSE = row("dense", simulated=False, tokens_per_second=50.0)


def test_rows_of_weight_reads_say_what_share_of_bytes_is_read():
    more = {"family": "activations", "unit": "weight reads"}
    found = cells(
        [
            DENSE,
            row("wanda", 0.5, family="weights", unit="weights", bytes_moved_limit=600),
            row("cett", 0.5, bytes_moved_limit=903.2, **more),
            row("teal", 0.5, bytes_moved_limit=604.0, **more),
        ]
    )
    assert found["read"] == ["-", "-", "87.9%", "50.5%"]
    assert "x dense" not in found


def test_a_gain_is_over_the_dense_model_timed_beside_the_row():
    fast = row("wanda", 0.5, simulated=False, tokens_per_second=100.0, dense_tokens_per_second=80.0)
    found = cells([DENSE, fast])
    assert found["x dense"] == ["-", "1.25"]
    assert "read" not in found


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits(monkeypatch, width):
    console = Console(width=width, record=True)
    monkeypatch.setattr("gossamer.cli.compare.console", console)
    more = {"family": "activations", "unit": "weight reads", "pattern": "per-token"}
    fast = row("teal", 0.5, simulated=False, tokens_per_second=12345.0, **more)
    fast["dense_tokens_per_second"] = 10000.0
    console.print(rows_table(META, [DENSE, {**fast, "bytes_moved_limit": 604.0}]))
    text = console.export_text()
    assert "50.5%" in text
    assert "1.23" in text
    assert "12,345" in text
