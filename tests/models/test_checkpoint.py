"""The state of a training in a file."""

import pytest
import torch
from safetensors.torch import save_file

from gossamer.core import GossamerError
from gossamer.models.checkpoint import read_checkpoint, write_checkpoint


def test_values_and_tensors_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor([1, 2], dtype=torch.uint8)}
    write_checkpoint(tmp_path / "x", {"step": 3, "names": ["p", "q"]}, tensors)
    plain, found = read_checkpoint(tmp_path / "x", "a training")
    assert plain == {"step": 3, "names": ["p", "q"]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_checkpoint(tmp_path / "x", {"step": 1}, {"a": torch.ones(2)})
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "x", {"step": object()}, {"a": torch.zeros(2)})
    assert read_checkpoint(tmp_path / "x", "a training")[0] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_files_of_others_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, str(tmp_path / "plain"))
    (tmp_path / "text").write_text("state")
    for name in ("plain", "text", "missing"):
        with pytest.raises(GossamerError, match=f"{name} holds no state of a training"):
            read_checkpoint(tmp_path / name, "a training")
