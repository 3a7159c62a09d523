"""The block-by-block search in a model that brings its own indexer."""

import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from gossamer.core import GossamerError
from gossamer.methods.attention.hisa import HISA
from gossamer.methods.attention.indexer.native import is_native, native_indexers
from gossamer.models import at_work
from tests.models.tiny import tiny_model


def dsa(topk=8):
    config = DeepseekV32Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        # So many that no key is met by none: scores of exactly 0 would tie.
        index_n_heads=12,
        index_head_dim=16,
        index_topk=topk,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return DeepseekV32ForCausalLM(config).eval()


def ids(length=40, rows=2):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, tokens, **more):
    return model(input_ids=tokens, **more).logits


def test_it_is_told_from_other_models():
    assert is_native(dsa())
    assert len(native_indexers(dsa())) == 2
    assert not is_native(tiny_model("llama"))


@pytest.mark.parametrize("blocks", [0, 40])
def test_searching_everything_is_the_model_itself(blocks):
    model = dsa()
    want = logits(model, ids())
    with HISA(budget_tokens=8, block_size=4, blocks=blocks).apply(model):
        torch.testing.assert_close(logits(model, ids()), want)


def test_fewer_blocks_change_the_choice_and_undoing_gives_the_model_back():
    model = dsa()
    want = logits(model, ids())
    work = HISA(budget_tokens=8, block_size=4, blocks=3).apply(model)
    assert not torch.allclose(logits(model, ids()), want, atol=1e-5)
    # Ten block means and three blocks of keys instead of forty keys.
    assert work.scored == 10 + 12
    assert "indexer scores" in str(work.report())
    assert 0 < work.report().sparsity < 1
    work.restore()
    assert torch.equal(logits(model, ids()), want)
    assert not at_work(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_every_choice_is_causal_and_holds_the_first_and_the_own_block(monkeypatch):
    model, seen = dsa(), []
    with HISA(budget_tokens=8, block_size=4, blocks=3).apply(model) as work:
        search = work._search

        def spy(query, weight, key, mask, keep):
            chosen = search(query, weight, key, mask, keep)
            seen.append(chosen)
            return chosen

        monkeypatch.setattr(work, "_search", spy)
        logits(model, ids())
    at = torch.arange(40)[None, :, None]
    for chosen in seen:
        assert chosen.dtype == torch.int32
        assert chosen.shape == (2, 40, 8)
        assert bool((chosen <= at).all())
        # Until there are more keys than the budget all of them are chosen.
        for query in range(8):
            assert set(chosen[0, query].tolist()) == set(range(query + 1))


def test_decoding_over_a_cache_is_the_whole_prompt():
    model = dsa()
    with HISA(budget_tokens=8, block_size=4, blocks=3).apply(model):
        want = logits(model, ids())
        with torch.no_grad():
            first = model(input_ids=ids()[:, :30], use_cache=True)
            parts, cache = [first.logits], first.past_key_values
            for at in range(30, 40):
                out = model(ids()[:, at : at + 1], past_key_values=cache, use_cache=True)
                parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-4, rtol=1e-4)


def test_it_is_saved_and_attached_again():
    model = dsa()
    with HISA(budget_tokens=8, block_size=4, blocks=3).apply(model) as work:
        want, state, method = logits(model, ids()), work.state(), work.method
    with method.reattach(model, state.meta, state.tensors):
        assert torch.equal(logits(model, ids()), want)


def test_too_few_blocks_for_the_models_own_budget_are_refused():
    with pytest.raises(GossamerError, match="hold fewer than the model's 8"):
        HISA(budget_tokens=4, block_size=2, blocks=2).apply(dsa())
