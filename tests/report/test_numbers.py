import pytest

from gossamer.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not finite"),
        (7.123, "7.12"),
        (999.994, "999.99"),
        (12345.6, "12,346"),
        (2.5e9, "2.5 × 10⁹"),
        (1e300, "1.0 × 10³⁰⁰"),
    ],
)
def test_perplexity(value: float | None, text: str):
    assert numbers.perplexity(value) == text


def test_other_kinds():
    # Numbers and units are joined by a narrow space that no line breaks at.
    assert numbers.percent(0.5) == "50\u202f%"
    assert numbers.percent(0.123) == "12.3\u202f%"
    assert numbers.percent(0.5, 1) == "50.0\u202f%"
    assert numbers.fixed(-0.5, 3, sign=True) == "−0.500"
    assert numbers.fixed(0.5, 2, sign=True) == "+0.50"
    assert numbers.megabytes(13_200_000) == "13.2\u202fMB"
    assert numbers.megabytes(9_610_000) == "9.61\u202fMB"
    assert numbers.megabytes(2_000) == "2.00\u202fkB"
    assert numbers.megabytes(12) == "12 B"
    assert numbers.rate(1234.5) == "1,234"
    assert numbers.rate(12.34) == "12.3"
    assert numbers.count(6_612_480) == "6.61\u202fM"
    assert numbers.duration(59.04) == "59.0 s"
    assert numbers.duration(262.3) == "4 min 22 s"
    assert numbers.duration(7260) == "2 h 1 min"
    for kind in (numbers.percent, numbers.megabytes, numbers.rate, numbers.count, numbers.duration):
        assert kind(None) == "–"
    assert numbers.fixed(None, 2) == "–"
