"""States that come back: parts by type, and one line for what breaks on the way."""

from collections.abc import Mapping

import pytest

from gossamer.core import GossamerError
from gossamer.core.saved import check_parts, taking


def test_parts():
    parts = {"a": int, "b": Mapping}
    check_parts({"a": 1, "b": {}, "c": 0}, parts, "x", "y")
    for state, why in (
        (3, "no dict"),
        ({"a": 1}, "b is missing"),
        ({"a": True, "b": {}}, "a is a bool"),
        ({"a": 1, "b": []}, "b is a list"),
    ):
        with pytest.raises(GossamerError, match=f"no state of x .it.*{why}|{why}.*y.state_dict"):
            check_parts(state, parts, "x", "y")


@pytest.mark.parametrize("error", [KeyError("k"), TypeError("t\nu"), RuntimeError("r")])
def test_taking(error):
    with pytest.raises(GossamerError, match="the state is damaged") as caught, taking("y"):
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(ZeroDivisionError), taking():
        raise ZeroDivisionError
