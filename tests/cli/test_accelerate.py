"""``gossamer accelerate`` as a user meets it."""

import json

import pytest

import gossamer
from gossamer.cli.main import main
from gossamer.kernels import measured


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CHOICES", str(tmp_path / "choices"))
    measured.forget()


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = gossamer.load("nano")
    with gossamer.method("magnitude", sparsity=0.9, pattern="row").apply(model) as applied:
        applied.save(tmp_path / "sparse", tokenizer)
    return tmp_path / "sparse"


def test_the_table_and_the_speed_of_both(folder, capsys):
    words = ["accelerate", str(folder), "--rows", "1", "--tokens", "2", "--rounds", "1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["choices"]) == 4
    for row in found["choices"]:
        assert row["chosen"] in row["milliseconds"]
        assert row["milliseconds"][row["chosen"]] <= row["milliseconds"]["dense"]
    if found["layers"]:
        assert found["bytes_moved"] < found["dense_bytes"]
        assert found["generation"]["threads"] == found["environment"]["threads"]
        assert found["generation"]["dense"]["median"] > 0
    assert main([*words, "--no-timed"]) == 0
    text = capsys.readouterr().out
    assert "linear layers accelerated on" in text
    assert "rows 1 and more:" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "4,1"], "ascending whole numbers"),
        (["--rows", "few"], "ascending whole numbers"),
        (["--tokens", "0"], "tokens is 0"),
        (["--store", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_bad_words_get_one_line(words, message, capsys):
    assert main(["accelerate", "nano", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
