"""``gossamer features``: from files on disk to a page, a server or Neuronpedia's JSON."""

import json
import os
import re
import signal
import threading
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch

from gossamer.cli import features
from gossamer.cli.main import main
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import TopK
from tests.models.tiny import tiny_folder

TEXT = "A small text, said again and again until it fills the windows of a test. " * 20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("features")
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    tiny_folder(place / "model")
    for name, width in (("sae", 32), ("wide", 48)):
        made = Dictionary.random(width, 50, TopK(3), seed=1)
        made.metadata |= {"hook_name": "model.layers.0", "model_name": str(place / "model")}
        made.save(place / name)
    bare = Dictionary.random(32, 50, TopK(3), seed=1)
    bare.save(place / "bare")
    torch.save({"sae": bare}, place / "ae.pt")
    (place / "told.json").write_text('{"3": "letters"}')
    return place


def words(place: Path, *more: str) -> list[str]:
    return ["--data", str(place / "text.txt"), "--samples", "3", "--length", "32", *more]


def test_a_page_of_a_dictionary(capsys, place, tmp_path):
    out = tmp_path / "page.html"
    told = ["--explanations", str(place / "told.json"), "--out", str(out)]
    assert main(["features", "show", str(place / "sae"), *words(place, *told)]) == 0
    assert re.search(r"page: .*page\.html \(50 features, 0\.\d MB\)", capsys.readouterr().out)
    page = out.read_text(encoding="utf-8")
    assert "<title>sae · features</title>" in page
    assert "letters" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["features"]) == 50
    # Three codes of each of the 96 tokens.
    assert sum(sum(f["bars"]["counts"]) for f in data["features"]) == 3 * 96


def test_some_features_of_a_hook_that_the_user_names(capsys, place, tmp_path):
    out = tmp_path / "page.html"
    more = ["--model", str(place / "model"), "--hook", "model.layers.1", "--only", "4,9-11"]
    call = ["features", "show", str(place / "bare"), *words(place, *more, "--out", str(out))]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"page": str(out), "features": 4, "bytes": out.stat().st_size}
    assert "4 of 50 features" in out.read_text(encoding="utf-8")


def test_to_neuronpedia_and_back(capsys, place, tmp_path):
    out, page = tmp_path / "np", tmp_path / "page.html"
    call = ["features", "export", str(place / "sae"), *words(place, "--out", str(out))]
    assert main([*call, "--only", "3,4", "--source", "res", "--layer", "1"]) == 0
    assert "2 features written" in capsys.readouterr().out
    batch = json.loads((out / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("model", 1, "res")
    assert batch["features"][0]["n_prompts_total"] == 3
    assert main(["features", "show", str(out), "--out", str(page)]) == 0
    assert "(2 features" in capsys.readouterr().out
    assert "Neuronpedia" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("sae", "more", "message"),
    [
        ("wide", [], "reads 48 channels; model.layers.0 has 32"),
        ("sae", ["--hook", "model.layer.0"], "did you mean .*model.layers.0"),
        ("ae.pt", [], "pickle"),
        ("bare", [], "name it with --model"),
        ("nothing", [], "does not exist"),
        ("sae", ["--only", "50"], "feature 50 does not exist"),
        ("sae", ["--only", "x"], "features are 'x'"),
        ("sae", ["--most", "0"], "at least 1"),
        ("sae", ["--explanations", "none.json"], "no readable JSON"),
        ("told.json", ["--serve"], "leave --serve out"),
        ("told.json", [], "holds no feature"),
        ("sae", ["--serve", "--port", "99999"], "port 99999"),
    ],
)
def test_bad_input_is_one_line(capsys, place, tmp_path, sae, more, message):
    out = ["--out", str(tmp_path / "page.html")]
    assert main(["features", "show", str(place / sae), *words(place, *out, *more)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "page.html").exists()


def test_serving_ends_quietly(capsys, place, monkeypatch):
    ports, answers = [], []

    def server(*arguments):
        made = features.seen.serve.server(*arguments)
        ports.append(made.server_port)
        threading.Thread(target=ask_and_interrupt).start()
        return made

    def ask_and_interrupt():
        connection = HTTPConnection("127.0.0.1", ports[0], timeout=30)
        connection.request("GET", "/rows?dead=1")
        answers.append(json.loads(connection.getresponse().read()))
        connection.close()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(features.seen, "server", server)
    # What runs in a shell's background ignores the signal from birth.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["features", "show", str(place / "sae"), *words(place, "--serve")]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert answers[0]["total"] == 50
    out = capsys.readouterr()
    assert out.out == f"features: http://127.0.0.1:{ports[0]}/ (Ctrl-C ends it)\n"
    assert out.err == ""
