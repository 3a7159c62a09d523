"""The command line as a user meets it: help, JSON, and one clear line for bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from gossamer.cli.main import main
from gossamer.core import systems
from gossamer.models import find_sites

SMALL = ["--samples", "2", "--length", "64"]


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, *words):
    """The one line that a bad call prints."""
    status, out, err = run(capsys, *words)
    assert status == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    "verb",
    [
        [],
        ["methods"],
        ["sparsify"],
        ["compare"],
        ["evaluate"],
        ["claim"],
        ["recipe", "run"],
        ["report"],
    ],
)
def test_help_reads_well(capsys, verb):
    status, out, _ = run(capsys, *verb, "--help")
    assert status == 0
    assert "Usage" in out
    assert ":param" not in out


def test_methods_as_json_carry_every_column(capsys):
    status, out, _ = run(capsys, "methods", "--json")
    rows = {row["key"]: row for row in json.loads(out)}
    assert status == 0
    assert set(rows) >= {
        "random",
        "magnitude",
        "lamp",
        "wanda",
        "teal",
        "streaming_llm",
        "topk_sae",
    }
    titles = {s.title: s.id for s in systems().values()}
    for row in rows.values():
        assert {
            "family",
            "name",
            "title",
            "system",
            "year",
            "arxiv",
            "when",
            "needs",
            "verdict",
        } <= set(row)
        assert row["system"] == titles.get(row["title"])
    assert rows["wanda"]["needs"] == ["input_l2"]
    assert rows["wanda"]["arxiv"] == "2306.11695"


def test_methods_filter_by_the_words_of_their_cards(capsys):
    words = ("--when", "during", "--start", "sparse", "--masks", "dynamic", "--pattern", "n:m")
    _, out, _ = run(capsys, "methods", *words, "--json")
    found = {row["key"]: row["card"] for row in json.loads(out)}
    assert {"set", "rigl"} <= found.keys()
    assert not {"gmp", "snip", "random_pruning", "wanda"} & found.keys()
    for card in found.values():
        assert card["when"] == "during training"
        assert card["start"] == "sparse to sparse"
        assert "N:M" in card["pattern"]
    of_all = json.loads(run(capsys, "methods", "--pattern", "N:M", "--json")[1])
    assert of_all
    assert json.loads(run(capsys, "methods", "--pattern", "2:4", "--json")[1]) == of_all
    # "dense" is a word of its own and the beginning of another.
    _, out, _ = run(capsys, "methods", "--start", "dense", "--json")
    assert {row["start"] for row in json.loads(out)} == {"dense"}
    assert "before training, during training" in fails(capsys, "methods", "--when", "never")
    assert "leave one out" in fails(capsys, "methods", "--pattern", "moebius")


def test_methods_filter_by_family(capsys):
    _, out, _ = run(capsys, "methods", "--family", "attention", "--json")
    assert {row["family"] for row in json.loads(out)} == {"attention"}
    assert "did you mean weights" in fails(capsys, "methods", "--family", "weigths")


def test_sparsify_saves_what_plain_transformers_reads(capsys, tmp_path):
    out = tmp_path / "sparse"
    status, text, _ = run(
        capsys, "sparsify", "nano", "wanda", "--pattern", "2:4", "--out", out, "--json", *SMALL
    )
    assert status == 0
    report = json.loads(text)
    assert report["sparsity"] == pytest.approx(0.5)
    assert report["saved"] == str(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    for site in find_sites(model).sites:
        assert ((site.weight(model).reshape(-1, 4) != 0).sum(1) <= 2).all()
    status, text, _ = run(
        capsys, "evaluate", out, "--windows", "2", "--length", "64", "--no-timed", "--json"
    )
    assert status == 0
    assert json.loads(text)["footprint"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_evaluate_counts_what_gates_remove_and_times_nothing_simulated(capsys, tmp_path):
    out = tmp_path / "gated"
    run(capsys, "sparsify", "nano", "teal", "--sparsity", "0.4", "--out", out, *SMALL)
    small = ("--windows", "2", "--length", "64")
    _, text, _ = run(capsys, "evaluate", out, *small, "--json")
    found = json.loads(text)
    assert [m["method"] for m in found["methods"]] == ["teal"]
    assert found["footprint"]["sparsity"] == pytest.approx(0.4, abs=0.1)
    assert found["footprint"]["bytes_moved_limit"] < found["footprint"]["bytes_moved"]
    assert found["speed"] is None
    _, text, _ = run(capsys, "evaluate", out, *small)
    assert "no speed" in text
    assert "tokens/s" not in text


def test_sparsify_runs_methods_that_keep_what_undoing_needs(capsys):
    status, out, _ = run(capsys, "sparsify", "nano", "sparse_ift", "--steps", "0", "--json", *SMALL)
    assert status == 0
    assert json.loads(out)["method"]["method"] == "sparse_ift"


def test_sparsify_takes_the_methods_own_fields(capsys):
    _, text, _ = run(
        capsys,
        "sparsify",
        "nano",
        "magnitude",
        "--sparsity",
        "0.6",
        "--allocation",
        "erk",
        "--json",
        *SMALL,
    )
    report = json.loads(text)
    assert report["method"]["allocation"] == "erk"
    assert len({round(row["sparsity"], 3) for row in report["rows"]}) > 1


def test_compare_prints_a_table_and_makes_the_page(capsys, tmp_path):
    words = [
        "compare", "nano", "--methods", "magnitude", "--out", tmp_path / "run", "--no-timed",
        "--windows", "2", *SMALL,
    ]  # fmt: skip
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert all(word in out for word in ("dense", "random", "magnitude", "sim.", "report:"))
    page = (tmp_path / "run" / "index.html").read_text()
    assert "magnitude" in page
    status, out, _ = run(capsys, *words, "--json")
    assert [row["method"] for row in json.loads(out)] == ["dense", "random", "magnitude"]
    status, out, _ = run(capsys, "report", tmp_path / "run", "--json")
    assert json.loads(out) == {"page": str(tmp_path / "run" / "index.html")}


def test_claim_prints_paper_and_ours(capsys, tmp_path):
    status, out, _ = run(capsys, "claim", "lamp", "--out", tmp_path)
    assert status in (0, 1)
    assert "paper" in out
    assert "ours" in out
    (record,) = json.loads((tmp_path / "claims" / "lamp.smoke.json").read_text())
    assert record["seeds"] == [0, 1, 2]
    assert record["commit"]
    assert len(record["figures"]) == 3


def test_recipe_runs_and_saves(capsys, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: nano\nsamples: 2\nlength: 64\nout: made\nstages:\n"
        "- method: wanda\n  sparsity: 0.5\n- method: teal\n  sparsity: 0.25\n"
    )
    status, out, _ = run(capsys, "recipe", "run", file)
    assert status == 0
    assert "wanda" in out
    assert "teal" in out
    assert (tmp_path / "made" / "gossamer.json").is_file()
    assert "not empty" in fails(capsys, "recipe", "run", file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sparsfy", "nano", "wanda"], "did you mean sparsify"),
        (["sparsify", "nano", "wandda"], "did you mean wanda"),
        (["sparsify", "nano", "wanda", "--sparsity", "1.5"], "sparsity is 1.5"),
        (["sparsify", "nano", "sparse_dynamics", *SMALL], "give Trajectories"),
        (["sparsify", "nano", "wanda", "--sparsity", "-0.1"], "-0.1"),
        (["sparsify", "nano", "wanda", "--sparsity", "nan"], "sparsity is nan"),
        (["sparsify", "nano", "wanda", "--sparsity", "half"], "half"),
        (["sparsify", "nano", "wanda", "--pattern", "2;4"], "unknown pattern"),
        (["sparsify", "nano", "wanda", "--pattern", "2:5"], "divisible by 5"),
        (["sparsify", "nano", "wanda", "--sparsety", "0.5"], "did you mean sparsity"),
        (["sparsify", "nano", "teal", "--pattern", "row"], "pattern"),
        (["sparsify", "/no/such/model", "wanda"], "/no/such/model"),
        (["sparsify", "nano", "wanda", "--data", "/no/such/text"], "/no/such/text"),
        (["sparsify", "nano", "wanda", "--dtype", "int3"], "int3"),
        (["sparsify", "nano"], "method"),
        (["compare", "nano", "--methods", "wanda", "--sparsity", "0.5,x"], "'x'"),
        (["compare", "nano", "--methods", ","], "no method"),
        (["compare", "nano", "--methods", "wanda", "--engine", "slurm"], "slurm"),
        (["compare", "nano", "--methods", "wanda", "--jobs", "0"], "jobs is 0"),
        (["claim"], "name one method, or give --all"),
        (["claim", "wandda"], "did you mean wanda"),
        (["recipe", "run", "/no/such/recipe.yaml"], "cannot read"),
        (["report", "/no/such/run"], "/no/such/run"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, words, message):
    assert message in fails(capsys, *words)


def test_bad_models_and_texts_are_named(capsys, tmp_path):
    def refused(path):
        return fails(capsys, "sparsify", path, "magnitude", "--out", tmp_path / "out")

    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text('{"model_type": "llama"}')
    assert "half" in refused(half)
    (half / "pytorch_model.bin").write_bytes(b"x")
    assert "allow" in refused(half)
    text = tmp_path / "text"
    for content, message in (
        (b"", str(text)),
        (b"\x00\xff\x00\xfe" * 50, str(text)),
        (b"too short", "one window needs 1024"),
    ):
        text.write_bytes(content)
        assert message in fails(capsys, "sparsify", "nano", "wanda", "--data", text)
    assert not (tmp_path / "out").exists()


def test_unwritable_and_full_folders(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert "cannot write" in fails(capsys, "sparsify", "nano", "magnitude", "--out", file / "in")
    assert "not empty" in fails(capsys, "sparsify", "nano", "magnitude", "--out", tmp_path)
    assert "cannot write" in fails(
        capsys, "compare", "nano", "--methods", "wanda", "--out", file / "in"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_closed_pipe_is_quiet():
    code = f"{sys.executable} -m gossamer.cli.entry methods --json | head -c 10"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    words = ["sparsify", "nano", "wanda", "--out", str(tmp_path / "out")]
    child = subprocess.Popen(
        [sys.executable, "-m", "gossamer.cli.entry", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # What runs in a shell's background would ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(9)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    if child.returncode != 0:
        assert child.returncode == 130
        assert "interrupted" in err
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == []


def test_two_methods_of_attention_make_one(capsys, tmp_path):
    out = tmp_path / "both"
    text = "oracle_top_k:sparsity=0.8+quest:budget_tokens=16"
    status, shown, _ = run(
        capsys, "sparsify", "nano", text, *SMALL, "--page-size", "4", "--out", out
    )
    assert status == 0
    assert "prefill oracle_top_k" in shown
    assert "decode quest" in shown
    assert "page_size 4" in shown
    assert "unknown parameter" in fails(capsys, "sparsify", "nano", text, "--pages", "4")
