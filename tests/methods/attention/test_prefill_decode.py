import pytest
import torch

from gossamer import methods
from gossamer.core import GossamerError
from gossamer.methods.attention.oracle_top_k import OracleTopK
from gossamer.methods.attention.prefill_decode import PrefillDecode
from gossamer.methods.attention.streaming_llm import StreamingLLM
from tests.methods.attention.test_contract import WAYS, ids, stepped
from tests.models.tiny import tiny_model


def test_a_sum_is_one_method_per_phase():
    both = OracleTopK(sparsity=0.8) + StreamingLLM(recent=4)
    assert both == PrefillDecode(prefill=OracleTopK(sparsity=0.8), decode=StreamingLLM(recent=4))
    assert PrefillDecode.from_dict(both.to_dict()) == both
    text = methods.parse_method("oracle_top_k:sparsity=0.8+streaming_llm:recent=4")
    assert text == both


def test_values_of_a_grid_reach_both_parts():
    both = methods.parse_method("oracle_top_k+streaming_llm", sparsity=0.75)
    assert both.prefill.sparsity == both.decode.sparsity == 0.75


def test_each_phase_is_what_it_would_be_alone():
    model, first, second = tiny_model("llama"), OracleTopK(sparsity=0.8), StreamingLLM(recent=2)
    with (first + second).apply(model):
        both = stepped(model, ids(), WAYS["decoding"])
    with first.apply(model):
        alone = stepped(model, ids(), [0, 16])
    torch.testing.assert_close(both[:, :16], alone)
    with first.apply(model):
        other = stepped(model, ids(), WAYS["decoding"])
    assert not torch.allclose(both[:, 16:], other[:, 16:])


def test_guards_of_the_parts_hold():
    model = tiny_model("llama")
    dense = stepped(model, ids(), WAYS["decoding"])
    both = OracleTopK(sparsity=0.8, min_length=17) + StreamingLLM(recent=2, dense_layers=2)
    with both.apply(model):
        got = stepped(model, ids(), WAYS["decoding"])
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-4)


def test_what_does_not_add_up():
    with pytest.raises(GossamerError, match="give a method of the attention family"):
        PrefillDecode(prefill="magnitude", decode="streaming_llm")
    with pytest.raises(GossamerError, match="do not add up"):
        methods.parse_method("magnitude+wanda")
