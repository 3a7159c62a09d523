"""Methods by key, by class name, and from text."""

import pytest

import gossamer
from gossamer import methods
from gossamer.core import NM, GossamerError, Unstructured


def test_every_key_is_found_by_class_name():
    for key in methods.keys():
        cls = methods.get(key)
        assert cls.key() == key
        assert methods.by_class_name(cls.__name__) is cls
        assert cls.__name__ in dir(gossamer)
    assert methods.by_class_name("Nothing") is None


def test_families_filter():
    assert set(methods.keys("weights")) >= {"random", "magnitude", "lamp", "wanda"}
    assert "wanda" not in methods.keys("attention")
    with pytest.raises(GossamerError, match="did you mean weights"):
        methods.keys("weight")


def test_unknown_methods_offer_the_nearest():
    with pytest.raises(GossamerError, match="did you mean wanda"):
        methods.get("wandda")
    with pytest.raises(AttributeError, match="no attribute 'Wandda'"):
        _ = gossamer.Wandda


def test_values_come_as_text_or_as_themselves():
    made = methods.make("wanda", sparsity="0.5", pattern="2:4")
    assert made == gossamer.Wanda(sparsity=0.5, pattern="2:4") == gossamer.Wanda(pattern=NM(2, 4))
    assert gossamer.method("wanda", sparsity=0.5) == methods.parse_method("wanda:sparsity=0.5")
    assert gossamer.method("wanda:pattern=2:4").pattern == NM(2, 4)
    assert methods.make("random", seed="3").seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wanda:sparsity=much", "sparsity is 'much'"),
        ("wanda:sparsety=0.5", "did you mean sparsity"),
        ("random:seed=1.5", "seed is '1.5'"),
        ("random:seed=-1", "seed is -1"),
        ("magnitude:allocation=erc", "allocation is 'erc'"),
        ("", "unknown method ''"),
    ],
)
def test_wrong_values_are_named(text, message):
    with pytest.raises(GossamerError, match=message):
        methods.parse_method(text)


def test_a_grid_fills_only_what_is_open_and_known():
    made = methods.parse_method("magnitude:pattern=layer", sparsity=0.3, pattern="row", seed=4)
    assert made.pattern == Unstructured("layer")
    assert made.sparsity == 0.3
    assert methods.split_text("a:pattern=2:4:seed=1") == ["a", "pattern=2:4", "seed=1"]
