import xml.etree.ElementTree as ElementTree

import pytest
import torch

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.measure import NormMatch, norm_match
from gossamer.methods.features.rules import TopK
from gossamer.report.zf import zf_plot

SPACE = "{http://www.w3.org/2000/svg}"


def match(inputs, codes):
    nothing = torch.zeros(len(inputs))
    return NormMatch(torch.tensor(inputs), torch.tensor(codes), nothing, nothing)


def drawn(*args, **options):
    root = ElementTree.fromstring(str(zf_plot(*args, **options)))
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SPACE}circle")]
    return root, places


def test_a_code_as_long_as_its_input_lies_on_the_diagonal_and_a_longer_one_above():
    root, ((x0, y0), (x1, y1)) = drawn(match([2.0, 1.0], [2.0, 3.0]))
    line = next(c for c in root.iter(f"{SPACE}line") if c.get("class") == "diagonal")
    ends = [float(line.get(name)) for name in ("x1", "y1", "x2", "y2")]

    def height(x):
        return ends[1] + (x - ends[0]) * (ends[3] - ends[1]) / (ends[2] - ends[0])

    assert y0 == pytest.approx(height(x0), abs=0.05)
    assert y1 < height(x1) - 10
    assert x1 < x0


def test_the_title_tells_the_mismatch_and_is_escaped():
    root, _ = drawn(match([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), label="<top>")
    texts = [t.text for t in root.iter(f"{SPACE}text")]
    assert "<top>: norm of the code; median mismatch 0.500" in texts


def test_many_tokens_are_thinned_evenly():
    _, places = drawn(match([1.0 + i for i in range(5000)], [1.0] * 5000))
    assert 1500 < len(places) <= 2000


def test_no_tokens_and_a_dictionary_of_any_rule():
    assert drawn(match([1.0], [0.0]))[1]
    made = Dictionary.random(8, 16, TopK(2), seed=0)
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert len(drawn(norm_match(made, rows))[1]) == 30
