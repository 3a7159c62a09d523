"""The saved folder appears whole or not at all."""

import json

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.models.store import MANIFEST, atomic_folder, read_stages, write_json
from tests.models.tiny import tiny_model


def test_a_failing_save_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as part:
        (part / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(GossamerError, match="free space"), atomic_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(GossamerError, match="not empty"), atomic_folder(tmp_path):
        raise AssertionError("never entered")
    with pytest.raises(GossamerError, match="not empty"), atomic_folder(tmp_path / "file"):
        raise AssertionError("never entered")


def test_masks_take_one_bit_a_weight(tmp_path):
    model = tiny_model("gpt2")
    applied = Magnitude(sparsity=0.5).apply(model)
    applied.save(tmp_path / "out")
    (stage,) = read_stages(tmp_path / "out")
    assert sum(t.numel() for t in stage.tensors.values()) == sum(
        -(-row.size // 8) for row in applied.report().rows
    )
    assert all(t.dtype == torch.uint8 for t in stage.tensors.values())


def test_a_plain_folder_has_no_stages(tmp_path):
    assert read_stages(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99, "stages": []}'])
def test_damaged_manifests_are_named(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(GossamerError, match=r"gossamer\.json"):
        read_stages(tmp_path)


def test_json_is_written_atomically(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as part:
        (part / "a").write_text("x")
    assert (tmp_path / "real" / "a").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_impossible_names_are_one_clear_error(tmp_path, name):
    with pytest.raises(GossamerError, match="cannot"), atomic_folder(tmp_path / name):
        raise AssertionError("never entered")
    assert list(tmp_path.iterdir()) == []
