"""Saved and taken up again: folded, or with the adapters that the folder must not lose."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import gossamer
from gossamer.core import GossamerError
from gossamer.methods.tuning.pst import PST
from gossamer.methods.tuning.tuner.tuned import reattached
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.models import at_work
from gossamer.models.store import read_stages
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model, tiny_tokenizer

METHOD = PST(sparsity=0.75, steps=4, batch_size=3, rank=2, score_rank=2, lr=1e-2)


@torch.no_grad()
def logits(model):
    return model(input_ids=random_tokens(50).input_ids[:2]).logits


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fold", [True, False])
def test_any_reader_gets_the_sparse_model(name, fold, tmp_path):
    model = tiny_model(name)
    keys = set(model.state_dict())
    work = METHOD.apply(model, random_tokens(), fold=fold)
    work.save(tmp_path / "out")
    assert "tuning" not in json.dumps(sorted(load_file(tmp_path / "out" / "model.safetensors")))
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert set(again.state_dict()) == keys
    assert torch.allclose(logits(again), logits(model), atol=1e-5, rtol=0)
    for site in work.sites.values():
        zeros = int((site.weight(again) == 0).sum())
        assert zeros == site.size - round(0.25 * site.size)


def test_a_saved_tuning_goes_on_where_it_was(tmp_path):
    model = tiny_model("llama")
    frozen = state_of(model)
    work = METHOD.apply(model, random_tokens(), fold=False)
    work.save(tmp_path / "out", tiny_tokenizer())
    loaded = gossamer.load(tmp_path / "out").model
    (again,) = at_work(loaded)
    assert torch.equal(logits(loaded), logits(model))
    assert again.tuner.updates == 4
    for mine, theirs in zip(work.tuner.parameters(), again.tuner.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name in work.sites:
        assert again.selection(name) == work.selection(name)
        assert torch.equal(loaded.state_dict()[f"{name}.weight"], frozen[f"{name}.weight"])
    for one in (work, again):
        optimizer = torch.optim.SGD(one.tuner.parameters(), lr=0.1)
        ids = random_tokens(3).input_ids[:2]
        one.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        one.tuner.step()
    assert torch.equal(logits(loaded), logits(model))
    folded = type(model).from_pretrained(tmp_path / "out").state_dict()
    again.restore()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in folded.items())


def test_folding_later_is_the_same_and_frees_the_adapters():
    models = [tiny_model("llama"), tiny_model("llama")]
    at_once = METHOD.apply(models[0], random_tokens())
    later = METHOD.apply(models[1], random_tokens(), fold=False)
    assert later.weight_bytes_saved() == 0
    assert not later.rewrites
    later.fold()
    later.fold()
    assert later.tuner is None
    assert later.rewrites
    assert later.report().to_dict() == at_once.report().to_dict()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    tuned = sum(site.size for site in later.sites.values())
    read = sum(4 * round(site.size / 4) + site.size // 8 for site in later.sites.values())
    assert later.weight_bytes_saved() == 4 * tuned - read


@pytest.mark.parametrize("fold", [True, False])
def test_without_a_copy_there_is_no_way_back(fold):
    model = tiny_model("llama")
    work = METHOD.apply(model, random_tokens(), undo=False, fold=fold)
    with pytest.raises(GossamerError, match="attach with undo=True"):
        work.restore()
    assert at_work(model) == (work,)


def test_what_prunes_the_tuned_weights_further_is_restored_first():
    model = tiny_model("llama")
    before = state_of(model)
    work = METHOD.apply(model, random_tokens())
    later = Magnitude(sparsity=0.9).apply(model)
    with pytest.raises(GossamerError, match="magnitude was applied to the tuned weights later"):
        work.restore()
    later.restore()
    work.restore()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_weights_changed_after_saving_are_noticed(tmp_path):
    model = tiny_model("llama")
    METHOD.apply(model, random_tokens()).save(tmp_path / "out")
    (stage,) = read_stages(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        again.model.layers[1].mlp.up_proj.weight.fill_(1.0)
    with pytest.raises(GossamerError, match=r"layers.1.mlp.up_proj is not zero where"):
        METHOD.reattach(again, stage.meta, stage.tensors)
    with pytest.raises(GossamerError, match="names model.layers.9, which"):
        reattached(METHOD, again, {**stage.meta, "sites": ["model.layers.9"]}, stage.tensors)


def test_adapters_that_do_not_fit_leave_the_loaded_model_as_it_was(tmp_path):
    model = tiny_model("llama")
    METHOD.apply(model, random_tokens(), fold=False).save(tmp_path / "out")
    (stage,) = read_stages(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    before = state_of(again)
    other = PST(**{**vars(METHOD), "rank": 3})
    with pytest.raises(GossamerError, match="stored u of model"):
        other.reattach(again, stage.meta, copy.deepcopy(stage.tensors))
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in before.items())
    assert not at_work(again)
