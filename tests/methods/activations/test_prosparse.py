"""ProSparse: the penalty's stages, the ReLU it leaves, what it trains, and undo."""

from math import pi, sin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.activations.prosparse import FATReLU, ProSparse, penalty_at, stages
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def test_stages_follow_the_paper():
    schedule = stages(16_500, 0.2)
    assert schedule.steps == (5_000, 6_000, 10_000, 12_000, 16_000, 16_500)
    assert schedule.peaks == pytest.approx((0, 5e-3, 5e-2, 5e-2, 2e-1, 0))
    assert {penalty_at(schedule, t) for t in (0, 4_999)} == {0.0}
    assert {penalty_at(schedule, t) for t in (5_000, 5_999)} == {0.2 * 0.025}
    for t in (6_000, 7_777, 9_999):
        wanted = 5e-3 + 0.5 * (5e-2 - 5e-3) * (1 + sin(-pi / 2 + pi * (t - 6_000) / 4_000))
        assert penalty_at(schedule, t) == pytest.approx(wanted)
    for t in (12_000, 14_000, 15_999):
        wanted = 5e-2 + 0.5 * (2e-1 - 5e-2) * (1 + sin(-pi / 2 + pi * (t - 12_000) / 4_000))
        assert penalty_at(schedule, t) == pytest.approx(wanted)
    assert penalty_at(schedule, 16_500) == 0


@given(st.integers(600, 20_000), st.floats(1e-6, 10.0))
def test_the_penalty_is_continuous_from_the_second_stage_on_and_meets_its_ends(steps, peak):
    schedule = stages(steps, peak)
    for end, value in zip(schedule.steps[1:], schedule.peaks[1:], strict=True):
        # A half sine moves at most pi / 2 of its height in one share of its length.
        shortest = min(b - a for a, b in zip(schedule.steps, schedule.steps[1:], strict=False))
        bound = 1.6 * peak / shortest
        assert abs(penalty_at(schedule, end - 1) - value) <= bound
        assert abs(penalty_at(schedule, end) - value) <= bound


@given(st.integers(6, 60))
def test_short_trainings_keep_all_six_stages(steps):
    ends = stages(steps, 1.0).steps
    assert all(b > a for a, b in zip((0, *ends), ends, strict=False))
    assert ends[-1] == steps


def test_fewer_steps_than_stages_are_refused():
    with pytest.raises(GossamerError, match="steps is 5"):
        ProSparse(steps=5)


@pytest.mark.parametrize("values", [{"penalty": -1.0}, {"threshold": float("nan")}])
def test_impossible_values_are_refused(values):
    with pytest.raises(GossamerError, match=next(iter(values))):
        ProSparse(**values)


def test_a_constant_penalty_is_the_ablation():
    method = ProSparse(penalty=0.3, rise="constant")
    assert {method.weight(step) for step in range(600)} == {0.3}
    with pytest.raises(GossamerError, match="rise is 'fast'"):
        ProSparse(rise="fast")  # type: ignore[arg-type]


def test_without_steps_to_learn_the_model_is_its_relu_twin():
    """A rate too small to matter: what is left is SiLU against ReLU with a threshold."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    method = ProSparse(steps=6, lr=1e-30, batch_size=2, threshold=0.05)
    with method.apply(model, random_tokens()), torch.no_grad():
        for layer in twin.model.layers:
            layer.mlp.act_fn = FATReLU(0.05)
        ids = random_tokens(2).input_ids
        assert torch.allclose(model(ids).logits, twin(ids).logits, atol=1e-6)


def test_the_penalty_makes_a_relu_model_sparser_and_restore_undoes_all():
    found = {}
    for penalty in (0.0, 0.5):
        model = tiny_model("llama")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        functions = [layer.mlp.act_fn for layer in model.model.layers]
        method = ProSparse(steps=60, lr=3e-3, batch_size=6, penalty=penalty)
        with method.apply(model, random_tokens()) as work:
            found[penalty] = work.report().sparsity
            assert model.config.hidden_act == "relu"
            assert len(work.losses) == 60
        assert model.config.hidden_act == "silu"
        assert [layer.mlp.act_fn for layer in model.model.layers] == functions
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert found[0.5] > found[0.0] + 0.15


def test_a_saved_folder_is_a_relu_model_for_everyone(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    work = ProSparse(steps=6, batch_size=3, threshold=0.0).apply(model, random_tokens())
    work.save(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = random_tokens(2).input_ids
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-6)


def test_half_precision_is_refused_by_name():
    model = tiny_model("llama").bfloat16()
    with pytest.raises(GossamerError, match="too coarse for small updates; load the model in"):
        ProSparse(steps=6).apply(model, random_tokens())


def test_an_interrupt_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ProSparse(steps=10, batch_size=2).apply(model, random_tokens(), progress=stop)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.config.hidden_act == "silu"
    assert not isinstance(model.model.layers[0].mlp.act_fn, FATReLU)
