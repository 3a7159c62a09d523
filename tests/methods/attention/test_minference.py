import json

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.minference import MInference
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

SMALL = {"block_size": 4, "last_queries": 8, "sink": 1, "local": 4}


def ids(length=48):
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def test_search_finds_a_pattern_for_every_head_of_every_layer():
    model, told = tiny_model("llama"), []
    method = MInference(sparsity=0.4, **SMALL)
    with method.apply(model, ids(), progress=lambda *step: told.append(step)) as work:
        config = model.config
        assert len(work.selector.layers) == config.num_hidden_layers
        assert {len(layer) for layer in work.selector.layers} == {config.num_key_value_heads}
        assert all(head.score > 0 for layer in work.selector.layers for head in layer)
        assert told[-1][:2] == (config.num_hidden_layers, config.num_hidden_layers)
        assert 0.2 < work.report().sparsity < 0.9
        assert "patterns of heads" in str(work.report())


def test_without_data_it_searches_on_a_prompt_of_its_own():
    model = tiny_model("llama")
    with MInference(sparsity=0.4, length=40, **SMALL).apply(model) as work:
        assert len(work.selector.layers) == model.config.num_hidden_layers
    before = logits(model, ids())
    with MInference(sparsity=0.4, length=40, **SMALL).apply(model):
        assert not torch.equal(logits(model, ids()), before)
    assert torch.equal(logits(model, ids()), before)


def test_guards_do_not_hide_layers_from_the_search():
    model = tiny_model("llama")
    method = MInference(sparsity=0.4, dense_layers=1, min_length=1000, **SMALL)
    with method.apply(model, ids()) as work:
        assert len(work.selector.layers) == model.config.num_hidden_layers


def test_found_patterns_can_be_written_and_read_as_a_file(tmp_path):
    model, path = tiny_model("llama"), str(tmp_path / "heads.json")
    heads = model.config.num_attention_heads
    with MInference(sparsity=0.4, **{**SMALL, "block_size": 64}).apply(model, ids()) as work:
        work.selector.save_heads(path, heads)
        want = logits(model, ids())
    assert len(json.loads((tmp_path / "heads.json").read_text())[0]) == heads
    with MInference(heads=path, **{**SMALL, "block_size": 64}).apply(model, ids()):
        assert torch.equal(logits(model, ids()), want)


def test_a_file_of_another_model_is_refused(tmp_path):
    model, path = tiny_model("llama"), tmp_path / "heads.json"
    path.write_text(json.dumps([{"0": ["stream_llm", 1, 4, 1.0]}] * 5))
    with pytest.raises(GossamerError, match="5 layers, the model has 2"):
        MInference(heads=str(path)).apply(model, ids())


def test_patterns_of_other_heads_are_refused_at_the_call():
    model = tiny_model("llama")
    with MInference(sparsity=0.4, **SMALL).apply(model, ids()) as work:
        state = work.selector.state().meta
    state["layers"] = [layer + layer[:1] for layer in state["layers"]]
    method = MInference(sparsity=0.4, **SMALL)
    with (
        method.reattach(model, {**state, "length": 48}, {}),
        pytest.raises(GossamerError, match="3 heads in this one"),
    ):
        logits(model, ids())


def test_padding_of_the_searched_prompt_is_left_out():
    model, tokens = tiny_model("llama"), random_tokens()
    padded = torch.nn.functional.pad(tokens.input_ids[:1], (8, 0))
    mask = torch.nn.functional.pad(tokens.attention_mask[:1], (8, 0))
    data = type(tokens)(padded, mask)
    method = MInference(sparsity=0.4, **SMALL)
    with method.apply(model, tokens) as work, torch.no_grad():
        want = work.selector.layers
    with method.apply(model, data) as work:
        assert work.selector.layers == want


def test_a_file_and_a_sparsity_exclude_each_other():
    with pytest.raises(GossamerError, match="give one"):
        MInference(heads="x.json", sparsity=0.5)


def test_the_report_says_that_the_paper_s_counts_suit_long_prompts():
    model = tiny_model("llama")
    with MInference(**SMALL).apply(model, ids()) as work:
        assert "give a sparsity for shorter" in str(work.report())
    with MInference(sparsity=0.4, **SMALL).apply(model, ids()) as work:
        assert "give a sparsity for shorter" not in str(work.report())
