"""Caches that keep only what heads will read by position: the same answers, fewer bytes."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from gossamer.core import GossamerError
from gossamer.methods.attention.eviction import positional
from gossamer.methods.attention.eviction.positional import TAIL
from gossamer.methods.attention.eviction.shortened import Shortened, held_bytes
from gossamer.methods.attention.moa import MoA
from gossamer.methods.attention.quest import Quest
from gossamer.methods.attention.s2_attention import S2Attention
from gossamer.methods.attention.snapkv import SnapKV
from gossamer.methods.attention.streaming_llm import StreamingLLM
from tests.models.tiny import tiny_model

# Layer 0: a short head, and one that reads everything; layer 1: one that grows, and a short one.
SPANS = {"alphas": [[4, 0], [8, 6]], "betas": [[0, 1], [0.25, 0]]}
KINDS = ("moa", "s2_attention", "streaming_llm")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """The methods, evicting every few tokens."""
    monkeypatch.setattr(positional, "EVERY", 8)
    path = tmp_path / "spans.json"
    path.write_text(json.dumps(SPANS))

    def method(kind, **values):
        if kind == "moa":
            return MoA(spans=str(path), sink=3, block_size=4, **values)
        if kind == "streaming_llm":
            return StreamingLLM(recent=9, sink=2, **{"evict": True, **values})
        own = {"block": 4, "local": 2, "stride": 2, "dense_every": 0, "steps": 0}
        return S2Attention(**{**own, **values})

    return method


def ids(rows=2, length=80, seed=0):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def generator_of(name="llama"):
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def logits(model, cache, tokens, *edges):
    """Of tokens given in parts over one cache; one by one after the last edge."""
    steps = [0, *edges, *range(edges[-1] + 1 if edges else 1, tokens.shape[1] + 1)]
    parts = [
        model(tokens[:, a:b], past_key_values=cache, use_cache=True).logits
        for a, b in pairwise(steps)
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_mask_and_bytes_fewer(kind, name, make):
    model, text = tiny_model(name), ids(length=125)
    found, held = {}, {}
    for evict in (True, False):
        with make(kind, evict=evict).apply(model, text) as work:
            cache = DynamicCache(config=model.config)
            found[evict] = logits(model, cache, text, 70)
            held[evict] = held_bytes(cache)
            assert all(isinstance(layer, Shortened) == evict for layer in cache.layers)
            assert cache.get_seq_length() == 125
            if evict:
                assert work.ran["packed"] >= 54
                short = [layer.kept_keys.counts.tolist() for layer in cache.layers]
    torch.testing.assert_close(found[True], found[False], atol=2e-5, rtol=1e-4)
    assert held[True] < 0.85 * held[False]
    if kind == "moa":
        # The head that reads everything holds everything; the others their sinks and spans.
        assert short[0][0][1] == cache.get_seq_length() - (125 - 70 - 1) % 8 - TAIL
        assert short[0][0][0] < 20
        assert short[1][0][1] < 20
    dense = logits(model, DynamicCache(config=model.config), text, 70)
    assert (found[True] - dense).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_s_bytes_are_those_the_cache_holds(kind, make):
    model, text = tiny_model("llama"), ids(1, 120)
    with make(kind).apply(model, text) as work:
        cache = DynamicCache(config=model.config)
        for end in (71, 79, 87):
            start = cache.get_seq_length()
            logits(model, cache, text[:, start:end], *([70] if not start else []))
            want = work.cache_bytes(end)
            # Beside them 4 bytes for the place of a key (not of the latest), and its heads' counts.
            places = sum(layer.places.flat.nbytes for layer in cache.layers)
            assert 0 <= held_bytes(cache) - want.kept - places <= 2 * 2 * 3 * 8, end
        assert want.dense == 87 * 2 * 2 * 2 * 8 * 4
        assert f"holds {work.cache_bytes(120).kept} of {work.cache_bytes(120).dense} bytes" in str(
            work.report()
        )
    with make(kind, evict=False).apply(model, text) as work:
        assert "the key-value cache keeps every key" in str(work.report())


@pytest.mark.parametrize("kind", KINDS)
def test_generation_of_every_kind_is_that_of_the_mask(kind, make):
    model, helper, prompt = generator_of(), generator_of("qwen2"), ids(2, 60)
    mask = torch.ones_like(prompt)
    mask[1, :12] = 0
    ways = [
        ({}, prompt),
        ({"num_beams": 3}, prompt),
        ({"prefill_chunk_size": 23}, prompt),
        ({"attention_mask": mask}, prompt),
        ({"assistant_model": helper}, prompt[:1]),
        ({"assistant_model": model}, prompt[:1]),
    ]
    answers = {}
    for evict in (True, False):
        with make(kind, evict=evict).apply(model, prompt) as work:
            answers[evict] = [
                model.generate(
                    start,
                    max_new_tokens=40,
                    do_sample=False,
                    **{"attention_mask": torch.ones_like(start), **way},
                )
                for way, start in ways
            ]
            assert (work.ran["packed"] > 100) == evict
    for got, want, (way, _) in zip(answers[True], answers[False], ways, strict=True):
        assert torch.equal(got, want), way


@pytest.mark.parametrize("kind", ["s2_attention", "streaming_llm"])
def test_a_later_question_of_any_length_where_rules_do_not_grow(kind, make):
    """These rules are of places alone; MoA's spans grow with the text: it may ask for what went."""
    model, text, question = tiny_model("llama"), ids(length=90), ids(length=30, seed=1)
    found = {}
    for evict in (True, False):
        with make(kind, evict=evict).apply(model, text):
            cache = DynamicCache(config=model.config)
            logits(model, cache, text, 70)
            twin = copy.deepcopy(cache)
            with torch.no_grad():
                found[evict] = model(question, past_key_values=cache, use_cache=True).logits
            again = logits(model, twin, question)
            torch.testing.assert_close(found[evict], again, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[True], found[False], atol=2e-5, rtol=1e-4)


