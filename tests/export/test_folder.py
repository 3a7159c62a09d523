"""An exported folder gives the model back, whole, and refuses what it cannot give back."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import gossamer
from gossamer import export
from gossamer.core import GossamerError
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.models import load_model
from tests.models.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(24).view(2, 12)


def pruned(name="llama", dtype=torch.bfloat16, pattern="2:4", **fields):
    model = tiny_model(name).to(dtype)
    Magnitude(pattern=pattern, **fields).apply(model, undo=False)
    return model


def same_model(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        whole = tensor.contiguous().view(torch.uint8)
        assert torch.equal(whole, right[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("format", export.FORMATS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_model_comes_back_with_equal_logits(tmp_path, name, format):
    model = pruned(name, torch.float32)
    export.write(model, tmp_path / "out", format)
    read = export.read(tmp_path / "out").model
    same_model(model, read)
    assert not read.training
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, read(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back(tmp_path, dtype):
    model = pruned(dtype=dtype, pattern="row", sparsity=0.9)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf")])
        weight[1] = 0
        weight[2] = 1
        # A mixed model, as transformers keeps some norms in float32.
        model.model.norm.to(torch.float32)
    for format in ("bitmask", "csr", "sparse-bitmask"):
        report = export.write(model, tmp_path / format, format)
        assert len(report.matrices) == 14
        same_model(model, export.read(tmp_path / format).model)


def test_encoders_and_mixtures_of_experts_come_back(tmp_path):
    for name in ("bert", "vit", "phi3", "qwen3_moe"):
        model = pruned(name)
        assert export.write(model, tmp_path / name, "nm").matrices
        read = export.read(tmp_path / name).model
        assert type(read) is type(model)
        same_model(model, read)


@pytest.mark.parametrize("format", ["bitmask", "sparse-bitmask"])
def test_tied_embeddings_are_stored_once(tmp_path, format):
    model = pruned("gpt2")
    report = export.write(model, tmp_path / "out", format)
    names = [row.name for row in report.rows]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert not any(name.startswith("lm_head") for name in load_file(file))
    read = export.read(tmp_path / "out").model
    assert read.lm_head.weight is read.transformer.wte.weight


def test_inputs_count_along_the_input_dimension(tmp_path):
    """GPT-2 stores (in, out): its 2:4 runs down the columns, and comes back so."""
    model = pruned("gpt2")
    report = export.write(model, tmp_path / "out", "nm")
    assert len(report.matrices) == 8
    weight = model.transformer.h[0].attn.c_attn.weight
    assert not ((weight.view(32, -1, 4) != 0).sum(2) <= 2).all()


def test_bytes_are_exact(tmp_path):
    """bρ + 1 bits a weight and not a byte more, headers counted apart."""
    model = pruned(sparsity=0.5, pattern="row")
    report = export.write(model, tmp_path / "out", "bitmask")
    for row in report.matrices:
        assert row.sparsity == 0.5
        assert row.bytes == row.size * 2 // 2 + row.size // 8
        assert row.bits == row.limit == 9
        assert row.overhead == 0
        assert row.share == 9 / 16
    files = ["gossamer-weights.safetensors", "gossamer-export.json"]
    on_disk = sum((tmp_path / "out" / name).stat().st_size for name in files)
    assert report.bytes == on_disk
    dense = 2 * sum(p.numel() for p in model.parameters())
    assert report.share == pytest.approx(on_disk / dense)
    matrices = sum(row.size for row in report.matrices)
    assert report.matrix_share == (matrices * 9 // 8 + report.metadata) / (2 * matrices)
    assert report.matrix_limit == 9 / 16


@pytest.mark.parametrize(
    ("format", "pattern"),
    [("bitmask", "row"), ("nm", "2:4"), ("sparse-24-bitmask", "2:4")],
)
def test_half_the_packaged_models_weights_take_0_57_of_bf16(tmp_path, format, pattern):
    model = gossamer.load("nano", dtype="bfloat16").model
    Magnitude(sparsity=0.5, pattern=pattern).apply(model, undo=False)
    report = export.write(model, tmp_path / "out", format)
    assert len(report.matrices) == 56
    assert 9 / 16 <= report.matrix_share <= 0.57
    size = sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if "config" not in f.name)
    dense = 2 * sum(p.numel() for p in model.parameters())
    # The embedding, 14 % of the parameters, is dense: the whole file is larger.
    assert report.share == pytest.approx(size / dense, abs=5e-4)
    assert report.share < 0.63


def test_what_does_not_pay_is_dense_and_said(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0
        model.model.layers[1].mlp.up_proj.weight[::2] = 0
    report = export.write(model, tmp_path / "out")
    assert [row.name for row in report.matrices] == ["model.layers.1.mlp.up_proj.weight"]
    assert "layers.0.mlp.up_proj.weight stored dense: its zeros save nothing" in str(report)
    same_model(model, export.read(tmp_path / "out").model)
    dense = export.write(tiny_model("llama"), tmp_path / "dense")
    assert "no matrix has zeros enough" in str(dense)
    assert json.loads(json.dumps(dense.to_dict()))["share"] > 2


def test_a_model_that_is_not_2_of_4_is_named(tmp_path):
    model = pruned(pattern="row", sparsity=0.5)
    with pytest.raises(GossamerError, match=r"layers\.0\.self_attn\.q_proj\.weight is not 2:4"):
        export.write(model, tmp_path / "out", "nm")
    with pytest.raises(GossamerError, match=r"q_proj\.weight is not 2:4: output 0 keeps 4"):
        export.write(tiny_model("llama"), tmp_path / "out", "sparse-24-bitmask")
    model = pruned()
    with pytest.raises(GossamerError, match="is not 1:4"):
        export.write(model, tmp_path / "out", "nm", pattern="1:4")
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.copy_(torch.where(weight == 0, -0.0, weight))
    assert not (tmp_path / "out").exists()
    report = export.write(model, tmp_path / "dropped", "nm", signed_zeros=False)
    assert len(report.matrices) == 14
    read = export.read(tmp_path / "dropped").model
    assert torch.equal(read.model.layers[1].mlp.up_proj.weight, weight)
    with torch.no_grad():
        for layer in model.model.layers:
            for module in (layer.self_attn.q_proj, layer.mlp.up_proj):
                module.weight.copy_(torch.where(module.weight == 0, -0.0, module.weight))
    kept = export.write(model, tmp_path / "kept", "nm")
    assert "(some of them -0.0, which signed_zeros=False drops)" in str(kept)


def test_dense_layers_beside_2_of_4_stay_dense(tmp_path):
    model = pruned()
    dense = tiny_model("llama", seed=1).model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.copy_(dense)
    report = export.write(model, tmp_path / "out", "nm")
    assert len(report.matrices) == 13
    assert "q_proj.weight stored dense: not 2:4: output 0 keeps 4 of inputs 0 to 3" in str(report)


def test_values_are_cast_when_asked(tmp_path):
    model = pruned(dtype=torch.float32)
    report = export.write(model, tmp_path / "half", dtype="bf16")
    assert {row.dtype for row in report.rows} == {"bfloat16"}
    same_model(model.to(torch.bfloat16), export.read(tmp_path / "half").model)
    wide = export.read(tmp_path / "half", dtype="float32").model
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    with pytest.raises(GossamerError, match="int3"):
        export.write(model, tmp_path / "bad", dtype="int3")


def test_load_opens_an_export_with_its_tokenizer(tmp_path):
    model = pruned()
    export.write(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    loaded = gossamer.load(tmp_path / "out", dtype="bfloat16")
    same_model(model, loaded.model)
    assert loaded.tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    assert loaded.model.name_or_path == str(tmp_path / "out")
    assert gossamer.load(tmp_path / "out").model.dtype == torch.float32
    # Plain transformers refuses rather than filling in random weights.
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(GossamerError, match=r"open it with gossamer\.load"):
        load_model(tmp_path / "out")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(GossamerError, match="not empty"):
        export.write(pruned(), tmp_path / "full")
    shutil.rmtree(tmp_path / "full")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gossamer.export.writer.save_file", full)
    with pytest.raises(GossamerError, match="free space"):
        export.write(pruned(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_models_that_cannot_be_built_again_are_refused(tmp_path):
    with pytest.raises(GossamerError, match="Linear is not a class of transformers|no model class"):
        export.write(torch.nn.Linear(2, 2), tmp_path / "out")
    model = pruned()
    module = model.model.layers[0].mlp.up_proj
    parametrize.register_parametrization(module, "weight", torch.nn.Identity())
    with pytest.raises(GossamerError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        export.write(model, tmp_path / "out")
    model = pruned()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(GossamerError, match="quantised"):
        export.write(model, tmp_path / "out")


def damaged(tmp_path, change, format="bitmask"):
    """The error of a folder after a change."""
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    export.write(pruned(dtype=torch.float32), folder, format)
    change(folder)
    with pytest.raises(GossamerError) as caught:
        export.read(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def edit(file, change):
    def apply(folder):
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return apply


def cut(file):
    def apply(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2])

    return apply


def drop(key):
    def apply(folder):
        file = folder / "gossamer-weights.safetensors"
        save_file({k: v for k, v in load_file(file).items() if k != key}, file)

    return apply


UP = "model.layers.0.mlp.up_proj.weight"


def test_damaged_folders_are_named(tmp_path):
    weights, manifest = "gossamer-weights.safetensors", "gossamer-export.json"
    assert weights in damaged(tmp_path, lambda f: (f / weights).unlink())
    assert "cut short" in damaged(tmp_path, cut(weights))
    assert manifest in damaged(tmp_path, cut(manifest))
    assert "config.json" in damaged(tmp_path, lambda f: (f / "config.json").unlink())
    assert "config.json" in damaged(tmp_path, cut("config.json"))
    assert f"lacks {UP}.bitmask" in damaged(tmp_path, drop(f"{UP}.bitmask"))
    assert "lacks model.norm.weight" in damaged(tmp_path, drop("model.norm.weight"))
    assert "is not an export" in damaged(tmp_path, lambda f: (f / manifest).unlink())
    with pytest.raises(GossamerError, match="no folder"):
        export.read(tmp_path / "nowhere")


def test_damaged_manifests_are_named(tmp_path):
    def change(step):
        return damaged(tmp_path, edit("gossamer-export.json", step))

    assert "upgrade" in change(lambda m: m.update(format=9))
    assert "unknown format" in change(lambda m: m["tensors"][UP].update(layout="bitmaks"))
    assert UP in change(lambda m: m["tensors"][UP].update(shape=[64, 31]))
    assert "damaged" in change(lambda m: m["tensors"][UP].update(shape="x"))
    assert "damaged" in change(lambda m: m["tensors"][UP].update(shape=[]))
    assert "damaged" in change(lambda m: m["tensors"][UP].pop("dtype"))
    assert "due" in change(lambda m: m["tensors"][UP].update(dtype="bfloat16"))
    assert f"lacks tensor {UP}" in change(lambda m: m["tensors"].pop(UP))
    assert "damaged" in change(lambda m: m.pop("aliases"))
    assert "damaged" in change(lambda m: m.update(tensors=[1]))


def test_configurations_that_do_not_fit_are_named(tmp_path):
    def change(step):
        return damaged(tmp_path, edit("config.json", step))

    assert "no models of type" in change(lambda c: c.update(model_type="llamma"))
    assert "no model class 'Evil'" in change(lambda c: c.update(architectures=["Evil"]))
    assert "no model class 'pipeline'" in change(lambda c: c.update(architectures=["pipeline"]))
    assert "out" in change(lambda c: c.update(num_hidden_layers=3))
    assert "out" in change(lambda c: c.update(num_hidden_layers=1))
    assert "out" in change(lambda c: c.update(intermediate_size=48))


def test_damaged_matrices_of_csr_are_named(tmp_path):
    file = f"csr/{UP}.npz"
    assert file in damaged(tmp_path, lambda f: (f / file).unlink(), "csr")
    assert file in damaged(tmp_path, cut(file), "csr")

    def pickled(folder):
        arrays = dict(np.load(folder / file))
        np.savez(folder / file, **(arrays | {"data": arrays["data"].astype(object)}))

    assert file in damaged(tmp_path, pickled, "csr")

    def retyped(folder):
        arrays = dict(np.load(folder / file))
        np.savez(folder / file, **(arrays | {"data": arrays["data"].astype(np.float64)}))

    assert "values are float64" in damaged(tmp_path, retyped, "csr")

    def lead_out(manifest):
        manifest["tensors"]["../../x"] = manifest["tensors"].pop(UP)

    text = damaged(tmp_path, edit("gossamer-export.json", lead_out), "csr")
    assert "is no name of a tensor" in text
