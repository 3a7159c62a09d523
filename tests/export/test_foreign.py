"""compressed-tensors' files: read as they are described, written so that they are the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gossamer
from gossamer import export
from gossamer.core import GossamerError
from gossamer.methods.weights.magnitude import Magnitude
from tests.models.tiny import tiny_model

UP = "model.layers.0.mlp.up_proj"


def by_hand(folder, change=None, config=None, shards=1):
    """A sparse-bitmask folder made with plain loops from the description of the format."""
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.get_submodule(UP).weight[torch.rand(64, 32) < 0.7] = 0
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != f"{UP}.weight":
            tensors[name] = tensor.clone()
            continue
        rows, columns = tensor.shape
        values, offsets = [], []
        mask = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
        for r in range(rows):
            offsets.append(len(values))
            for c in range(columns):
                if tensor[r, c] != 0:
                    values.append(tensor[r, c])
                    mask[r, c // 8] += 2 ** (c % 8)
        tensors |= {
            f"{UP}.compressed": torch.stack(values),
            f"{UP}.bitmask": mask,
            f"{UP}.row_offsets": torch.tensor(offsets),
            f"{UP}.shape": torch.tensor([rows, columns]),
        }
    if change is not None:
        change(tensors)
    model.config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"architectures": ["LlamaForCausalLM"]}
    entry = {"format": "sparse-bitmask", "global_sparsity": 10.0, "targets": ["Linear"]}
    values |= config or {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": entry}
    }
    file.write_text(json.dumps(values))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return model
    names = sorted(tensors)
    parts = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(names)}
    for part in set(parts.values()):
        save_file({n: tensors[n] for n in names if parts[n] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    return model


@pytest.mark.parametrize("shards", [1, 3])
def test_a_file_made_by_hand_is_read(tmp_path, shards):
    model = by_hand(tmp_path, shards=shards)
    read = gossamer.load(tmp_path, dtype="bfloat16").model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    assert getattr(read.config, "quantization_config", None) is None


def test_older_files_are_read(tmp_path):
    """The configuration at the top with an underscore, and names with ``.weight`` in them."""

    def rename(tensors):
        for part in ("compressed", "bitmask", "row_offsets", "shape"):
            tensors[f"{UP}.weight.{part}"] = tensors.pop(f"{UP}.{part}")

    model = by_hand(tmp_path, rename, {"sparsity_config": {"format": "sparse_bitmask"}})
    assert export.is_export(tmp_path)
    read = export.read(tmp_path).model
    assert torch.equal(read.get_submodule(UP).weight, model.get_submodule(UP).weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.bitmask"), f"{UP}.bitmask is missing"),
        (lambda t: t.pop(f"{UP}.shape"), f"{UP}.shape is missing"),
        (lambda t: t.pop(f"{UP}.compressed"), "without its values"),
        (lambda t: t.pop("model.norm.weight"), "lacks tensor model.norm.weight"),
        (lambda t: t.update({f"{UP}.shape": torch.tensor([64])}), f"{UP}.shape"),
        (lambda t: t.update({f"{UP}.shape": torch.tensor([32, 64])}), UP),
        (lambda t: t.update({f"{UP}.shape": torch.tensor([10**12, 10**12])}), UP),
        (lambda t: t.update({f"{UP}.compressed": t[f"{UP}.compressed"][1:].clone()}), "values"),
        (lambda t: t[f"{UP}.row_offsets"].add_(1), "row_offsets"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, message):
    by_hand(tmp_path, change)
    with pytest.raises(GossamerError, match="model|config") as caught:
        export.read(tmp_path)
    assert message in str(caught.value)


def test_what_is_not_read_is_said(tmp_path):
    for index, (entry, message) in enumerate(
        (
            ({"sparsity_config": {"format": "marlin-24"}}, "'marlin-24' cannot be read"),
            (
                {"sparsity_config": {"format": "sparse-bitmask"}, "config_groups": {"group_0": {}}},
                "quantised as well",
            ),
        )
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        by_hand(folder, config={"quantization_config": entry})
        with pytest.raises(GossamerError, match=message):
            gossamer.load(folder)
    assert not export.is_export(tmp_path)


def test_what_is_written_has_their_names_and_types(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    Magnitude(pattern="2:4").apply(model, undo=False)
    weight = model.get_submodule(UP).weight
    for format, parts in (
        ("sparse-bitmask", {"compressed", "bitmask", "row_offsets", "shape"}),
        ("sparse-24-bitmask", {"compressed", "bitmask", "shape"}),
    ):
        folder = tmp_path / format
        report = export.write(model, folder, format)
        stored = load_file(folder / "model.safetensors")
        assert {n.removeprefix(f"{UP}.") for n in stored if n.startswith(UP)} == parts
        assert stored[f"{UP}.bitmask"].dtype == torch.uint8
        assert stored[f"{UP}.bitmask"].shape == (64, 4)
        assert stored[f"{UP}.shape"].dtype == torch.int64
        assert torch.equal(stored[f"{UP}.compressed"].reshape(-1), weight[weight != 0])
        config = json.loads((folder / "config.json").read_text())
        entry = config["quantization_config"]["sparsity_config"]
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert entry["format"] == format
        assert entry["targets"] == [r.name.removesuffix(".weight") for r in report.matrices]
        assert not (folder / "gossamer-export.json").exists()
        assert "gossamer.load" in str(report)
    assert stored[f"{UP}.compressed"].shape == (64, 16)
    assert stored[f"{UP}.shape"].shape == (2, 1)


def test_matrices_the_format_cannot_name_stay_dense(tmp_path):
    model = tiny_model("mixtral")
    Magnitude(pattern="2:4").apply(model, undo=False)
    report = export.write(model, tmp_path / "out", "sparse-bitmask")
    assert {len(row.shape) for row in report.matrices} == {2}
    assert "names no tensor like it" in str(report)
    with torch.no_grad():
        ids = torch.arange(12)[None]
        read = export.read(tmp_path / "out").model
        assert torch.equal(read(ids).logits, model(ids).logits)
