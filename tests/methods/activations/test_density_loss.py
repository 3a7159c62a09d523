"""Density loss: the soft count, plain fine-tuning bit for bit at weight 0, and adapters."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from gossamer.core import GossamerError
from gossamer.methods.activations.density_loss import DensityLoss, soft_density
from gossamer.methods.activations.training.adapters import LowRank
from gossamer.methods.activations.training.hidden import measure_activity
from gossamer.methods.activations.training.loop import Training, fit
from gossamer.models import Inputs, find_sites
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def classifier() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="relu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


def labelled() -> Inputs:
    ids = random_tokens().input_ids
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    return Inputs({"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2})


def test_the_soft_count_of_known_values():
    a = torch.tensor([[0.0, 1.0, -2.0, 1e-3]])
    eps = 1e-6
    wanted = (0 + 1 / (1 + eps) + 4 / (4 + eps) + 0.5) / 4
    assert float(soft_density(a, eps)) == pytest.approx(wanted, abs=1e-6)
    assert soft_density(torch.ones(2, 3, 5)).shape == (2, 3)


def test_half_precision_activations_are_counted_in_fp32():
    # 1e-4 squared is zero in fp16, and so would be the count.
    model = tiny_model("opt")
    with DensityLoss().term(model) as density:
        density._see(type("Tap", (), {"name": "x"}), torch.full((1, 4), 1e-3, dtype=torch.float16))
        assert float(density()) == pytest.approx(1e-6 / (1e-6 + 1e-7), rel=1e-2)


def test_weight_zero_is_plain_low_rank_fine_tuning_bit_for_bit():
    one, other, data = classifier(), classifier(), labelled()
    method = DensityLoss(weight=0.0, steps=5, lr=1e-2, rank=3, batch_size=3, seed=4)
    with method.apply(one, data):
        chosen = find_sites(other).select(("attention", "mlp"))
        adapters = LowRank(other, chosen, rank=3, seed=4)
        with adapters:
            plan = Training(steps=5, lr=1e-2, batch_size=3, seed=4)
            trained = [*adapters.parameters(), *other.classifier.parameters()]
            fit(other, data, plan, parameters=trained)
        adapters.merge()
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_the_term_lowers_the_density_below_plain_fine_tuning():
    found = {}
    for weight in (0.0, 1.0):
        model = classifier()
        method = DensityLoss(weight=weight, steps=60, lr=1e-2, batch_size=6)
        with method.apply(model, labelled()) as work:
            found[weight] = 1 - work.report().sparsity
            assert work.tolerance == 0.0
    assert found[1.0] < 0.7 * found[0.0]


def test_only_the_chosen_parameters_change_and_come_back():
    model = classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = DensityLoss(steps=3, lr=1e-2, batch_size=3, roles=("mlp.up",), head=("classifier",))
    work = method.apply(model, labelled())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.1.intermediate.dense.weight",
        "classifier.weight",
        "classifier.bias",
    }
    rank = torch.linalg.matrix_rank(
        model.bert.encoder.layer[0].intermediate.dense.weight
        - before["bert.encoder.layer.0.intermediate.dense.weight"],
        rtol=1e-4,
    )
    assert int(rank) <= 8
    work.restore()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_term_serves_any_training_loop():
    model = tiny_model("opt")
    tokens = random_tokens()
    before = measure_activity(model, tokens)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    with DensityLoss().term(model) as density:
        for _ in range(20):
            loss = model(input_ids=tokens.input_ids, labels=tokens.input_ids).loss + density()
            loss.backward()
            adam.step()
            adam.zero_grad()
    after = measure_activity(model, tokens)
    assert all(after[name].nonzero < before[name].nonzero for name in before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_updates_are_what_the_hooks_computed(name):
    model = tiny_model(name)
    adapters = LowRank(model, find_sites(model).select(("attention", "mlp")), rank=2, seed=1)
    ids = random_tokens().input_ids
    with torch.no_grad():
        dense = model(ids).logits
        with adapters:
            assert torch.allclose(model(ids).logits, dense, atol=1e-6)
            for up in adapters.up:
                up.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
            hooked = model(ids).logits
        assert not torch.allclose(hooked, dense, atol=1e-2)
        adapters.merge()
        assert torch.allclose(model(ids).logits, hooked, atol=1e-4)


def test_smooth_functions_are_counted_with_a_stated_tolerance():
    model = tiny_model("llama")
    with DensityLoss(steps=0, epsilon=1e-4).apply(model, random_tokens()) as work:
        assert work.tolerance == pytest.approx(1e-2)
        assert "|a| <= 0.01" in str(work.report())


def test_only_exact_zeros_save_bytes_and_only_down_columns_behind_silu():
    model = tiny_model("llama")
    with torch.no_grad():
        # Half of the products of the first block are zeros of the up projection.
        model.model.layers[0].mlp.up_proj.weight[:32] = 0
    with DensityLoss(steps=0, epsilon=1e-2).apply(model, random_tokens()) as work:
        assert work.report().sparsity > 0.5
        assert work.weight_bytes_saved() == 32 * 32 * 4
    relu = tiny_model("opt")
    with DensityLoss(steps=0).apply(relu, random_tokens()) as work:
        removed = sum((1 - a.nonzero) * 32 * 64 * 4 for a in work.activity.values())
        assert work.weight_bytes_saved() == round(removed) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": -1.0}, "weight is -1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"rank": 0}, "rank is 0"),
        ({"roles": ("mpl",)}, "mpl"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        DensityLoss(**values)


def test_experts_are_refused_by_name():
    model = tiny_model("mixtral")
    sites = [site for site in find_sites(model).sites if site.expert is not None]
    with pytest.raises(GossamerError, match="stacked experts"):
        LowRank(model, sites)
