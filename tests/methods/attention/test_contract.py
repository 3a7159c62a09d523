"""What every method of the family promises, generated from the directory.

A method opts out of a check by name, with a reason, in its ``exempt`` mapping; ``peeks`` and
``chunked`` say why two ways of giving a prompt differ.
"""

import copy
from itertools import pairwise

import pytest
import torch

from gossamer import methods
from gossamer.claims.lm import heldout, nano
from gossamer.core import GossamerError
from gossamer.methods.attention import applied as family
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.random_keys import RandomKeys
from gossamer.methods.attention.streaming_llm import StreamingLLM
from gossamer.models import Tokens
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

SUBJECTS = ("language model", "decoding language model")
KEYS = [
    key
    for key in methods.keys("attention")
    if issubclass(methods.get(key), AttentionMethod) and methods.get(key).subject in SUBJECTS
]


def of(key, **values):
    return methods.make(key, **{**methods.get(key).example, **values})


def full(key):
    return of(key, **methods.get(key).full)


def unless_exempt(key, check):
    if (reason := methods.get(key).exempt.get(check)) is not None:
        pytest.skip(f"{key}: {reason}")


def ids(rows=2, length=24, seed=3):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def generator(name="llama"):
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def stepped(model, tokens, edges, mask=None):
    """Logits of a sequence given in parts over one cache."""
    parts, cache = [], None
    for start, stop in pairwise(edges):
        more = {}
        if mask is not None:
            # As ``generate`` numbers them: scores by channel are not blind to a common rotation.
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
            more = {"attention_mask": mask[:, :stop], "position_ids": places}
        out = model(tokens[:, start:stop], past_key_values=cache, use_cache=True, **more)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


WAYS = {
    "at once": [0, 24],
    "decoding": [0, 16, *range(17, 25)],
    "in chunks": [0, 9, 18, 24],
}


def test_the_directory_gives_something_to_check():
    assert {"streaming_llm", "oracle_top_k", "random_keys", "prefill_decode"} <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
class TestContract:
    @pytest.mark.parametrize("way", WAYS)
    def test_full_density_is_the_dense_model(self, key, way):
        if not methods.get(key).full:
            pytest.skip(f"{key} has no parameters at which nothing is removed")
        model = tiny_model("llama")
        want = stepped(model, ids(), WAYS[way])
        with full(key).apply(model, random_tokens()):
            got = stepped(model, ids(), WAYS[way])
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("way", WAYS)
    def test_no_query_reads_what_the_model_hides(self, key, way, monkeypatch):
        kept, run = [], family.run

        def spy(name, call, index):
            kept.append(bool((index.mask() & ~index.layout.mask()).any()))
            return run(name, call, index)

        model = tiny_model("llama")
        with of(key).apply(model, random_tokens()):
            monkeypatch.setattr(family, "run", spy)
            stepped(model, ids(), WAYS[way])
        assert kept
        assert not any(kept)

    def test_later_tokens_do_not_reach_earlier_ones(self, key):
        if methods.get(key).peeks:
            pytest.skip(f"{key}: {methods.get(key).peeks}")
        model, changed = tiny_model("llama"), ids()
        changed[:, 20:] = ids(seed=4)[:, 20:]
        with of(key).apply(model, random_tokens()):
            first = stepped(model, ids(), WAYS["at once"])
            second = stepped(model, changed, WAYS["at once"])
        torch.testing.assert_close(first[:, :20], second[:, :20], atol=1e-6, rtol=0)
        assert not torch.allclose(first[:, 20:], second[:, 20:])

    @pytest.mark.parametrize("way", ["at once", "decoding"])
    def test_left_padding_by_whole_blocks_changes_nothing(self, key, way):
        unless_exempt(key, "padding")
        model, pad = tiny_model("llama"), 8
        padded = torch.nn.functional.pad(ids(), (pad, 0), value=0)
        mask = torch.nn.functional.pad(torch.ones_like(ids()), (pad, 0))
        # A row without padding beside the padded ones, so that the batch is truly ragged.
        padded = torch.cat([padded, ids(1, 24 + pad, seed=9)])
        mask = torch.cat([mask, torch.ones(1, 24 + pad, dtype=torch.long)])
        edges = [0, *(e + pad for e in WAYS[way][1:])]
        with of(key).apply(model, random_tokens()):
            want = stepped(model, ids(), WAYS[way])
            got = stepped(model, padded, edges, mask)
        torch.testing.assert_close(got[:2, pad:], want, atol=2e-5, rtol=1e-4)

    def test_chunks_equal_one_prompt(self, key):
        if methods.get(key).chunked:
            pytest.skip(f"{key}: {methods.get(key).chunked}")
        model = tiny_model("llama")
        # The chunks are long enough to be no decoding: at most 16 tokens over a cache would be.
        tokens = ids(length=72)
        with of(key).apply(model, random_tokens()):
            want = stepped(model, tokens, [0, 72])
            got = stepped(model, tokens, [0, 24, 48, 72])
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)

    def test_generation_at_full_density_is_dense_generation(self, key):
        if not methods.get(key).full:
            pytest.skip(f"{key} has no parameters at which nothing is removed")
        model, prompt = generator(), ids()
        ways = generation_ways(key)
        want = [model.generate(prompt, max_new_tokens=6, **way) for way in ways]
        with full(key).apply(model, random_tokens()):
            got = [model.generate(prompt, max_new_tokens=6, **way) for way in ways]
        for a, b, way in zip(got, want, ways, strict=True):
            assert torch.equal(a, b), way

    def test_generation_is_decoding_step_by_step(self, key):
        model, prompt = generator(), ids()
        with of(key).apply(model, random_tokens()):
            got = model.generate(prompt, max_new_tokens=8, do_sample=False)
            logits = stepped(model, got, [0, 24, *range(25, 33)])
        assert torch.equal(logits[:, 23:-1].argmax(-1), got[:, 24:])

    def test_beams_and_copied_caches_follow_their_rows(self, key):
        unless_exempt(key, "beam search")
        model, prompt = generator(), ids()
        with of(key).apply(model, random_tokens()):
            runs = [
                model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False)
                for _ in range(2)
            ]
            assert torch.equal(*runs)
            with torch.no_grad():
                cache = model(prompt, use_cache=True).past_key_values
                twin = copy.deepcopy(cache)
                order = torch.tensor([1, 0])
                cache.reorder_cache(order)
                step = ids(2, 1, seed=8)
                a = model(step, past_key_values=cache, use_cache=True).logits
                b = model(step[order], past_key_values=twin, use_cache=True).logits
        torch.testing.assert_close(a, b[order], atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt2", "opt"])
    def test_other_architectures_decode(self, key, name):
        """Sliding windows, capped scores, learned positions, heads without groups."""
        model, prompt = generator(name), ids()
        if methods.get(key).full:
            want = model.generate(prompt, max_new_tokens=6, do_sample=False)
            with full(key).apply(model, random_tokens()):
                got = model.generate(prompt, max_new_tokens=6, do_sample=False)
            assert torch.equal(got, want)
        with of(key).apply(model, random_tokens()):
            got = model.generate(prompt, max_new_tokens=8, do_sample=False)
            logits = stepped(model, got, [0, 24, *range(25, 33)])
        assert torch.isfinite(logits).all()
        assert torch.equal(logits[:, 23:-1].argmax(-1), got[:, 24:])

    def test_saved_plans_of_other_models_are_refused(self, key):
        model = tiny_model("llama")
        with of(key).apply(model, random_tokens()) as work:
            state, method = work.state(), work.method
        other = tiny_model("gpt2")
        with pytest.raises(GossamerError, match="was made for a model of 2 layers"):
            method.reattach(other, state.meta, state.tensors)

    def test_lengths_over_the_model_s_limit_are_refused(self, key):
        with pytest.raises(GossamerError, match="limit of 128"):
            of(key, length=129).apply(tiny_model("llama"), random_tokens())


def generation_ways(key):
    ways = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 2},
        {"do_sample": False, "prefill_chunk_size": 10},
    ]
    exempt = methods.get(key).exempt
    if "beam search" in exempt:
        ways.pop(1)
    if "static cache" not in exempt:
        ways.append({"do_sample": False, "cache_implementation": "static"})
    return ways


