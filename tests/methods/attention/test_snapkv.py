import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from gossamer.core import GossamerError
from gossamer.methods.attention.eviction.shortened import Shortened, held_bytes
from gossamer.methods.attention.flexprefill import FlexPrefill
from gossamer.methods.attention.snapkv import SnapKV
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

ALLOCATIONS = ("equal", "heads")


def ids(rows=2, length=24, seed=0):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def generator_of(name):
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def decoded(model, cache, tokens):
    parts = []
    for at in range(tokens.shape[1]):
        out = model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def read(model, prompt, cache=None):
    return model(prompt, past_key_values=cache, use_cache=True).past_key_values


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_cache_is_really_shorter(allocation):
    model, prompt = tiny_model("llama"), ids(length=60)
    with SnapKV(budget_tokens=12, window=4, pool=3, allocation=allocation).apply(model):
        cache = read(model, prompt)
        before = held_bytes(cache)
        decoded(model, cache, ids(length=1, seed=1))
        assert cache.get_seq_length() == 61
        for layer in cache.layers:
            assert isinstance(layer, Shortened)
            assert layer.kept_keys.counts.sum() == 2 * 2 * 12
            assert layer.keys.shape[2] == 1
        # 13 of 60 keys, and 4 bytes of place beside 64 of each kept key and value.
        assert held_bytes(cache) < before * 13 / 60 * 1.15
        equal = [layer.kept_keys.equal for layer in cache.layers]
        assert all(equal) if allocation == "equal" else not all(equal)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
def test_shrinking_equals_hiding(name, allocation):
    """A static cache cannot shrink: it keeps the evicted keys unread, and must answer the same."""
    model, prompt, after = tiny_model(name), ids(length=40), ids(length=4, seed=1)
    with SnapKV(budget_tokens=9, window=3, pool=3, allocation=allocation).apply(model) as work:
        got = decoded(model, read(model, prompt), after)
        assert work.ran["packed"] + work.ran["dense"] > 0
        hidden = read(model, prompt, StaticCache(model.config, max_cache_len=50))
        want = decoded(model, hidden, after)
        assert not any(isinstance(layer, Shortened) for layer in hidden.layers)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    dense = decoded(model, read(model, prompt), after)
    assert (got - dense).abs().max() > 0.05


