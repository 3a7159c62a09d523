"""Training under a pattern: it is at work meanwhile, and undoing gives the weights back."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.s2_attention import S2Attention
from gossamer.models import Inputs, at_work
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def method(**values):
    given = {"block": 4, "local": 1, "stride": 2, "dense_every": 0, "steps": 3, "batch_size": 3}
    return S2Attention(**{**given, **values})


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_training_lowers_the_loss_and_restore_gives_the_weights_back():
    model, tokens = tiny_model("llama"), random_tokens()
    before = weights(model)
    work = method(steps=30, lr=3e-3).apply(model, tokens)
    assert sum(work.losses[-5:]) < sum(work.losses[:5])
    assert not same(model, before)
    assert work.rewrites
    assert "trained for 30 updates" in str(work.report())
    assert not work.ran, "training is no use of the trained model"
    work.restore()
    assert same(model, before)
    assert not at_work(model)


def test_the_pattern_is_at_work_while_training():
    """Weights trained under another pattern differ: a pattern put in place afterwards would not."""
    trained = []
    for stride in (2, 4):
        model = tiny_model("llama")
        with method(stride=stride).apply(model, random_tokens()):
            trained.append(torch.cat([w.flatten() for w in weights(model)]))
    assert not torch.equal(*trained)


def test_no_steps_leave_the_weights_alone():
    model = tiny_model("llama")
    before = weights(model)
    with method(steps=0).apply(model, random_tokens()) as work:
        assert same(model, before)
        assert not work.rewrites


def test_labels_choose_what_is_learned():
    model, tokens = tiny_model("llama"), random_tokens()
    labels = torch.full_like(tokens.input_ids, -100)
    labels[:, -1] = 7
    data = Inputs({"input_ids": tokens.input_ids, "labels": labels})
    with method(steps=25, lr=3e-3).apply(model, data), torch.no_grad():
        assert (model(tokens.input_ids).logits[:, -2].argmax(-1) == 7).all()


def test_half_precision_weights_are_trained_in_float32_and_come_back():
    model = tiny_model("llama").bfloat16()
    before = weights(model)
    work = method().apply(model, random_tokens())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not same(model, before)
    work.restore()
    assert same(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_training_leaves_no_trace(error):
    model = tiny_model("llama")
    before, implementation = weights(model), model.config._attn_implementation

    def stop(done, steps, what):
        if done == 2:
            raise error

    with pytest.raises(error):
        method().apply(model, random_tokens(), progress=stop)
    assert same(model, before)
    assert model.config._attn_implementation == implementation
    assert not at_work(model)


def test_data_of_another_kind_are_refused():
    with pytest.raises(GossamerError, match="the inputs hold pixels; give input_ids"):
        method().apply(tiny_model("llama"), Inputs({"pixels": torch.zeros(2, 3)}))


def test_samples_over_the_limit_are_refused():
    data = Inputs({"input_ids": torch.zeros(2, 129, dtype=torch.long)})
    with pytest.raises(GossamerError, match="limit of 128"):
        method().apply(tiny_model("llama"), data)
