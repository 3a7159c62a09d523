"""``gossamer measure`` prints what the method measures."""

import json

import pytest

from gossamer.cli.main import main
from gossamer.methods.activations.sparsing_law import SparsingLaw
from gossamer.models import Tokens, read_documents
from gossamer.models.loading import load_model
from tests.models.tiny import tiny_folder

TEXT = "A small text, said again and again until it fills the windows of a test. " * 20
SMALL = ["--windows", "2", "--length", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("measure")
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    tiny_folder(place / "model")
    return place


def test_figures_are_those_of_the_method(capsys, folder):
    text = str(folder / "text.txt")
    words = ["measure", str(folder / "model"), "--data", text, "--calibration", text, *SMALL]
    assert main([*words, "--percent", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded = load_model(folder / "model")
    documents = read_documents(text)
    tokens = Tokens.from_documents(documents, loaded.tokenizer, length=32, samples=2)
    expected = SparsingLaw(percent=5.0, tokens=64).measure(loaded.model, tokens, tokens)
    assert found["sparsity"] == pytest.approx(expected.sparsity)
    assert found["active"] == pytest.approx(1 - expected.sparsity)
    assert found["growth"] == pytest.approx(expected.growth)
    assert found["shares"] == pytest.approx(expected.shares)
    assert main([*words, "--rule", "topk"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "of the neurons can go from a token at 1 % perplexity (topk" in lines[0]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--percent", "0"], "above 0"),
        (["--windows", "0"], "at least 1"),
        (["--rule", "luck"], "rule"),
    ],
)
def test_bad_input_is_one_line(capsys, folder, words, message):
    text = str(folder / "text.txt")
    call = ["measure", str(folder / "model"), "--data", text, "--calibration", text, *words]
    assert main(call) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line.lower()
