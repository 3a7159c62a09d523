"""The training script, small: it learns, gates its stages, resumes, and writes a model folder."""

import json

import pytest
import torch

from gossamer.models import recall
from gossamer.models.recall import train

SMALL = json.dumps(
    {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
)


def run(out, *more):
    words = ["--out", str(out), "--tokens", "2048", "--shape", SMALL, "--gate", "0", *more]
    with torch.random.fork_rng(devices=[]):
        train.main(words)
    return json.loads((out / "training.json").read_text("utf-8"))


def test_a_run_writes_a_model_that_loads_and_goes_on(tmp_path, capsys):
    first = run(
        tmp_path / "a", "--steps", "12", "--stages", "128:1", "--warmup", "4", "--lr", "1e-2"
    )
    assert first["curve"][-1][3] < 6.5 < 6.65  # ln(773) is 6.65
    loaded = recall.load(tmp_path / "a")
    assert loaded.model.config.head_dim == 8
    ids = loaded.tokenizer("The number of kalo is 0000042.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert loaded.model(ids).logits.shape[-1] == len(loaded.tokenizer)
    again = run(
        tmp_path / "b",
        "--steps",
        "2",
        "--stages",
        "128:0.5,160:0.5",
        "--start",
        str(tmp_path / "a"),
    )
    assert again["curve"][-1][2] == 160
    assert str(tmp_path) not in again["command"]
    capsys.readouterr()


def test_stages():
    stages = train.parse_stages("128:1,256:3")
    assert stages == ((128, 0.25), (256, 0.75))
    assert [train.stage_at(stages, p) for p in (0.0, 0.24, 0.26, 1.0)] == [0, 0, 1, 1]


def test_the_trained_shape_stacks_to_the_kernels_heads():
    shape = train.SHAPE
    layers = shape["num_hidden_layers"]
    assert layers * shape["num_attention_heads"] == 32
    assert layers * shape["num_key_value_heads"] == 8
    assert shape["head_dim"] == 128


def test_it_must_be_told_when_to_stop(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path)])
    assert "--steps or --time-limit" in capsys.readouterr().err
