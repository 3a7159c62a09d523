from math import inf, log, nan
from typing import Any

import pytest

from gossamer.core import GossamerError
from gossamer.report.findings import findings, join
from gossamer.report.rows import Table, short_label


def row(method: str, sparsity: float = 0.0, perplexity: Any = 10.0, **more: Any) -> dict[str, Any]:
    family = None if method == "dense" else "weights"
    base = {"method": method, "family": family, "sparsity": sparsity, "perplexity": perplexity}
    return {**base, "simulated": method != "dense", **more}


DENSE = row("dense", perplexity=5.0, tokens_per_second=100.0, bytes_stored=1000)


def test_short_labels():
    assert short_label("wanda") == "wanda"
    assert short_label("magnitude:allocation=erk") == "magnitude erk"
    assert short_label("teal:allocation=greedy,seed=4") == "teal greedy 4"
    assert short_label("window:4+252") == "window 4+252"


def test_what_is_not_finite_is_none():
    table = Table([DENSE, row("a", 0.5, nan), row("b", 0.5, inf), row("c", 0.5, None)])
    assert [r.perplexity for r in table.rows] == [5.0, None, None, None]
    assert not any(table.usable(r) for r in table.rows[1:])
    assert table.times_dense(table.rows[1]) is None


def test_loss_and_perplexity_complete_each_other():
    given = Table([row("dense", perplexity=None, loss=log(5)), row("a", 0.5, 10.0)])
    assert given.rows[0].perplexity == pytest.approx(5)
    assert given.loss_over_dense(given.rows[1]) == pytest.approx(log(2))


def test_simulated_rows_have_no_speed_whatever_they_carry():
    table = Table([DENSE, row("a", 0.5, tokens_per_second=900.0)])
    assert table.rows[1].tokens_per_second is None
    assert table.rows[0].tokens_per_second == 100.0


def test_best_is_ranked_among_its_like():
    rows = [
        DENSE,
        row("random", 0.5, 6.0),
        row("a", 0.5, 8.0),
        row("b", 0.5, 7.0),
        row("c", 0.5, 7.05),  # level with b
        row("d", 0.3, 5.5),  # alone in its group
        row("a", 0.5, 9.0, pattern="2:4"),
        row("b", 0.5, 12.0, pattern="2:4"),
        row("t", 0.5, 5.1, family="activations"),
    ]
    table = Table(rows)
    assert table.best() == {3, 4, 6}


def test_series_split_by_pattern_only_where_a_method_has_several():
    rows = [
        DENSE,
        row("random", 0.5, pattern="layer"),
        row("a", 0.5, pattern="row"),
        row("a", 0.3, pattern="row"),
        row("b", 0.5, pattern="row"),
        row("b", 0.5, pattern="layer"),
        row("a", 0.5, pattern="2:4"),
        row("w", pattern="window:4+252", family="attention", achieved_sparsity=0.3),
        row("w", pattern="window:4+60", family="attention", achieved_sparsity=0.7),
    ]
    table = Table(rows)
    lines = {line.label: line for lines in table.series().values() for line in lines}
    assert list(lines) == ["random", "a", "b row", "b layer", "a 2:4", "w"]
    assert [r.sparsity for r in lines["a"].rows] == [0.3, 0.5]
    assert [r.achieved for r in lines["w"].rows] == [0.3, 0.7]
    assert list(table.series()) == ["weights", "attention pairs"]
    assert len({line.colour for line in lines.values() if line.role == "method"}) == 5
    assert table.name(table.rows[5]) == "b layer"


def test_a_row_without_a_method():
    with pytest.raises(GossamerError, match="row 2 of the results names no method"):
        Table([DENSE, {"sparsity": 0.5}])


def sentences(*rows: dict[str, Any]) -> str:
    return "\n".join(findings(Table([DENSE, *rows]))).replace("\u202f", " ")


def test_findings_name_the_best_and_the_next():
    text = sentences(row("random", 0.5, 900.0), row("a", 0.5, 8.0), row("b", 0.5, 7.0))
    assert "With 50 % of weights removed, b is best: perplexity 7.00, +0.34 nats" in text
    assert "next is a at 8.00" in text


def test_findings_call_close_rows_level():
    assert "a and b are level" in sentences(row("a", 0.5, 7.0), row("b", 0.5, 7.01))


def test_findings_say_where_a_method_breaks():
    text = sentences(
        row("a", 0.3, 6.0), row("a", 0.5, 9.9), row("a", 0.7, 10.1), row("b", 0.3, 50.0),
        row("c", 0.3, 5.5), row("c", 0.5, 6.0),
    )  # fmt: skip
    assert "a holds to 50 % and breaks at 70 %" in text
    assert "c holds at all sparsities tried, up to 50 %" in text
    assert "b is beyond it throughout" in text


def test_findings_compare_with_random():
    text = sentences(row("random", 0.5, 20.0), row("a", 0.5, 30.0), row("b", 0.5, None))
    assert "No better than random at the same sparsity: a (50 %) and b (50 %)." in text
    assert "random at" not in sentences(row("random", 0.5, 20.0), row("a", 0.5, 9.0))


def test_findings_on_speed_and_size():
    text = sentences(
        row(
            "a",
            0.5,
            simulated=False,
            tokens_per_second=150.0,
            dense_tokens_per_second=100.0,
            bytes_stored=1100,
        )
    )
    assert "Fastest is a at 50 %: 1.50× the dense model timed beside it." in text
    assert "No row is smaller on disk than dense" in text
    slow = sentences(
        row(
            "a",
            0.5,
            simulated=False,
            tokens_per_second=90.0,
            dense_tokens_per_second=100.0,
            bytes_stored=600,
        )
    )
    assert "No row decodes faster than dense" in slow
    assert "The smallest row stores 600 B, dense 1.00 kB." in slow
    assert "1 row runs the dense arithmetic" in sentences(row("a", 0.5))


def test_findings_without_anything_to_compare():
    assert "nothing to compare" in findings(Table([DENSE]))[0]
    assert "nothing to compare" in findings(Table([row("a", 0.5), row("b", 0.5)]))[0]


def test_join_counts_what_is_too_much():
    assert join(["a"]) == "a"
    assert join(["a", "b", "c"]) == "a, b and c"
    assert join(list("abcdef"), most=3) == "a, b and 4 more"
