import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.decoding.reuse import ReuseSelector
from gossamer.methods.attention.tidal_decode import TidalDecode, tidal_table
from tests.models.tiny import tiny_model


def test_tables():
    assert tidal_table(6, 2, 4) == (0, 1, 2, 2, 4, 4)
    assert tidal_table(4, 0, None) == (0, 0, 0, 0)


def test_the_reference_s_depths():
    method = TidalDecode()
    assert method._correction(32) == 13
    assert method._correction(8) == 3
    assert method._correction(5) is None
    assert TidalDecode(correction=0)._correction(32) is None
    assert TidalDecode(correction=9)._correction(32) == 9


@pytest.mark.parametrize("correction", [1, 2, 8])
def test_corrections_that_cannot_be(correction):
    with pytest.raises(GossamerError, match="must lie behind layer 2"):
        TidalDecode(correction=correction)._correction(8)


def test_too_few_layers_are_refused():
    with pytest.raises(GossamerError, match="leaves no layer to reuse keys in a model of 2"):
        TidalDecode().apply(tiny_model("llama"))


def test_one_forward_pass_after_another_chooses_anew(monkeypatch):
    model, seen = tiny_model("llama"), []
    select = ReuseSelector.select

    def spy(self, call, layout, layer):
        index = select(self, call, layout, layer)
        if layer == 1 and layout.phase == "decode":
            seen.append(index.mask())
        return index

    monkeypatch.setattr(ReuseSelector, "select", spy)
    with (
        TidalDecode(dense_layers=0, correction=0, budget_tokens=3).apply(model),
        torch.no_grad(),
    ):
        cache = model(torch.arange(3, 23)[None], use_cache=True).past_key_values
        for token in (5, 80):
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert [int(mask.sum()) for mask in seen] == [6, 6]
    assert seen[1][0, :, 0, -1].all()


def test_the_report_says_which_layers_choose():
    with TidalDecode(dense_layers=0, correction=0).apply(tiny_model("llama")) as work:
        assert "1 of 2 layers read all keys and choose (layers 0)" in str(work.report())
