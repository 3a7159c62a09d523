from dataclasses import replace

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.editing import Affine, Intervention, Posterior, Within
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.separability import Separability, dense_codes, labelled_rows
from gossamer.models import Tokens
from tests.models.subjects import SUBJECTS
from tests.models.tiny import tiny_model

IT = SUBJECTS["steered language model"]
SMALL = Separability(target="1", k=4, width=64, tokens=2048, top=10)
MADE = Dictionary.random(32, 64, TopK(4), seed=0).eval().requires_grad_(False)


def test_rows_carry_the_label_of_their_window():
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    rows, labels = labelled_rows(
        tiny_model("llama"), Tokens(ids, mask), torch.tensor([0, 2, 1]), "model.layers.0"
    )
    assert labels.tolist() == [0] * 4 + [2] * 2 + [1] * 3
    assert rows.shape == (9, 32)


def test_dense_codes_are_those_of_the_dictionary():
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    dense = dense_codes(MADE, x)
    assert ((dense != 0).sum(1) <= 4).all()
    assert torch.allclose(dense @ MADE.W_dec + MADE.b_dec, MADE(x), atol=1e-5)


@pytest.mark.parametrize(
    ("manner", "law"), [("posterior", Posterior), ("range", Within), ("full", Affine)]
)
def test_each_manner_has_its_law_on_the_loudest_units(manner, law):
    model, data = IT.build(), IT.data()
    edit = replace(SMALL, manner=manner).suppression(model, data, MADE)
    assert isinstance(edit.law, law)
    rows, labels = labelled_rows(model, data.tokens, data.codes("label"), "model.layers.1")
    loud = dense_codes(MADE, rows)[labels == 1].abs().mean(0)
    assert edit.units is not None
    assert set(edit.units.tolist()) == set(loud.topk(10).indices.tolist())


def test_full_mask_takes_the_latents_out_of_the_activations():
    model, data = IT.build(), IT.data()
    edit = replace(SMALL, manner="full").suppression(model, data, MADE)
    rows = labelled_rows(model, data.tokens, data.codes("label"), "model.layers.1")[0]
    before = dense_codes(MADE, rows)
    kept = before.clone()
    kept[:, edit.units] = 0
    wanted = rows + (kept - before) @ MADE.W_dec
    with Intervention((edit,)).on(model):
        after = labelled_rows(model, data.tokens, data.codes("label"), "model.layers.1")[0]
    assert torch.allclose(after, wanted, atol=1e-5)


def test_report_compares_latents_with_channels():
    with SMALL.apply(IT.build(), IT.data()) as work:
        text = str(work.report())
    assert "separability of channels" in text
    assert "separability of latents" in text
    with replace(SMALL, latents=False).apply(IT.build(), IT.data()) as work:
        assert work.intervention.edits[0].dictionary is None


@pytest.mark.parametrize("values", [{"manner": "half"}, {"top": 0}])
def test_bad_parameters(values):
    with pytest.raises(GossamerError, match=next(iter(values))):
        Separability(**values)
