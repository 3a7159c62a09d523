"""Monarch on models: projection in place, fine-tuning, reverse sparsification, saving."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import gossamer
from gossamer.core import GossamerError
from gossamer.methods.weights.monarch import Monarch
from gossamer.methods.weights.structured.monarch import MonarchLinear, multiply_out, project
from gossamer.models import Inputs, Tokens, at_work, find_sites
from tests.methods.test_conformance import inputs_for, outputs
from tests.models.subjects import random_tokens
from tests.models.tiny import ARCHITECTURES, ENCODERS, tiny_folder, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_becomes_its_projection(architecture):
    model = tiny_model(architecture)
    method = Monarch(sparsity=0.5)
    wanted = {}
    for site in find_sites(model).select(("attention", "mlp")):
        weight = site.weight(model)
        wanted[site.name] = multiply_out(
            *project(weight, method.shape_of(site)), method.shape_of(site)
        )
    assert wanted
    data = Inputs(inputs_for("vit")) if architecture == "vit" else random_tokens()
    with method.apply(model, data) as applied:
        assert applied.modules.keys() == wanted.keys()
        for name, layer in applied.modules.items():
            torch.testing.assert_close(layer.dense(), wanted[name])
        assert all(isinstance(model.get_submodule(n), MonarchLinear) for n in wanted)
        found = outputs(model, architecture)
    # A model with the projections written in computes the same.
    for site in find_sites(model).select(("attention", "mlp")):
        site.write(model, wanted[site.name])
    torch.testing.assert_close(outputs(model, architecture), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_stacked_experts_stay_and_are_noted(architecture):
    model = tiny_model(architecture)
    with Monarch().apply(model) as applied:
        assert {site.role.partition(".")[0] for site in applied.sites.values()} == {"attention"}
        assert "2 modules of stacked experts stay dense" in applied.report().notes
    with pytest.raises(GossamerError, match="no single matrix"):
        Monarch(roles="experts").apply(model)


def test_report_counts_what_is_gone():
    model = tiny_model("llama")
    total = sum(p.numel() for p in model.parameters())
    with Monarch(nblocks=4, roles="mlp").apply(model) as applied:
        report = applied.report()
        left = sum(p.numel() for p in model.parameters())
        assert not report.simulated
        assert report.all_size == total
        assert report.sparsity_all == pytest.approx(1 - left / total)
        # 32 x 64: rank 2 in 4 blocks, 4 * 4 * 2 * (8 + 16) of 2048 parameters.
        assert {round(row.sparsity, 6) for row in report.rows} == {1 - 768 / 2048}
        assert "relative squared error" in report.notes[0]


def test_more_parameters_than_dense_is_warned_of():
    with Monarch(nblocks=4, rank=8, roles="mlp.down").apply(tiny_model("llama")) as applied:
        assert "no fewer parameters" in applied.report().warnings[0]


def test_full_rank_leaves_the_function():
    model = tiny_model("gpt2")
    dense = outputs(model, "gpt2")
    with Monarch(nblocks=4, rank=8).apply(model):
        torch.testing.assert_close(outputs(model, "gpt2"), dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fine_tuning_trains_the_new_layers_only(architecture):
    model = tiny_model(architecture)
    data = Tokens.from_ids(torch.arange(3, 27).repeat(4, 1))
    fixed = {n: p.clone() for n, p in model.named_parameters()}
    with Monarch(sparsity=0.5).apply(model) as plain:
        start = {n: m.left.clone() for n, m in plain.modules.items()}
    method = Monarch(sparsity=0.5, steps=25, lr=1e-2, batch_size=4)
    steps = []
    with method.apply(model, data, progress=lambda *a: steps.append(a)) as applied:
        assert all(not torch.equal(m.left, start[n]) for n, m in applied.modules.items())
        new = tuple(f"{name}." for name in applied.modules)
        own = {n: p for n, p in model.named_parameters() if not n.startswith(new)}
        assert own
        assert all(torch.equal(p, fixed[n]) for n, p in own.items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        first, last = applied.notes[-1].rpartition("loss ")[2].split(" to ")
        assert float(last) < 0.8 * float(first)
    assert steps[-1][:2] == (25, 25)
    assert all(torch.equal(p, fixed[n]) for n, p in model.named_parameters())


def test_an_interrupted_fine_tuning_leaves_no_trace():
    model = tiny_model("llama")
    before = {n: p.clone() for n, p in model.state_dict().items()}

    def stop(done, total, what):
        if "loss" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Monarch(steps=5).apply(model, random_tokens(), progress=stop)
    assert not at_work(model)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_models_without_a_loss_are_refused():
    model = tiny_model("bert")
    with pytest.raises(GossamerError, match="no loss"):
        Monarch(steps=1).apply(model, random_tokens())
    assert not at_work(model)


def test_a_diverging_fine_tuning_is_refused():
    with pytest.raises(GossamerError, match="lower the learning rate"):
        Monarch(steps=20, lr=1e30).apply(tiny_model("llama"), random_tokens())


class TestDensify:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
    def test_the_model_is_dense_and_computes_the_same(self, architecture):
        model = tiny_model(architecture)
        kinds = {n: type(m) for n, m in model.named_modules()}
        names = {n: p.shape for n, p in model.named_parameters()}
        applied = Monarch(sparsity=0.5).apply(model)
        small = outputs(model, architecture)
        assert applied.densify() is model
        assert not at_work(model)
        assert {n: type(m) for n, m in model.named_modules()} == kinds
        assert {n: p.shape for n, p in model.named_parameters()} == names
        torch.testing.assert_close(outputs(model, architecture), small, atol=1e-4, rtol=1e-4)

    def test_training_goes_on_dense(self):
        model = tiny_model("gpt2")
        Monarch(sparsity=0.5).apply(model).densify()
        layer = model.transformer.h[0].mlp.c_fc
        assert isinstance(layer, Conv1D)
        before = layer.weight.clone()
        ids = random_tokens().input_ids
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert not torch.equal(layer.weight, before)

    def test_works_without_undo(self):
        model = tiny_model("llama")
        applied = Monarch(sparsity=0.5).apply(model, undo=False)
        with pytest.raises(GossamerError, match="without undo"):
            applied.restore()
        small = outputs(model)
        applied.densify()
        torch.testing.assert_close(outputs(model), small, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral"])
def test_saved_for_gossamer_and_for_plain_transformers(architecture, tmp_path):
    folder = tiny_folder(tmp_path / "in", architecture)
    loaded = gossamer.load(folder)
    applied = Monarch(sparsity=0.5, steps=2).apply(loaded.model, random_tokens())
    expected = outputs(loaded.model, architecture)
    applied.save(tmp_path / "out", loaded.tokenizer)
    plain = type(loaded.model).from_pretrained(tmp_path / "out").eval()
    assert not at_work(plain)
    torch.testing.assert_close(outputs(plain, architecture), expected, atol=1e-4, rtol=1e-4)
    again = gossamer.load(tmp_path / "out").model
    (work,) = at_work(again)
    assert torch.equal(outputs(again, architecture), expected)
    assert work.report().rows == applied.report().rows
    assert work.report().notes == applied.report().notes
    work.restore()
    torch.testing.assert_close(outputs(again, architecture), expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_models():
    model = tiny_model("llama").bfloat16()
    with Monarch(sparsity=0.5).apply(model) as applied:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.isfinite(outputs(model)).all()
        assert applied.modules


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nblocks": 0}, "nblocks is 0"),
        ({"rank": 1, "sparsity": 0.5}, "give one"),
        ({"rank": 0}, "rank is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_impossible_parameters(values, message):
    with pytest.raises(GossamerError, match=message):
        Monarch(**values)


def test_too_many_blocks_name_the_layer_and_change_nothing():
    model = tiny_model("llama")
    # Keys have 16 outputs.
    with pytest.raises(GossamerError, match=r"layers\.0\.self_attn\.k_proj: nblocks is 32"):
        Monarch(nblocks=32).apply(model)
    assert not at_work(model)


def test_broken_weights_are_named_and_nothing_is_left():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(GossamerError, match=r"layers\.1\.mlp\.down_proj: .*NaN"):
        Monarch().apply(model)
    assert not at_work(model)
    assert find_sites(model).select("attention")


@pytest.mark.parametrize("architecture", ENCODERS)
def test_encoders_are_projected(architecture):
    model = tiny_model(architecture)
    dense = outputs(model, architecture)
    with Monarch().apply(model):
        assert not torch.equal(outputs(model, architecture), dense)
    assert torch.equal(outputs(model, architecture), dense)


def test_roles_as_text():
    assert Monarch(roles="mlp,attention.q").roles == ("mlp", "attention.q")
    made = gossamer.method("monarch:roles=mlp.down:nblocks=2")
    assert made == Monarch(roles=("mlp.down",), nblocks=2)
