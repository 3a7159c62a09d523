"""Rounds in a file: everything comes back with its type, and nothing is half written."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.training.tickets.checkpoint import read_rounds, write_rounds


def test_nested_values_come_back_as_they_were(tmp_path):
    values = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}}},
        "groups": [{"betas": (0.9, 0.95), "lr": 1e-3, "params": [0, 1], "foreach": None}],
        "masks": {"a.weight": torch.tensor([1, 255], dtype=torch.uint8)},
        "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
        "rewinds": True,
        "turned": torch.arange(6).view(2, 3).T,
    }
    path = tmp_path / "deep" / "rounds.safetensors"
    write_rounds(values, path)
    found = read_rounds(path)
    state = found["optimizer"]["state"][0]
    assert torch.equal(state["exp_avg"], torch.ones(2, 3))
    assert state["step"] == 3.0
    assert found["groups"] == values["groups"]
    assert isinstance(found["groups"][0]["betas"], tuple)
    assert torch.equal(found["masks"]["a.weight"], values["masks"]["a.weight"])
    assert found["bfloat16"].dtype == torch.bfloat16
    assert torch.equal(found["turned"], values["turned"])
    assert found["rewinds"] is True
    assert [p.name for p in path.parent.iterdir()] == ["rounds.safetensors"]


def test_what_is_not_plain_is_named_and_leaves_the_old_file(tmp_path):
    path, read = tmp_path / "rounds.safetensors", read_rounds
    write_rounds({"a": 1}, path)
    with pytest.raises(GossamerError, match="state/schedule/1 is a function"):
        write_rounds({"schedule": [0, read]}, path)
    assert read_rounds(path) == {"a": 1}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GossamerError, match="cannot write to"):
        write_rounds({"a": 1}, tmp_path / "file" / "rounds.safetensors")
    with pytest.raises(GossamerError, match="holds no rounds of training"):
        read_rounds(tmp_path / "missing.safetensors")
