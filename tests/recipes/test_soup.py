"""Folders averaged: masks kept, formats mixed, other supports refused by name."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.core import GossamerError
from gossamer.methods import make
from gossamer.models import at_work
from gossamer.models.loss import window_losses
from gossamer.recipes.recipe import load
from gossamer.recipes.soup import soup
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model, tiny_tokenizer


def shifted(model, masks, seed):
    """A copy retrained under the masks, as far as a folder can tell."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.masked_fill(~masks[name], 0) if name in masks else noise
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three copies under one mask: two with stored masks, one plain; and one of another mask."""
    root = tmp_path_factory.mktemp("copies")
    for index in range(4):
        model = tiny_model("llama")
        method = make("random", sparsity=0.5, seed=int(index == 3))
        applied = method.apply(model)
        masks = {f"{n}.weight": applied.selection(n).mask() for n in applied.masks}
        shifted(model, masks, index)
        if index == 2:
            model.save_pretrained(root / "2")
            tiny_tokenizer().save_pretrained(root / "2")
        else:
            applied.save(root / str(index), tiny_tokenizer())
    return [root / str(index) for index in range(4)]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_saved_soup_is_the_mean_and_keeps_its_masks(folders, tmp_path):
    report = soup(folders[:3], tmp_path / "soup")
    states = [weights(folder) for folder in folders[:3]]
    made = weights(tmp_path / "soup")
    for name, value in made.items():
        mean = torch.stack([s[name].double() for s in states]).mean(0)
        assert torch.allclose(value.double(), mean, atol=1e-6), name
    loaded = gossamer.load(tmp_path / "soup")
    (applied,) = at_work(loaded.model)
    assert applied.method.key() == "random"
    for name in applied.masks:
        weight = applied.sites[name].weight(loaded.model)
        assert torch.equal(weight != 0, applied.selection(name).mask())
    assert loaded.tokenizer is not None
    assert report.chosen == (0, 1, 2)
    assert report.matrices == 14
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert "14 sparse matrices with one support, 50.00% zeros" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_plain_folders_work_too(folders, tmp_path):
    plain = tmp_path / "plain"
    load(folders[1]).model.save_pretrained(plain)
    tiny_tokenizer().save_pretrained(plain)
    report = soup([folders[2], plain], tmp_path / "soup")
    assert report.matrices == 14
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_another_mask_is_refused_by_name(folders, tmp_path):
    with pytest.raises(GossamerError, match=r"q_proj\.weight: .* zeros of .*denser") as caught:
        soup([folders[0], folders[3]], tmp_path / "soup")
    assert str(folders[3]) in str(caught.value)
    assert str(folders[0]) in str(caught.value)
    assert not (tmp_path / "soup").exists()


def test_stored_masks_must_agree(folders, tmp_path):
    # The same zeros, but one folder's masks promise less.
    for name, sparsity in (("tight", 0.5), ("loose", 0.25)):
        model = tiny_model("llama")
        with make("magnitude", sparsity=0.5).apply(model, undo=False) as first:
            first.forget()
        applied = make("magnitude", sparsity=sparsity).apply(model)
        applied.save(tmp_path / name, tiny_tokenizer())
    with pytest.raises(GossamerError, match="stored masks of .* differ between"):
        soup([tmp_path / "tight", tmp_path / "loose"], tmp_path / "soup")


def test_greedy_measures_and_chooses(folders, tmp_path):
    tokens = random_tokens()
    wild = load(folders[1]).model
    with torch.no_grad():
        wild.lm_head.weight.mul_(50)
    wild.save_pretrained(tmp_path / "wild")
    tiny_tokenizer().save_pretrained(tmp_path / "wild")
    names = [tmp_path / "wild", folders[0], folders[1]]
    report = soup(names, tmp_path / "soup", tokens=tokens, choose=True)
    expected = [window_losses(load(name).model, tokens).mean for name in names]
    assert report.losses == pytest.approx(expected)
    assert 0 not in report.chosen
    assert report.loss <= min(report.losses) + 1e-6
    assert report.loss == pytest.approx(
        window_losses(load(tmp_path / "soup").model, tokens).mean, rel=1e-5
    )
    assert "left out" in str(report)


def test_stored_dtypes_stay(tmp_path):
    for index in range(2):
        model = shifted(tiny_model("llama"), {}, index).to(torch.bfloat16)
        model.save_pretrained(tmp_path / str(index))
        tiny_tokenizer().save_pretrained(tmp_path / str(index))
    report = soup([tmp_path / "0", tmp_path / "1"], tmp_path / "soup")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "soup", dtype="auto")
    assert made.dtype == torch.bfloat16
    assert "average of dense models" in str(report)


def test_what_cannot_be_averaged_is_refused(folders, tmp_path):
    out = tmp_path / "soup"
    with pytest.raises(GossamerError, match="at least two"):
        soup(folders[:1], out)
    with pytest.raises(GossamerError, match="is given twice"):
        soup([folders[0], folders[0]], out)
    with pytest.raises(GossamerError, match="needs held-out text"):
        soup(folders[:2], out, choose=True)
    with pytest.raises(GossamerError, match="not empty"):
        soup(folders[:2], folders[2])
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(GossamerError, match="average copies of one network"):
        soup([folders[0], tmp_path / "gpt2"], out)
    model = tiny_model("llama")
    make("teal", sparsity=0.3).apply(model, random_tokens()).save(
        tmp_path / "teal", tiny_tokenizer()
    )
    with pytest.raises(GossamerError, match="teal, which is no pruning of weights"):
        soup([tmp_path / "teal", folders[0]], out)
    assert not out.exists()
