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


def reads(method: str, sparsity: float, spared: float, perplexity: float) -> dict[str, Any]:
    """A row of weight reads beside SIZED: its blocks have 800 of the 1000 bytes moved."""
    return row(
        method, sparsity, perplexity, family="activations", unit="weight reads",
        bytes_moved=1000, bytes_moved_limit=1000 - 800 * spared, bytes_blocks=800,
    )  # fmt: skip


SIZED = {**DENSE, "bytes_moved": 1000, "bytes_moved_limit": 1000}


def test_weight_reads_are_ranked_by_the_bytes_spared_not_by_each_methods_own_share():
    rows = [
        SIZED,
        reads("cett", 0.5, 0.121, 5.1),
        reads("cats", 0.5, 0.245, 5.4),
        reads("chess", 0.5, 0.327, 5.6),
        reads("teal", 0.5, 0.495, 6.0),
    ]
    table = Table(rows)
    assert [r.read for r in table.rows[1:]] == pytest.approx([0.879, 0.755, 0.673, 0.505])
    assert table.rows[0].read is None
    assert table.best() == set()
    text = "\n".join(findings(table))
    assert "is best" not in text
    assert "level" not in text
    rows.append(reads("teal", 0.12, 0.125, 5.02))
    table = Table(rows)
    assert table.best() == {5}
    text = "\n".join(findings(table)).replace("\u202f", " ")
    assert "With about 12 % of block weight bytes unread, teal is best: perplexity 5.02" in text
    assert "next is cett at 5.10" in text


@pytest.mark.parametrize(("spared", "best"), [(0.11, {2}), (0.1101, set())])
def test_equal_bytes_are_those_within_a_point(spared: float, best: set[int]):
    rows = [SIZED, reads("a", 0.5, 0.10, 6.0), reads("b", 0.2, spared, 5.5)]
    assert Table(rows).best() == best


def test_one_method_alone_at_some_bytes_is_not_called_best():
    table = Table([SIZED, reads("a", 0.5, 0.30, 6.0), reads("a", 0.51, 0.305, 6.2)])
    assert table.best() == set()
    assert "level" not in "\n".join(findings(table))


def test_bytes_are_spared_also_where_the_row_runs_on_a_kernel():
    real = {**reads("a", 0.5, 0.3, 6.0), "simulated": False}
    real["bytes_moved"] = real["bytes_moved_limit"]
    assert Table([SIZED, real]).rows[1].spared == pytest.approx(0.3)


def test_weight_reads_of_unknown_bytes_are_not_ranked():
    table = Table([DENSE, *(row(m, 0.5, p, family="activations") for m, p in [("a", 6), ("b", 7)])])
    assert table.best() == set()
    assert table.groups() == {}
    assert "is best" not in "\n".join(findings(table))


def test_lines_and_limits_of_weight_reads_are_over_bytes():
    rows = [SIZED, reads("a", 0.9, 0.20, 20.0), reads("a", 0.5, 0.121, 6.0)]
    table = Table(rows)
    (line,) = table.series()["block weight bytes"]
    assert [r.share for r in line.rows] == pytest.approx([0.121, 0.20])
    text = "\n".join(findings(table)).replace("\u202f", " ")
    assert "a holds to 12 % and breaks at 20 % of block weight bytes unread" in text
