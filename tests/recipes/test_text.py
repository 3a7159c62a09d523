"""The YAML subset: numbers of YAML 1.2, no aliases, no repeated keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.recipes import text


def test_scalars():
    assert text.parse("{model: nano, a: nullable, b: truer, c: ~x, d: 1a}") == {
        "model": "nano", "a": "nullable", "b": "truer", "c": "~x", "d": "1a",
    }  # fmt: skip
    assert text.parse("pattern: 2:4") == {"pattern": "2:4"}
    values = text.parse("{a: 1, b: 0.5, c: true, d: null, e: yes, f: 1e-3, g: 2001-01-01, h: ~}")
    assert values == {
        "a": 1, "b": 0.5, "c": True, "d": None, "e": "yes", "f": 1e-3, "g": "2001-01-01", "h": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a: 1\na: 2", "line 2: key 'a' is given twice"),
        ("a: &x 1\nb: *x", "line 2: aliases"),
        ("a: [1, 2", "line 1"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("x: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "x" * text.MAX_BYTES, "at most 1,048,576 bytes"),
    ],
)
def test_what_is_refused(source, message):
    with pytest.raises(GossamerError, match=message):
        text.parse(source)


@given(
    st.dictionaries(
        st.text("abcdefgh_", min_size=1),
        st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()),
    )
)
def test_round_trip(values):
    assert text.parse(text.dump(values)) == (values or {})
