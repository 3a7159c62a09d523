"""Models load from whole folders; anything less is one clear line and never an unpickling."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as verbosity

from gossamer.core import GossamerError
from gossamer.models import find_tokenizer, load_model, resolve
from tests.models.tiny import ARCHITECTURES, DECODERS, tiny_folder, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


def refused(folder: object, words: str, **options: object) -> None:
    with pytest.raises(GossamerError, match=words) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_come_back_as_saved(tmp_path: Path, name: str) -> None:
    loaded = load_model(tiny_folder(tmp_path / "m", name))
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, tiny_model(name)(ids).logits)
    assert not loaded.model.training
    assert loaded.tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_kind_takes_every_architecture(tmp_path: Path, name: str) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, kind="any")
    assert type(model) is type(tiny_model(name))
    assert tokenizer is None


def test_dtype_and_device(folder: Path) -> None:
    assert load_model(folder).model.dtype == torch.float32
    for dtype in ("bfloat16", "bf16", torch.bfloat16):
        assert load_model(str(folder), dtype=dtype).model.dtype == torch.bfloat16
    refused(folder, "unknown dtype 'bfloat32'; did you mean", dtype="bfloat32")
    refused(folder, "unknown dtype 'int8'", dtype=torch.int8)
    refused(folder, "device .* cannot be used", device="nonsense")
    refused(folder, "device cuda:99 cannot be used", device="cuda:99")


def test_nothing_is_printed_and_settings_are_put_back(folder: Path, capfd) -> None:
    level, bars = verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()
    load_model(folder)
    refused(folder / "none", "no folder")
    shutil.rmtree(folder / "nothing", ignore_errors=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["surplus.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert (verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()) == (level, bars)


def test_nano_is_the_packaged_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.models.nano.path", lambda: folder)
    assert resolve("nano") == folder
    assert load_model("nano").model.name_or_path == str(folder)


def test_sharded_weights(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(tmp_path)
    shards[1].unlink()
    refused(tmp_path, f"lacks {shards[1].name} of {len(shards)} weight files")
    shards[0].unlink()
    refused(tmp_path, "lacks .* and 1 more of")


def test_places_that_are_no_folder(tmp_path: Path) -> None:
    refused("", "no name")
    refused("a b", "no folder a b")
    refused("./none", "no folder ./none")
    refused(tmp_path / "none", "no folder")
    refused("~none/model", "no folder")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")


def test_half_written_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "adapter only")
    (folder / "model.safetensors").rename(folder / "gossamer.safetensors")
    refused(folder, "no weights")
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "lla', "cannot be read"),
        ("\xff", "cannot be read"),
        ("[]", "no JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": "wobble", "auto_map": {}}', "does not know models of type 'wobble'"),
    ],
)
def test_damaged_config(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, words)


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, r"model\.safetensors is damaged or cut short")
    save_file({}, path)
    refused(folder, "holds no weights")
    path.unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused(folder, "names no weights")


def test_weights_that_do_not_belong_to_the_config(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    short = {k: v for k, v in tensors.items() if "layers.1.mlp" not in k}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"lacks the weights model\.layers\.1\.mlp\.down_proj\.weight and 2 more")
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "cannot be loaded")


def test_models_that_are_not_causal(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "BertModel, which is not a causal language model")
    tiny_model("llama").model.save_pretrained(tmp_path / "body")
    refused(tmp_path / "body", "LlamaModel, which is not a causal")
    refused(tmp_path / "body", "unknown kind", kind="casual")


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    refused(tmp_path, r"no tokenizer \(no tokenizer\.json\)")
    (tmp_path / "tokenizer.json").write_text("{")
    refused(tmp_path, "tokenizer in .* cannot be read")


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_read_without_running_code(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    state = tiny_model("llama").state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin.*--allow-pickle")
    ids = torch.arange(3, 9)[None]
    loaded = load_model(folder, allow_pickle=True).model
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny_model("llama")(ids).logits)
    trapped = tmp_path / "ran"
    torch.save({**state, "trap": Trap(trapped)}, folder / "pytorch_model.bin")
    refused(folder, "cannot be loaded", allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "cannot be loaded", allow_pickle=True)
    assert not trapped.exists()


def test_safetensors_win_over_a_pickle(folder: Path, tmp_path: Path) -> None:
    torch.save({"trap": Trap(tmp_path / "ran")}, folder / "pytorch_model.bin")
    load_model(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_hub_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked[:] = [name, allow_patterns]
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    load_model("someone/model-1.5b")
    assert asked[0] == "someone/model-1.5b"
    assert not [p for p in asked[1] if "bin" in p]
    load_model("gpt2", allow_pickle=True)
    assert [p for p in asked[1] if "bin" in p]

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise OSError("cannot reach the hub\nlong explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused("someone/none", r"neither a folder nor .* \(cannot reach the hub\)")


def test_unknown_hub_id_offline() -> None:
    refused("no-one/has-this", "neither a folder nor a model")


def test_find_tokenizer(folder: Path) -> None:
    model = load_model(folder).model
    assert find_tokenizer(model)("ab") == tiny_tokenizer()("ab")
    with pytest.raises(GossamerError, match="tokenizer is unknown"):
        find_tokenizer(tiny_model("llama"))
    model.name_or_path = "no-one/has-this"
    with pytest.raises(GossamerError, match="no tokenizer for no-one/has-this"):
        find_tokenizer(model)


def test_our_saved_folder_is_a_plain_model(folder: Path) -> None:
    (folder / "gossamer.json").write_text(json.dumps({"format": 1, "stages": []}))
    save_file({"0.mask": torch.zeros(3)}, folder / "gossamer.safetensors")
    load_model(folder)


def test_quantised_config_is_loadable_only_unquantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "quantised")
