"""HISA in a model: one list for all heads, keys that follow the cache, what it refuses."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention import applied as family
from gossamer.methods.attention.hisa import HISA
from gossamer.methods.attention.index import BlockIndex, FullIndex
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

SMALL = {"budget_tokens": 6, "block_size": 4, "blocks": 3, "heads": 2, "width": 8, "steps": 3}


def ids(length=24, rows=2):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def seen(monkeypatch):
    """Every index that an executor is given."""
    found, run = [], family.run

    def spy(name, call, index):
        found.append(index)
        return run(name, call, index)

    monkeypatch.setattr(family, "run", spy)
    return found


@torch.no_grad()
def test_every_query_reads_its_budget_and_all_heads_the_same(seen):
    model = tiny_model("llama")
    with HISA(**SMALL).apply(model, random_tokens()):
        seen.clear()
        model(ids())
    assert len(seen) == 2
    for index in seen:
        assert isinstance(index, BlockIndex)
        mask = index.mask()
        assert mask.shape == (2, 1, 24, 24)
        assert mask[:, 0].sum(-1).tolist() == [[min(q + 1, 6) for q in range(24)]] * 2


@torch.no_grad()
def test_padding_of_any_width_moves_nothing():
    model, tokens = tiny_model("llama"), ids()
    with HISA(**SMALL).apply(model, random_tokens()):
        want = model(tokens).logits
        for pad in (1, 3, 8):
            mask = torch.nn.functional.pad(torch.ones_like(tokens), (pad, 0))
            places = (mask.cumsum(1) - 1).clamp_min(0)
            got = model(
                torch.nn.functional.pad(tokens, (pad, 0)), attention_mask=mask, position_ids=places
            ).logits[:, pad:]
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cropped_cache_keeps_the_indexer_keys_of_what_is_left():
    model, tokens = tiny_model("llama"), ids()
    with HISA(**SMALL).apply(model, random_tokens()):
        want = model(tokens).logits[:, 20:]
        cache = model(tokens[:, :18], use_cache=True).past_key_values
        model(ids(length=5), past_key_values=cache, use_cache=True)
        cache.crop(-3)
        assert cache.get_seq_length() == 20
        # The two wrong tokens left of the five are given up as well.
        cache.crop(-2)
        model(tokens[:, 18:20], past_key_values=cache, use_cache=True)
        got = model(tokens[:, 20:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_filled_before_is_read_in_full(seen):
    model, tokens = tiny_model("llama"), ids()
    cache = model(tokens[:, :20], use_cache=True).past_key_values
    with HISA(**SMALL).apply(model, random_tokens()):
        seen.clear()
        model(tokens[:, 20:21], past_key_values=cache, use_cache=True)
    assert all(isinstance(index, FullIndex) for index in seen)


@torch.no_grad()
def test_guarded_calls_still_leave_their_keys():
    model, tokens = tiny_model("llama"), ids()
    method = HISA(**SMALL, min_length=22)
    with method.apply(model, random_tokens()) as work:
        cache = model(tokens[:, :21], use_cache=True).past_key_values
        assert work.guarded == 2
        held = cache.layers[0].gossamer_state.keyed["indexer"]
        assert held.shape == (2, 21, 8)
        model(tokens[:, 21:22], past_key_values=cache, use_cache=True)
        assert work.guarded == 2


def test_the_report_tells_of_the_training():
    with HISA(**SMALL).apply(tiny_model("llama"), random_tokens()) as work:
        text = str(work.report())
    assert "indexers trained for 3 updates" in text
    assert "blocks of 4 keys" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 6}, "multiple of 4"),
        ({"budget_tokens": 64, "block_size": 8, "blocks": 4}, "give at least 8 blocks"),
        ({"blocks": 1, "budget_tokens": 4}, "too few"),
        ({"dense_layers": 2}, "none is left to index"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        HISA(**values).apply(tiny_model("llama"), random_tokens())


def test_the_number_of_blocks_follows_the_budget():
    assert HISA(budget_tokens=2048).searched == 64
    assert HISA(budget_tokens=4, block_size=128).searched == 2
    assert HISA(blocks=0).searched == 0


def test_training_the_indexers_measures_no_break_even():
    """Dense calls would hide the layers from the training."""
    method = HISA(**{**HISA.example, "steps": 6}, backend="fastest")
    with method.apply(tiny_model("llama"), random_tokens()) as work:
        assert work.method.backend == "fastest"
        assert "6 updates" in " ".join(work.selector.notes())