def test_kept_are_the_keys_the_window_reads():
    model, prompt = tiny_model("llama"), ids(rows=1, length=30)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        weights = model(prompt, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    with SnapKV(budget_tokens=10, window=4, pool=1).apply(model):
        cache = read(model, prompt)
        decoded(model, cache, ids(1, 1, seed=1))
        for layer, weight in zip(cache.layers, weights, strict=True):
            mass = weight[0, :, -4:, :26].sum(1).unflatten(0, (2, 2)).mean(1)
            want = mass.topk(6).indices.sort(-1).values
            got = layer.places.padded()[0, :, :, 0]
            assert torch.equal(got[:, :6].long(), want)
            assert got[:, 6:].tolist() == [[26, 27, 28, 29]] * 2


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_several_tokens_at_once_equal_one_by_one(allocation):
    model, prompt, after = tiny_model("llama"), ids(length=40), ids(length=6, seed=1)
    with SnapKV(budget_tokens=9, window=3, allocation=allocation).apply(model):
        want = decoded(model, read(model, prompt), after)
        cache = read(model, prompt)
        with torch.no_grad():
            got = model(after, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        # A later question, long enough to count as a prompt, over the same cache.
        question = ids(length=20, seed=2)
        with torch.no_grad():
            long = model(question, past_key_values=cache, use_cache=True).logits
        cache = read(model, prompt)
        decoded(model, cache, after)
        torch.testing.assert_close(long, decoded(model, cache, question), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_padded_batches_generate_as_alone(allocation):
    model, prompt = generator_of("llama"), ids(length=30)
    mask = torch.ones_like(prompt)
    mask[1, :11] = 0
    method = SnapKV(sparsity=0.6, window=4, allocation=allocation)
    with method.apply(model):
        batch = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
        first = model.generate(prompt[:1], max_new_tokens=8, do_sample=False)
        second = model.generate(prompt[1:, 11:], max_new_tokens=8, do_sample=False)
    assert torch.equal(batch[0], first[0])
    assert torch.equal(batch[1, 11:], second[0])


def test_assisted_decoding_takes_back_tokens():
    """The first call reads prompt and candidates as one, so the voters differ from greedy ones."""
    model, helper, prompt = generator_of("llama"), generator_of("qwen2"), ids(1, 30)
    with SnapKV(budget_tokens=10, window=4).apply(model) as work:
        got = model.generate(
            prompt,
            max_new_tokens=8,
            do_sample=False,
            assistant_model=helper,
            return_dict_in_generate=True,
        )
        assert work.ran["packed"] + work.ran["dense"] > 0
    assert got.sequences.shape == (1, 38)
    layer = got.past_key_values.layers[0]
    assert layer.kept_keys.counts.tolist() == [[10, 10]]
    assert layer.get_seq_length() == 37


def test_layers_with_a_window_of_their_own_are_left():
    model, prompt = tiny_model("gemma2"), ids(length=40)
    with SnapKV(budget_tokens=9, window=3).apply(model):
        cache = read(model, prompt)
        decoded(model, cache, ids(length=2, seed=1))
        assert [isinstance(layer, Shortened) for layer in cache.layers] == [False, True]
        assert cache.get_seq_length(1) == 42


def test_a_restored_method_takes_its_caches_along():
    model, prompt = tiny_model("llama"), ids(length=30)
    work = SnapKV(budget_tokens=9, window=3).apply(model)
    cache, whole = read(model, prompt), read(model, prompt)
    decoded(model, cache, ids(length=1, seed=1))
    work.restore()
    with pytest.raises(GossamerError, match="method that took the others was restored"):
        decoded(model, cache, ids(length=1, seed=2))
    # One that was not shortened yet is an ordinary cache again.
    assert type(whole.layers[0]) is type(DynamicCache(config=model.config).layers[0])
    decoded(model, whole, ids(length=1, seed=2))


def test_caches_read_before_the_method_came_are_judged_by_the_new_queries():
    model, prompt = tiny_model("llama"), ids(length=30)
    cache = read(model, prompt)
    with SnapKV(budget_tokens=9, window=3).apply(model):
        decoded(model, cache, ids(length=1, seed=1))
        assert cache.layers[0].kept_keys.counts.tolist() == [[9, 9], [9, 9]]


def test_measuring_takes_no_key():
    model = tiny_model("llama")
    method = SnapKV(sparsity=0.5, window=2, pool=1)
    with method.apply(model, random_tokens()) as work:
        rows = [row for row in work.measured if row.phase == "decode"]
        assert rows
        assert all(0 < row.mass < 1 for row in rows)
        assert "the key-value cache keeps every key" not in str(work.report())


def test_it_decodes_behind_a_sparse_prompt():
    model, prompt = generator_of("llama"), ids(length=30)
    with (FlexPrefill(block_size=4) + SnapKV(budget_tokens=9, window=3)).apply(model):
        cache = read(model, prompt)
        decoded(model, cache, ids(length=2, seed=1))
        assert isinstance(cache.layers[0], Shortened)
        twin = copy.deepcopy(cache)
        a = decoded(model, cache, ids(length=20, seed=2))
        with torch.no_grad():
            b = model(ids(length=20, seed=2), past_key_values=twin, use_cache=True).logits
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"pool": 4}, "give an odd number"),
        ({"pooling": "median"}, "unknown pooling"),
        ({"allocation": "head"}, "did you mean heads"),
        ({"floor": 1.5}, "floor is 1.5"),
        ({"window": 0}, "window"),
    ],
)
def test_bad_input(bad, words):
    with pytest.raises(GossamerError, match=words):
        SnapKV(**bad)
