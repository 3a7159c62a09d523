"""Recipes: several methods in order, from a file or from Python; saved and loaded again."""

import json

import pytest
import torch

import gossamer
from gossamer.core import GossamerError
from gossamer.models import Tokens, find_sites
from gossamer.models.store import read_stages
from gossamer.recipes.recipe import MAX_STAGES, Recipe
from tests.models.tiny import tiny_model

TOKENS = Tokens.from_ids(torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0)))
STAGES = [
    {"method": "wanda", "pattern": "2:4"},
    {"method": "teal", "sparsity": 0.25},
    {"method": "streaming_llm", "sink": 2, "recent": 6},
]


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS.input_ids).logits


def test_stages_act_together_and_are_undone_in_reverse():
    model = tiny_model("llama")
    dense = logits(model)
    recipe = Recipe.from_dict({"stages": STAGES})
    seen = [dense]
    with recipe.apply(model, None, TOKENS) as done:
        assert [stage.method.key() for stage in done.stages] == ["wanda", "teal", "streaming_llm"]
        seen.append(logits(model))
        assert "wanda" in done.report()
    assert not torch.allclose(seen[0], seen[1])
    assert torch.equal(logits(model), dense)


def test_a_failing_stage_undoes_the_earlier_ones():
    model = tiny_model("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = Recipe.from_dict({"stages": ["magnitude", STAGES[2]]})
    with pytest.raises(GossamerError):
        recipe.apply(model, None, TOKENS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_save_and_load_restore_every_stage(tmp_path):
    model = tiny_model("llama")
    with Recipe.from_dict({"stages": STAGES}).apply(model, None, TOKENS) as done:
        expected = logits(model)
        done.save(tmp_path / "sparse")
    plain = type(model).from_pretrained(tmp_path / "sparse").eval()
    site = find_sites(plain).sites[0]
    assert float((site.weight(plain) == 0).float().mean()) == pytest.approx(0.5)
    assert not torch.allclose(logits(plain), expected, atol=1e-5)
    attached = []
    for stage in read_stages(tmp_path / "sparse"):
        fields = {k: v for k, v in stage.method.items() if k != "method"}
        made = gossamer.method(stage.method["method"], **fields)
        attached.append(made.reattach(plain, stage.meta, stage.tensors))
    assert torch.allclose(logits(plain), expected, atol=1e-6)
    for work in reversed(attached[1:]):
        work.restore()


def test_text_round_trips(tmp_path):
    recipe = Recipe.from_dict({"model": "nano", "stages": STAGES, "seed": 3})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_text())
    assert Recipe.read(file).stages == recipe.stages
    assert Recipe.read(file).seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: []", "1 to 64 stages; this one has 0"),
        ("stages: wanda", "stages is a list"),
        ("- a", "a recipe is a mapping"),
        ("stagess: []", "did you mean stages"),
        ("stages:\n- metod: wanda", "stage 1 needs a key 'method'"),
        ("stages:\n- method: wandda", "stage 1: unknown method 'wandda'; did you mean wanda"),
        ("stages:\n- method: wanda\n  sparsty: 0.5", "stage 1: .*did you mean sparsity"),
        ("stages:\n- method: wanda\n  sparsity: [1]", "stage 1: wanda: sparsity is"),
        ("stages:\n- method: wanda\n  sparsity: .nan", "sparsity is nan"),
        ("stages:\n- method: wanda\n  1: 2", "stage 1 has the key 1"),
        ("stages: !!int abc", "cannot be read"),
        ("stages: [wanda]\nsamples: " + "9" * 5000, "cannot be read|too large"),
        ("stages: [wanda]\nseed: 1180591620717411303424", "seed is too large"),
        ("stages: [wanda]\nout: ''", "out is ''"),
        ("stages: [wanda]\nsamples: many", "samples is 'many'"),
        ("stages: [wanda]\nsamples: 0", "samples is 0"),
        ("stages: [wanda]\nmodel: 5", "model is 5"),
        ("stages: [wanda]\nstages: [teal]", "given twice"),
        ("stages:\n" + "- wanda\n" * 10_000, f"1 to {MAX_STAGES} stages; this one has 10000"),
    ],
)
def test_wrong_recipes_are_named(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(GossamerError, match=message) as caught:
        Recipe.read(file)
    assert str(file) in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(GossamerError, match="cannot read"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GossamerError, match="not a text file"):
        Recipe.read(tmp_path / "binary.yaml")


def test_run_refuses_a_full_folder_before_loading(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("x")
    recipe = Recipe.from_dict({"model": "nano", "stages": ["wanda"], "out": "out"}, tmp_path)
    with pytest.raises(GossamerError, match="not empty"):
        recipe.run()


def test_the_recipes_seed_reaches_the_stages():
    recipe = Recipe.from_dict({"seed": 5, "stages": ["random", {"method": "random", "seed": 1}]})
    assert [stage.seed for stage in recipe.stages] == [5, 1]


def test_a_saved_model_keeps_its_methods_when_it_is_processed_again(tmp_path, monkeypatch):
    first = Recipe.from_dict(
        {"model": "nano", "samples": 2, "length": 32, "out": "a", "stages": ["teal"]}, tmp_path
    ).run()
    first.restore()
    text = {"model": "a", "samples": 2, "length": 32, "out": "b", "stages": ["magnitude"]}
    second = Recipe.from_dict(text, tmp_path).run()
    with torch.no_grad():
        expected = second.model(input_ids=TOKENS.input_ids).logits
    assert [s.method["method"] for s in read_stages(tmp_path / "b")] == ["teal", "magnitude"]
    monkeypatch.setenv("HOME", str(tmp_path))
    again, _ = gossamer.load("~/b")
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS.input_ids).logits, expected)


@pytest.mark.parametrize(
    "stage",
    [
        {"method": {}, "meta": {}},
        {"method": "wanda", "meta": {}},
        {"method": {"method": "teal"}, "meta": {}},
    ],
)
def test_a_damaged_manifest_is_one_clear_error(tmp_path, stage):
    model, tokenizer = gossamer.load("nano")
    with gossamer.Magnitude(sparsity=0.5).apply(model) as applied:
        applied.save(tmp_path / "a", tokenizer)
    (tmp_path / "a" / "gossamer.json").write_text(json.dumps({"format": 1, "stages": [stage]}))
    with pytest.raises(GossamerError, match="damaged"):
        gossamer.load(tmp_path / "a")
