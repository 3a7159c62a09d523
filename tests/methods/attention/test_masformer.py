"""MASFormer's layers: which are full, what the others read, what a saved hybrid model is."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.masformer import MASFormer, placed
from gossamer.methods.attention.trained.hybrid import save_hybrid
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


@pytest.mark.parametrize(
    ("placement", "want"),
    [("bottom", (0, 1)), ("middle", (3, 4)), ("top", (6, 7)), ("spread", (2, 6))],
)
def test_placements(placement, want):
    assert placed(8, 2, placement) == want


@pytest.mark.parametrize("placement", ["bottom", "middle", "top", "spread"])
@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_as_many_layers_are_full_as_asked(layers, placement):
    for full in range(layers + 1):
        chosen = placed(layers, full, placement)
        assert len(set(chosen)) == full
        assert all(0 <= layer < layers for layer in chosen)


def method(**values):
    return MASFormer(**{"full_layers": 1, "window": 3, "steps": 0, **values})


def test_only_full_layers_carry_far_tokens():
    """With windows alone, a token beyond the stack's reach changes nothing; a full layer does."""
    model = tiny_model("llama")
    tokens = random_tokens(5).input_ids[:1]
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 128
    # Two windows of 3 reach 2 * 2 tokens back: token 0 reaches token 4 and no later one.
    for full, reached in ((0, False), (1, True), (2, True)):
        with method(full_layers=full).apply(model, random_tokens()), torch.no_grad():
            moved = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0]
        assert bool((moved[5:] > 1e-6).any()) == reached
        assert bool((moved[:5] > 1e-6).all())


def test_rows_of_the_report():
    with method(placement="top").apply(tiny_model("llama"), random_tokens()) as work:
        first, last = work.report().rows
        # 24 tokens, the latest 3 keys each: 1 + 2 + 22 * 3 of 300 pairs.
        assert first.sparsity == pytest.approx(1 - 69 / 300)
        assert last.sparsity == 0.0
        notes = " ".join(work.report().notes)
        assert "full layers: 1 of 2" in notes
        assert "would reach 3 tokens back" in notes


def test_a_quarter_of_the_layers_is_full_by_default():
    with MASFormer(steps=0).apply(tiny_model("llama"), random_tokens()) as work:
        assert work.selector.full == (0,)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "MinistralForCausalLM"), ("qwen2", None), ("qwen3", None)]
)
def test_the_hybrid_model_is_the_same_in_plain_transformers(tmp_path, name, kind):
    from transformers import AutoModelForCausalLM

    model = tiny_model(name)
    tokens = random_tokens(5).input_ids[:2]
    with method(placement="top", steps=2, batch_size=3).apply(model, random_tokens()) as work:
        with torch.no_grad():
            want = model(tokens).logits
        folder = work.save_hybrid(tmp_path / "hybrid")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again).__name__ == (kind or type(model).__name__)
    assert again.config.layer_types == ["sliding_attention", "full_attention"]
    assert again.config.sliding_window == 3
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, want, atol=1e-5, rtol=1e-4)
        cache = again(tokens, use_cache=True).past_key_values
        # The sliding layer holds its window less the query to come, the full layer everything.
        assert [layer.keys.shape[2] for layer in cache.layers] == [2, 24]
        out = again.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
        full = again(out[:, :-1], use_cache=False).logits[:, 23:].argmax(-1)
    assert torch.equal(full, out[:, 24:])


def test_models_without_a_hybrid_form_are_refused(tmp_path):
    for name, says in (("gpt2", "no layer_types"), ("gemma2", "sliding layers of its own")):
        with (
            method().apply(tiny_model(name), random_tokens()) as work,
            pytest.raises(GossamerError, match=says),
        ):
            work.save_hybrid(tmp_path / name)
        assert not (tmp_path / name).exists()
    with (
        method().apply(tiny_model("mistral"), random_tokens()) as work,
        pytest.raises(GossamerError, match="a sliding window of 8"),
    ):
        work.save_hybrid(tmp_path / "mistral")


def test_a_hybrid_model_that_would_differ_is_not_written(tmp_path):
    model = tiny_model("llama")
    with (
        method().apply(model, random_tokens()),
        pytest.raises(GossamerError, match="logits differ"),
    ):
        save_hybrid(model, tmp_path / "other", full=(0, 1), window=3)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"placement": "left"}, "placement is 'left'"),
        ({"window": 0}, "window"),
        ({"full_layers": -1}, "full_layers"),
        ({"steps": -1}, "steps"),
    ],
)
def test_bad_parameters_are_refused(values, says):
    with pytest.raises(GossamerError, match=says):
        MASFormer(**values)


def test_more_full_layers_than_layers_are_refused():
    with pytest.raises(GossamerError, match="full_layers is 3 for a model of 2 layers"):
        method(full_layers=3).apply(tiny_model("llama"), random_tokens())