def test_only_layers_and_calls_it_decodes_itself(make):
    model, text = tiny_model("llama"), ids(length=90)

    def kinds(method):
        with method.apply(model, text):
            cache = DynamicCache(config=model.config)
            logits(model, cache, text, 70)
        return [isinstance(layer, Shortened) for layer in cache.layers]

    assert kinds(make("moa", dense_layers=1)) == [False, True]
    assert kinds(make("moa", min_length=200)) == [False, False]
    assert kinds(make("s2_attention", dense_every=2)) == [True, False]
    # Quest decodes and may ask for any key.
    assert kinds(make("moa") + Quest(page_size=4)) == [False, False]
    assert kinds(make("moa") + make("s2_attention")) == [True, True]


def test_sliding_layers_of_the_model_are_left(make):
    model, text = tiny_model("gemma2"), ids(length=90)
    found = {}
    for evict in (True, False):
        with make("moa", evict=evict).apply(model):
            cache = DynamicCache(config=model.config)
            found[evict] = logits(model, cache, text, 70)
            assert [isinstance(layer, Shortened) for layer in cache.layers] == [False, evict]
    torch.testing.assert_close(found[True], found[False], atol=2e-5, rtol=1e-4)


def test_a_restored_method_takes_its_caches_along(make):
    model, text = tiny_model("llama"), ids(length=90)
    work = make("moa").apply(model)
    cache = DynamicCache(config=model.config)
    logits(model, cache, text, 70)
    work.restore()
    with pytest.raises(GossamerError, match="method that took the others was restored"):
        model(ids(length=1), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("kind", [*KINDS, "snapkv"])
def test_the_fastest_backend_never_runs_full_attention_over_a_cache_with_gaps(kind, make):
    model, text = tiny_model("llama"), ids(length=120)
    snap = {"window": 4, "budget_tokens": 20}
    answers = {}
    for backend in ("auto", "fastest"):
        method = (
            SnapKV(**snap, backend=backend) if kind == "snapkv" else make(kind, backend=backend)
        )
        with method.apply(model, text) as work:
            cache = DynamicCache(config=model.config)
            first = logits(model, cache, text, 70)
            again = DynamicCache(config=model.config)
            answers[backend] = logits(model, again, text, 70)[:, 70:]
            assert all(isinstance(layer, Shortened) for layer in again.layers)
            assert first.isfinite().all()
            # Where every head holds as many, what is held runs as it is.
            assert work.ran["packed"] + (kind == "snapkv") * work.ran["dense"] > 100
            assert not any("decode" in note for note in work.breakeven.notes())
    if kind == "snapkv":
        torch.testing.assert_close(answers["fastest"], answers["auto"])


def test_bytes_of_a_choice_that_depends_on_the_input_are_not_foretold():
    with SnapKV(window=4).apply(tiny_model("llama")) as work:
        with pytest.raises(GossamerError, match="depend on the input"):
            work.cache_bytes(100)
        assert "once decoding has begun" not in str(work.report())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_as_on_a_cpu(kind, make):
    text, found = ids(length=125), {}
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        with make(kind).apply(model, text):
            cache = DynamicCache(config=model.config)
            found[device] = logits(model, cache, text.to(device), 70).cpu()
            assert all(isinstance(layer, Shortened) for layer in cache.layers)
    torch.testing.assert_close(found["cuda"], found["cpu"], atol=1e-3, rtol=1e-3)
