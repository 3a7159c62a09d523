"""Sparse-IFT on models: what is replaced, what it costs, training, saving, refusals."""

import pytest
import torch

import gossamer
from gossamer.core import GossamerError
from gossamer.methods.weights.sparse_ift import SparseIFT
from gossamer.models import Tokens, at_work, find_sites
from tests.methods.test_conformance import assert_untouched, outputs, snapshot
from tests.models.subjects import random_tokens
from tests.models.tiny import ARCHITECTURES, tiny_folder, tiny_model

TRANSFORMS = ("wide", "parallel", "factorized", "doped")
STACKED = ("mixtral", "qwen3_moe")
INNER = {"gpt2": "n_inner", "opt": "ffn_dim"}


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in STACKED])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_mlps_of_every_architecture(architecture, transform):
    model = tiny_model(architecture)
    before, dense = snapshot(model), outputs(model, architecture)
    sites = find_sites(model).select("mlp")
    with SparseIFT(transform=transform, sparsity=0.75).apply(model) as applied:
        found = outputs(model, architecture)
        assert torch.isfinite(found).all()
        assert not torch.equal(found, dense)
        assert {row.name for row in applied.report().rows} == {site.name for site in sites}
        assert applied.report().sparsity == pytest.approx(0.75, abs=1e-3)
        new, old = applied.cost()
        assert old == sum(site.size for site in sites)
        # d of 85.3 rounds up to 86 in a layer as small as this.
        assert abs(new / old - 1) < (0.02 if transform == "wide" else 0.04)
        assert applied.simulated
        assert any("random weights" in text for text in applied.report().warnings)
    assert_untouched(model, before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "bert"])
def test_wide_is_four_times_as_wide_at_three_quarters(architecture):
    model = tiny_model(architecture)
    sites = find_sites(model).select("mlp")
    with SparseIFT(sparsity=0.75).apply(model) as applied:
        for site in sites:
            layer = applied.modules[site.name]
            grown = (1, 4) if site.role == "mlp.down" else (4, 1)
            assert tuple(layer.weight.shape) == tuple(
                a * b for a, b in zip(site.shape, grown, strict=True)
            )
            assert layer.multiply_adds() == site.size
        width = getattr(model.config, INNER.get(architecture, "intermediate_size"))
        assert width == 4 * next(s.shape[1] for s in sites if s.role == "mlp.down")


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_new_layers_keep_the_scale_of_outputs(transform):
    model = tiny_model("llama")
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(1))
    site = find_sites(model).named("model.layers.0.mlp.up_proj")
    expected = float((x @ site.weight(model).T).var())
    with SparseIFT(transform=transform, sparsity=0.5).apply(model) as applied, torch.no_grad():
        assert float(applied.modules[site.name](x).var()) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("masks", ["static", "rigl"])
def test_training_learns_and_moves_masks_on_request(transform, masks):
    model = tiny_model("llama")
    data = Tokens.from_ids(torch.arange(3, 27).repeat(4, 1))
    options = {"transform": transform, "sparsity": 0.5, "masks": masks, "every": 4}
    with SparseIFT(**options).apply(model) as plain:
        start = {n: [m.clone() for _, m in x.pairs()] for n, x in plain.modules.items()}
    fixed = {n: p.clone() for n, p in model.named_parameters() if "mlp" not in n}
    method = SparseIFT(**options, steps=20, lr=1e-2, batch_size=4, decay=1e-4)
    with method.apply(model, data) as applied:
        first, last = applied.notes[-1].rpartition("loss ")[2].split(" to ")
        assert float(last) < 0.8 * float(first)
        moved = False
        for name, layer in applied.modules.items():
            for (weight, mask), old in zip(layer.pairs(), start[name], strict=True):
                assert int(mask.sum()) == int(old.sum())
                assert not weight.detach()[~mask].any()
                moved |= not torch.equal(mask, old)
        assert moved == (masks == "rigl")
        assert not applied.report().warnings
        own = dict(model.named_parameters())
        assert all(torch.equal(own[n], p) for n, p in fixed.items())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_saved_for_gossamer_and_for_plain_transformers(transform, architecture, tmp_path):
    loaded = gossamer.load(tiny_folder(tmp_path / "in", architecture))
    method = SparseIFT(transform=transform, sparsity=0.5, steps=2, every=1)
    applied = method.apply(loaded.model, random_tokens())
    expected = outputs(loaded.model, architecture)
    applied.save(tmp_path / "out", loaded.tokenizer)
    plain = type(loaded.model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(outputs(plain, architecture), expected, atol=1e-5, rtol=1e-4)
    again = gossamer.load(tmp_path / "out").model
    (work,) = at_work(again)
    torch.testing.assert_close(outputs(again, architecture), expected)
    for name, layer in work.modules.items():
        mine = applied.modules[name]
        for (_, found), (_, mask) in zip(layer.pairs(), mine.pairs(), strict=True):
            assert torch.equal(found, mask)
    assert work.report().rows == applied.report().rows
    assert work.cost()[0] == applied.cost()[0]


def test_with_a_nonlinearity_plain_transformers_reads_the_old_layers(tmp_path):
    model = tiny_model("llama")
    dense = outputs(model)
    method = SparseIFT(transform="factorized", sparsity=0.5, activation="relu")
    applied = method.apply(model)
    expected = outputs(model)
    applied.save(tmp_path / "out")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(plain), dense)
    assert any("plain transformers" in text for text in applied.report().warnings)
    from gossamer.models.store import read_stages

    (stage,) = read_stages(tmp_path / "out")
    method.reattach(plain, stage.meta, stage.tensors)
    assert torch.equal(outputs(plain), expected)