@pytest.mark.parametrize("key", KEYS)
def test_assisted_decoding(key):
    unless_exempt(key, "assisted decoding")
    if not methods.get(key).full:
        pytest.skip(f"{key} has no parameters at which nothing is removed")
    model, helper, prompt = generator(), generator(), ids(rows=1)
    want = model.generate(prompt, max_new_tokens=8, do_sample=False)
    with full(key).apply(model, random_tokens()):
        got = model.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=helper)
    assert torch.equal(got, want)


CHOOSING = [key for key in KEYS if methods.get(key).selects]


@pytest.mark.parametrize("key", CHOOSING)
def test_choice_keeps_more_mass_than_chance_and_a_window(key):
    """On real activations, at the density each layer has, weighted by pairs."""
    tokens = heldout(1, 256)
    model = nano().model
    with of(key, length=256).apply(model, tokens) as work:
        mine = work.measured
    phases = {row.phase for row in mine}
    total = sum(row.total for row in mine)
    density = sum(row.kept for row in mine) / total
    mass = sum(row.mass * row.total for row in mine) / total
    assert 0.0 < density < 1.0
    assert 0.0 < mass <= 1.0 + 1e-6

    def control(method):
        with method.apply(model, Tokens(tokens.input_ids, tokens.attention_mask)) as other:
            rows = [row for row in other.measure(tokens) if row.phase in phases]
        weight = sum(row.total for row in rows)
        kept = sum(row.kept for row in rows) / weight
        assert kept >= density - 0.02, "the control must keep as much"
        return sum(row.mass * row.total for row in rows) / weight

    if "beats random" not in methods.get(key).exempt:
        assert mass > control(RandomKeys(sparsity=1 - density, length=256))
    if "beats window" not in methods.get(key).exempt and density < 0.9:
        # A window holds its share over whole prompts; late queries need it in keys.
        whole = "prefill" in phases
        amount = {"sparsity": 1 - density} if whole else {"recent": int(density * 256)}
        assert mass > control(StreamingLLM(**amount, sink=1, length=256)) - 1e-3
