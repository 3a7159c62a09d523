import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.decoding.record import calibration_rows, record
from gossamer.methods.attention.streaming_llm import StreamingLLM
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def test_every_call_is_shown_and_attention_stays_full():
    model, tokens = tiny_model("llama"), random_tokens()
    with torch.no_grad():
        dense = model(input_ids=tokens.input_ids).logits
    seen, steps = [], []
    record(
        model,
        calibration_rows("x", tokens, model, samples=2, length=7),
        lambda call, layout, layer: seen.append((layer, tuple(call.query.shape), layout.keys)),
        lambda done, total, what: steps.append((done, total)),
    )
    assert seen == [(layer, (1, 4, 7, 8), 7) for _ in range(2) for layer in range(2)]
    assert steps == [(1, 2), (2, 2)]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens.input_ids).logits, dense)


def test_keys_carry_their_positions():
    model, tokens = tiny_model("llama"), random_tokens()
    ids = tokens.input_ids[:1, :1].repeat(1, 4)
    keys = []
    record(
        model,
        type(tokens).from_ids(ids),
        lambda call, layout, layer: keys.append(call.key) if layer == 0 else None,
    )
    # Equal tokens have equal keys before the embedding, not after.
    assert not torch.allclose(keys[0][:, :, 0], keys[0][:, :, 3])


def test_a_failing_visit_leaves_no_trace():
    model = tiny_model("llama")

    def fail(call, layout, layer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, random_tokens(), fail)
    assert model.config._attn_implementation == "sdpa"


def test_data_are_asked_for():
    with pytest.raises(GossamerError, match="give it data"):
        calibration_rows("hylra", None, tiny_model("llama"), 1, 8)
    model = tiny_model("llama")
    with (
        StreamingLLM(recent=4).apply(model),
        pytest.raises(GossamerError, match="restore that method first"),
    ):
        record(model, random_tokens(), lambda *_: None)
