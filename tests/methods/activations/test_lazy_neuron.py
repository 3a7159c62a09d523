"""Top-k transformers: exact counts, gradients, generate, the statistical form, emergence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.activations.lazy_neuron import (
    Emergence,
    LazyNeuron,
    keep_largest,
    statistical_cut,
)
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


@given(st.integers(0, 9), st.integers(0, 1000))
def test_the_k_largest_values_stay(keep, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (2, 3, 9), generator=generator).double()
    kept = keep_largest(x, keep)
    for row, out in zip(x.view(-1, 9), kept.view(-1, 9), strict=True):
        order = sorted(range(9), key=lambda j: (-float(row[j]), j))
        wanted = [float(row[j]) if j in order[:keep] else 0.0 for j in range(9)]
        assert out.tolist() == wanted


def test_values_count_not_magnitudes_and_gradients_reach_the_kept():
    x = torch.tensor([[-5.0, 1.0, 0.5, 2.0]], requires_grad=True)
    out = keep_largest(x, 2)
    assert out.tolist() == [[0.0, 1.0, 0.0, 2.0]]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_the_statistical_cut_keeps_its_share_of_gaussian_rows(sparsity):
    x = 3 + 2 * torch.randn(200, 4096, generator=torch.Generator().manual_seed(0))
    out = statistical_cut(x, sparsity)
    assert float((out > 0).float().mean()) == pytest.approx(1 - sparsity, abs=0.01)
    from scipy.stats import norm

    wide = x.double()
    cutoff = wide.mean(1) + norm.ppf(sparsity) * wide.std(1, correction=0)
    assert torch.allclose(out.double(), (wide - cutoff[:, None]).relu(), atol=1e-5)


def test_statistical_gradients_flow_through_survivors():
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    statistical_cut(x, 0.7).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_generate_never_uses_more_than_k_units(name):
    model = tiny_model(name)
    method = LazyNeuron(sparsity=0.75)
    counts = []
    with method.apply(model) as work:
        path = work._units[0].functions[0]
        features = work._units[0].tap.features
        hook = model.get_submodule(path).register_forward_hook(
            lambda m, a, out: counts.append(int((out != 0).sum(-1).max()))
        )
        ids = random_tokens(3).input_ids[:2, :8]
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, **options)
        plain = model.generate(ids, use_cache=False, **options)
        hook.remove()
    assert torch.equal(cached, plain)
    assert max(counts) == round(0.25 * features)


def test_gated_models_are_cut_before_the_product():
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2))
    with LazyNeuron(sparsity=0.5).apply(model), torch.no_grad():
        found = mlp(x)
    with torch.no_grad():
        gate = mlp.act_fn(mlp.gate_proj(x))
        cut = gate.topk(32, dim=-1).values[..., -1:]
        wanted = mlp.down_proj(torch.where(gate >= cut, gate, 0) * mlp.up_proj(x))
    assert torch.allclose(found, wanted, atol=1e-6)


def test_training_under_the_rule_lowers_the_loss_and_is_undone():
    model = tiny_model("opt")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    work = LazyNeuron(sparsity=0.8, steps=10, lr=3e-3, batch_size=6).apply(model, random_tokens())
    assert work.losses[-1] < work.losses[0]
    activity = work.measure(random_tokens())
    assert all(a.nonzero <= round(0.2 * 64) / 64 + 1e-9 for a in activity.values())
    work.restore()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bytes_saved_follow_the_measured_zeros():
    model = tiny_model("llama")
    with LazyNeuron(sparsity=0.5).apply(model) as work:
        # Half of the down columns and of the up rows of two blocks.
        assert work.weight_bytes_saved() == 2 * 2 * 32 * 64 * 4 // 2
        assert "hidden activations" in str(work.report())


def test_emergence_records_layers_over_training():
    model = tiny_model("opt")
    record = Emergence()
    assert str(record) == "no step recorded"
    with pytest.raises(GossamerError, match="two recorded steps"):
        record.fall()
    record.record(0, model, random_tokens())
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias.fill_(-100.0)
    record.record(5, model, random_tokens())
    assert record.nonzero(0) > 0.3
    assert record.nonzero(5) == 0
    assert record.fall() == 0
    assert "mean" in str(record)
    assert list(record.to_dict()["nonzero"]) == ["0", "5"]
    with pytest.raises(GossamerError, match="recorded steps: 0, 5"):
        record.nonzero(3)


def test_unknown_selections_are_refused():
    with pytest.raises(GossamerError, match="selection is 'fuzzy'"):
        LazyNeuron(selection="fuzzy")  # type: ignore[arg-type]


def test_statistical_selection_works_on_a_model():
    model = tiny_model("llama")
    with LazyNeuron(sparsity=0.8, selection="statistical").apply(model) as work:
        activity = work.measure(random_tokens())
    assert all(0.05 < a.nonzero < 0.4 for a in activity.values())
