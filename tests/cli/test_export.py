"""``gossamer export`` as a user meets it."""

import json

import torch

from gossamer import export
from gossamer.cli.main import main
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.models.store import save
from tests.models.tiny import tiny_model, tiny_tokenizer


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_sparse_folder_is_exported_and_converted(capsys, tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    Magnitude(pattern="2:4").apply(model)
    save(model, tmp_path / "sparse", tiny_tokenizer())
    status, out, err = run(
        capsys, "export", tmp_path / "sparse", "--format", "nm", "--out", tmp_path / "nm"
    )
    assert (status, err) == (0, "")
    assert "model.layers.0.self_attn.q_proj.weight" in out
    assert "14 matrices in format nm" in out
    assert f"written to {tmp_path / 'nm'}" in out
    read = export.read(tmp_path / "nm")
    assert read.tokenizer is not None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, read.model.state_dict()[name]), name
    # An export is itself a model to export; its dtype is kept.
    status, out, _ = run(capsys, "export", tmp_path / "nm", "--out", tmp_path / "mask", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["format"] == "bitmask"
    assert {row["dtype"] for row in report["tensors"]} == {"bfloat16"}
    assert [row["bits"] for row in report["tensors"] if row["layout"] == "bitmask"] == [9.0] * 14


def test_bad_input_is_one_clear_line(capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for words, message in (
        (["nano", "--format", "zip", "--out", tmp_path / "o"], "unknown format 'zip'"),
        (["nano", "--format", "nm", "--out", tmp_path / "o"], "is not 2:4"),
        (["nano", "--format", "nm", "--pattern", "row", "--out", tmp_path / "o"], "N:M"),
        (["nano", "--out", tmp_path / "full"], "not empty"),
        (["nano", "--dtype", "int3", "--out", tmp_path / "o"], "int3"),
        (["/no/such/model", "--out", tmp_path / "o"], "/no/such/model"),
        (["nano"], "out"),
    ):
        status, out, err = run(capsys, "export", *words)
        assert (status, out) == (2, "")
        assert len(err.strip().splitlines()) == 1, err
        assert message in err
        assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