def test_changed_weights_are_noticed(tmp_path):
    model = tiny_model("llama")
    applied = SparseIFT(sparsity=0.5).apply(model)
    state = applied.state()
    loaded = tiny_model("llama")
    wide = SparseIFT(sparsity=0.5).apply(loaded)
    folder = wide.save(tmp_path / "out")
    plain = type(model).from_pretrained(folder)
    with torch.no_grad():
        plain.model.layers[0].mlp.up_proj.weight.fill_(1.0)
    with pytest.raises(GossamerError, match="not zero where its saved mask"):
        applied.method.reattach(plain, state.meta, state.tensors)
    assert not at_work(plain)


def test_bytes_saved_are_those_of_zeros_and_a_bit_each():
    model = tiny_model("llama")
    with SparseIFT(sparsity=0.75).apply(model) as applied:
        total = sum(site.size for site in applied.sites.values())
        assert applied.weight_bytes_saved() == 4 * 3 * total - 4 * total // 8


@pytest.mark.parametrize("architecture", STACKED)
def test_stacked_experts_are_refused_or_left(architecture):
    model = tiny_model(architecture)
    with pytest.raises(GossamerError, match="no MLP of single matrices"):
        SparseIFT().apply(model)
    with pytest.raises(GossamerError, match="no single matrix"):
        SparseIFT(transform="doped").apply(model)
    with SparseIFT(transform="doped", roles="attention").apply(model) as applied:
        assert len(applied.modules) == 8


def test_a_width_the_configuration_does_not_name_is_refused():
    model = tiny_model("llama")
    model.config.intermediate_size = 65
    with pytest.raises(GossamerError, match="does not name the MLP's width 64"):
        SparseIFT().apply(model)
    assert not at_work(model)


def test_an_interrupt_leaves_no_trace():
    model = tiny_model("gpt2")
    before = snapshot(model)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SparseIFT(sparsity=0.5, steps=3).apply(model, random_tokens(), progress=stop)
    assert_untouched(model, before)
    assert not at_work(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transform": "tall"}, "unknown transform"),
        ({"masks": "moving"}, "unknown masks"),
        ({"transform": "parallel", "sparsity": 0.6}, "branches"),
        ({"transform": "doped", "activation": "relu"}, "no place for relu"),
        ({"decay": -1.0}, "decay is -1.0"),
        ({"every": 0}, "every is 0"),
        ({"steps": -1}, "steps is -1"),
    ],
)
def test_impossible_parameters(values, message):
    with pytest.raises(GossamerError, match=message):
        SparseIFT(**values)


def test_densify_multiplies_out_what_has_the_old_shape():
    model = tiny_model("llama")
    applied = SparseIFT(transform="doped", sparsity=0.5).apply(model)
    expected = outputs(model)
    applied.densify()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(outputs(model), expected, atol=1e-4, rtol=1e-4)
    wide = SparseIFT(sparsity=0.5).apply(model)
    with pytest.raises(GossamerError, match="became wider"):
        wide.densify()
    assert at_work(model) == (wide,)
