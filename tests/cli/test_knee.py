"""gossamer knee as a user meets it."""

import json

import pytest

from gossamer.cli.main import main
from tests.models.tiny import tiny_folder

QUICK = ["--windows", "4", "--length", "32", "--samples", "4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table_and_both_answers(capsys, tiny):
    status, out, _ = run(capsys, "knee", tiny, "--sweep", "0.2:0.6:0.1", *QUICK)
    assert status == 0
    for word in ("sparsity", "random", "<- elbow", "60.0%"):
        assert word in out
    assert "magnitude: essential sparsity" in out
    assert "at tolerance 1.0%" in out
    assert "95% interval" in out
    assert "random: " in out


def test_json(capsys):
    words = ["knee", "nano", "--pattern", "layer", "--sweep", "0.1,0.2,0.3,0.4", *QUICK]
    words += ["--tolerance", "0.1", "--json"]
    status, out, _ = run(capsys, *words)
    found = json.loads(out)
    assert status == 0
    assert set(found["curves"]) == {"magnitude", "random"}
    ours, control = found["curves"]["magnitude"], found["curves"]["random"]
    assert [round(p["sparsity"], 3) for p in ours["points"]] == [0, 0.1, 0.2, 0.3, 0.4]
    assert ours["essential"]["tolerance"] == 0.1
    assert ours["essential"]["sparsity"] > control["essential"]["sparsity"]
    assert ours["elbow"]["low"] <= ours["elbow"]["sparsity"] <= ours["elbow"]["high"]
    assert ours["tokens"] == 4 * 31
    assert found["environment"]["commit"] is not None


def test_groups_and_a_text_of_ones_own(capsys, tiny, tmp_path):
    text = tmp_path / "text"
    text.write_text("for index in range(10):\n    print(index)\n" * 60)
    words = ["knee", tiny, "--base", "wanda", "--pattern", "2:4", "--no-random", "--data", text]
    status, out, _ = run(capsys, *words, *QUICK)
    assert status == 0
    assert all(word in out for word in ("3:4", "2:4", "1:4", "no elbow"))
    assert "random" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "0.5:0.1:0.1"], "sweep is '0.5:0.1:0.1'"),
        (["--base", "wandda"], "did you mean wanda"),
        (["--base", "teal"], "does not prune weights in one pass"),
        (["--pattern", "2;4"], "unknown pattern"),
        (["--pattern", "2:5"], "divisible by 5"),
        (["--tolerance", "-1"], "tolerance is -1"),
        (["--windows", "0"], "windows is 0"),
        (["--length", "1"], "length is 1"),
        (["--data", "/no/such/text"], "/no/such/text"),
        (["--allocation", "eark"], "allocation"),
    ],
)
def test_bad_input_is_one_line(capsys, tiny, words, message):
    status, out, err = run(capsys, "knee", tiny, *words)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_help(capsys):
    status, out, _ = run(capsys, "knee", "--help")
    assert status == 0
    assert "--tolerance" in out
    assert ":param" not in out
