from pathlib import Path

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.export.sae import write_dictionary
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.topk_sae import TopKSAE
from gossamer.models import Tokens
from gossamer.report.features import modules_read, open_dictionary
from tests.models.tiny import tiny_model


def dictionary() -> Dictionary:
    made = Dictionary.random(32, 40, TopK(3), seed=1).eval()
    made.metadata |= {"hook_name": "model.layers.1", "model_name": "somewhere"}
    return made


def test_a_folder_of_its_own_and_saelens(tmp_path: Path):
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    own = dictionary().save(tmp_path / "own")
    lens = write_dictionary(dictionary(), tmp_path / "lens")
    for folder in (own, lens):
        opened = open_dictionary(folder)
        assert opened.model == "somewhere"
        assert torch.allclose(opened.dictionary(rows), dictionary()(rows), atol=1e-6)


def test_the_folder_of_a_model_with_a_dictionary_at_work(tmp_path: Path):
    model = tiny_model("llama")
    tokens = Tokens.from_ids(torch.randint(3, 128, (4, 16)))
    applied = TopKSAE(k=4, width=24, tokens=32, hook="model.layers.1").apply(model, tokens)
    folder = applied.save(tmp_path / "saved")
    opened = open_dictionary(folder)
    assert opened.model == str(folder)
    assert modules_read(model, opened.dictionary, None) == ("model.layers.1",)
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(opened.dictionary(rows), applied.dictionary(rows))


@pytest.mark.parametrize("name", ["sae.pkl", "sae.pickle", "sae.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str):
    path = tmp_path / name
    torch.save({"sae": dictionary()}, path)
    with pytest.raises(GossamerError, match="pickle"):
        open_dictionary(path)


def test_a_model_without_a_dictionary(tmp_path: Path):
    (tmp_path / "gossamer.json").write_text('{"format": 1, "stages": []}')
    with pytest.raises(GossamerError, match="a model without a dictionary"):
        open_dictionary(tmp_path)


def test_modules_are_named_by_the_dictionary_or_the_user():
    model, made = tiny_model("llama"), dictionary()
    assert modules_read(model, made, None) == ("model.layers.1",)
    assert modules_read(model, made, "model.layers.0.mlp") == ("model.layers.0.mlp",)
    assert modules_read(model, made, "blocks.1.hook_resid_pre") == ("model.layers.1:in",)
    made.metadata["hook_name"] = "blocks.0.hook_resid_post"
    assert modules_read(model, made, None) == ("model.layers.0",)
    made.metadata["reads"] = ["model.layers.0", "model.layers.1"]
    assert modules_read(model, made, None) == ("model.layers.0", "model.layers.1")


def test_a_hook_that_matches_nothing_names_the_nearest():
    model, made = tiny_model("llama"), dictionary()
    with pytest.raises(GossamerError, match=r"no module 'model.layer.1'.*model\.layers\.1"):
        modules_read(model, made, "model.layer.1")
    with pytest.raises(GossamerError, match="block 7; the model has 2"):
        modules_read(model, made, "blocks.7.hook_resid_post")
    made.metadata.clear()
    with pytest.raises(GossamerError, match=r"name it with --hook, such as model\.layers\.1"):
        modules_read(model, made, None)
