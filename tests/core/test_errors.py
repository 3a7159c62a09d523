from gossamer.core import GossamerError, UnsupportedModel, nearest, unknown


def test_errors_are_value_errors():
    assert issubclass(GossamerError, ValueError)
    assert issubclass(UnsupportedModel, GossamerError)


def test_the_nearest_names_come_first():
    assert nearest("wnada", ["magnitude", "wanda", "random"]) == ["wanda"]
    assert "did you mean wanda?" in str(unknown("method", "wnada", ("wanda", "random")))
    assert "known: wanda, random" in str(unknown("method", "zzz", ("wanda", "random")))
