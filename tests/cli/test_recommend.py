"""``gossamer recommend`` on one's own prompts, and what it says when nothing passes."""

import json

import pytest

from gossamer.cli.main import main
from gossamer.models import read_documents

TEXT = "\n".join(read_documents(None, "heldout"))[:6000]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def call(*words):
    return main(["recommend", "nano", "--length", "64", *words])


def test_text_is_compared_by_its_loss(capsys, text):
    words = ("--prompts", text, "--samples", "6", "--methods", "streaming_llm,random_keys")
    assert call(*words, "--sparsity", "0.1,0.8", "--margin", "0.5", "--json", "--no-timed") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passing"]["streaming_llm"] == 0.1
    assert found["passing"]["random_keys"] < 0.8
    rows = {(row["method"], row["sparsity"]): row for row in found["rows"]}
    assert rows["streaming_llm", 0.8]["score"] < rows["streaming_llm", 0.1]["score"] < 0
    assert "removes 1" in found["recommendation"][0]
    assert "not a saving of time" in found["recommendation"][-1]


def test_a_saving_that_is_no_speed_up_is_said(capsys, text):
    words = ("--prompts", text, "--samples", "6", "--methods", "streaming_llm")
    assert call(*words, "--sparsity", "0.1", "--margin", "1") == 0
    out = capsys.readouterr().out
    assert "largest saving that passes every task: streaming_llm at sparsity 0.1" in out
    assert "speed-up" in out or "times as fast" in out


def test_a_step_a_method_cannot_take_is_skipped(capsys, text):
    words = ("--prompts", text, "--samples", "5", "--methods", "streaming_llm", "--no-timed")
    assert call(*words, "--sparsity", "0.99", "--margin", "9") == 2
    assert "no method could be tried: streaming_llm was not tried" in capsys.readouterr().err


def test_nothing_passes(capsys, text):
    words = ("--prompts", text, "--samples", "6", "--methods", "random_keys", "--no-timed")
    assert call(*words, "--sparsity", "0.9", "--margin", "0.01") == 0
    assert "keep full attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--margin", "0"], "above 0"),
        (["--methods", "quset"], "did you mean"),
        (["--methods", "wanda"], "does not make attention sparse"),
        (["--sparsity", "1.5"], "sparsity"),
        (["--sparsity", ","], "no step"),
        (["--prompts", "nowhere.jsonl"], "cannot be read"),
        (["--tasks", "niah"], "unknown task"),
        (["--batch-size", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    assert call(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_lengths_over_the_models_limit_are_refused_before_prompts_are_made(capsys):
    assert main(["recommend", "nano", "--length", "100000", "--methods", "quest"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "length 100000 is over the model's limit of 2048 tokens" in line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 1 is no JSON"),
        ('{"prompt": "a"}', "needs"),
        ('{"prompt": "a", "answer": " "}', "empty"),
        (json.dumps({"prompt": "word " * 200, "answer": "x"}), "larger --length"),
    ],
)
def test_bad_prompts_are_one_line(capsys, tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    assert call("--prompts", str(path), "--methods", "quest") == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert message in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.jsonl", None, "cannot be read (No such file or directory)"),
        ("own.txt", None, "cannot be read (No such file or directory)"),
        (".", None, "cannot be read (Is a directory)"),
        ("own.jsonl", b"", "is empty"),
        ("own.txt", b" \n\n", "is empty"),
        ("own.txt", b"\xff\xfe\x00", "is no UTF-8 text"),
        ("own.jsonl", b"\n\nplain words\n", "line 3 is no JSON"),
        ("own.json", b'["prompt", "answer"]', 'line 1 needs {"prompt": text, "answer": text}'),
    ],
)
def test_what_is_wrong_with_the_file_is_said_before_the_model_loads(
    capsys, tmp_path, monkeypatch, name, content, message
):
    from gossamer.cli import recommend

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(recommend, "load", load)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert call("--prompts", str(path), "--methods", "quest") == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert message in said
    assert call("--tasks", "niah", "--methods", "quest") == 2
    assert "unknown task" in capsys.readouterr().err


def test_prompts_the_model_cannot_answer(capsys, tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [json.dumps({"prompt": "def f(x):", "answer": f"zq{i}"}) for i in range(5)]
    path.write_text("\n".join(lines), encoding="utf-8")
    words = ("--prompts", str(path), "--methods", "quest", "--sparsity", "0.5", "--no-timed")
    assert call(*words) == 2
    assert "answers no task well enough" in capsys.readouterr().err
