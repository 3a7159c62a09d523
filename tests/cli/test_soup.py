"""gossamer soup as a user meets it."""

import json

import pytest
import torch

from gossamer.cli.main import main
from gossamer.methods import make
from tests.models.tiny import tiny_model, tiny_tokenizer


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def saved(folder, seed=0):
    """A copy of the tiny model at 50 %, its kept weights scaled."""
    model = tiny_model("llama")
    applied = make("random", sparsity=0.5, seed=seed).apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.0 + 0.1 * len(folder.name)
    applied.save(folder, tiny_tokenizer())
    return folder


def test_two_folders(capsys, tmp_path):
    one, two = saved(tmp_path / "a"), saved(tmp_path / "bb")
    status, out, _ = run(capsys, "soup", one, two, "--out", tmp_path / "out")
    assert status == 0
    assert "averaged 2 of 2 copies" in out
    assert (tmp_path / "out" / "gossamer.json").is_file()
    words = ["soup", one, two, "--out", tmp_path / "best", "--greedy", "--json", "--length", "32"]
    status, out, _ = run(capsys, *words)
    found = json.loads(out)
    assert status == 0
    assert found["loss"] <= min(found["losses"]) + 1e-6
    assert found["folder"] == str(tmp_path / "best")


@pytest.mark.parametrize(
    ("count", "message"), [(0, "0 folder given"), (1, "1 folder given"), (2, "denser")]
)
def test_bad_input_is_one_line(capsys, tmp_path, count, message):
    folders = [saved(tmp_path / f"copy{seed}", seed) for seed in range(count)]
    status, out, err = run(capsys, "soup", *folders, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_missing_folders_are_named(capsys, tmp_path):
    one = saved(tmp_path / "one")
    status, _, err = run(capsys, "soup", one, "/no/such/folder", "--out", tmp_path / "out")
    assert status == 2
    assert "/no/such/folder" in err
    assert len(err.strip().splitlines()) == 1
