"""The main job on the packaged model: complete rows, resuming, engines."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import gossamer
from gossamer.core import GossamerError
from gossamer.models import find_sites
from gossamer.recipes.bench import Bench, Setup
from gossamer.recipes.cells import grid
from gossamer.recipes.compare import Comparison, compare

SMALL = {"samples": 2, "length": 64, "windows": 2, "timed": False}
COLUMNS = {
    "method", "sparsity", "achieved_sparsity", "pattern", "perplexity", "kl", "agreement",
    "bytes_stored", "bytes_moved", "tokens_per_second", "simulated", "seconds", "seed",
}  # fmt: skip


def test_rows_are_complete_and_the_model_comes_back():
    model, tokenizer = gossamer.load("nano")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = compare(
        model, ["magnitude", "wanda", "teal", "streaming_llm"], sparsity=0.5,
        tokenizer=tokenizer, **SMALL,
    )  # fmt: skip
    assert [r["method"] for r in rows] == [
        "dense", "random", "magnitude", "wanda", "teal", "streaming_llm",
    ]  # fmt: skip
    assert all(set(r) >= COLUMNS for r in rows)
    dense, random, magnitude, wanda, *_ = rows
    assert dense["kl"] == pytest.approx(0, abs=1e-9)
    assert dense["agreement"] == 1.0
    assert random["perplexity"] > magnitude["perplexity"] > dense["perplexity"]
    assert random["perplexity"] > wanda["perplexity"] > dense["perplexity"]
    for row in rows[1:]:
        assert row["achieved_sparsity"] == pytest.approx(0.5, abs=0.05)
        assert row["tokens_per_second"] is None
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    json.dumps(rows, allow_nan=False)
    blocks = sum(s.size * s.weight(model).element_size() for s in find_sites(model).sites)
    assert {row["bytes_blocks"] for row in rows} == {blocks}
    teal = rows[4]
    spared = (dense["bytes_moved"] - teal["bytes_moved_limit"]) / blocks
    assert spared == pytest.approx(teal["achieved_sparsity"], abs=0.01)  # TEAL works on all


def test_only_what_is_missing_runs(tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = compare("nano", ["magnitude"], sparsity=[0.3, 0.5], out=out, **SMALL)
    cells = sorted((out / "cells").iterdir())
    assert len(cells) == 5
    cells[-1].write_text('{"half')
    ran = []
    original = Bench.run
    monkeypatch.setattr(
        Bench, "run", lambda self, cell, *a: ran.append(cell) or original(self, cell, *a)
    )
    second = compare("nano", ["magnitude"], sparsity=[0.3, 0.5], out=out, **SMALL)
    assert len(ran) == 1
    plain = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in rows] for rows in (first, second)
    ]
    assert plain[0] == plain[1]
    compare("nano", ["lamp"], sparsity=0.5, out=out, **SMALL)
    assert len(ran) == 2


def test_another_run_in_the_folder_is_refused(tmp_path):
    plan = Setup(model="nano", **SMALL)
    cells = grid(["magnitude"], [0.5])
    Comparison(plan, cells, tmp_path / "run")
    with pytest.raises(GossamerError, match="different run .*seed differ"):
        Comparison(Setup(model="nano", seed=1, **SMALL), cells, tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(GossamerError, match="holds no run"):
        Comparison(plan, cells, tmp_path / "other")


def test_killed_and_started_again_it_resumes(tmp_path):
    out = tmp_path / "run"
    code = (
        "import torch, gossamer; torch.set_num_threads(1);"
        f"gossamer.compare('nano', ['magnitude', 'lamp', 'wanda'], sparsity=[.1, .2, .3, .4, .5],"
        f"out={str(out)!r}, **{SMALL!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while len(list((out / "cells").glob("*.json"))) < 3:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = {p.name: p.read_text() for p in (out / "cells").glob("*.json")}
    assert not (out / "rows.json").exists()
    rows = compare(
        "nano", ["magnitude", "lamp", "wanda"], sparsity=[0.1, 0.2, 0.3, 0.4, 0.5], out=out, **SMALL
    )
    assert len(rows) == 21
    for name, text in done.items():
        assert (out / "cells" / name).read_text() == text


def plain(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_jobs_side_by_side_give_the_same_rows():
    one = compare("nano", ["magnitude"], sparsity=0.5, **SMALL)
    two = compare("nano", ["magnitude"], sparsity=0.5, jobs=2, threads=1, **SMALL)
    assert plain(one) == plain(two)


def test_ray_gives_the_same_rows(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    one = compare("nano", ["magnitude"], sparsity=0.5, **SMALL)
    two = compare("nano", ["magnitude"], sparsity=0.5, engine="ray", threads=1, **SMALL)
    assert plain(one) == plain(two)


def test_users_text_is_split_between_calibration_and_evaluation(tmp_path):
    file = tmp_path / "text.jsonl"
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 12 for i in range(20)]
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    bench = Bench(Setup(model="nano", data=str(file), samples=4, length=32, windows=4))
    try:
        read = bench.tokenizer.batch_decode(bench.evaluation.input_ids)
        seen = bench.tokenizer.batch_decode(bench.calibration.input_ids)
    finally:
        bench.close()
    assert "f10" in read[0]
    assert not any(f"def f{i}(" in text for text in seen for i in range(10, 20))


def test_changed_text_is_another_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    options = {**SMALL, "data": str(text)}
    compare("nano", ["magnitude"], out=tmp_path / "run", **options)
    text.write_text("class A:\n    pass\n" * 200)
    with pytest.raises(GossamerError, match="different run .*data content"):
        compare("nano", ["magnitude"], out=tmp_path / "run", **options)


def test_the_record_says_how_much_was_really_scored(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 100)
    options = {**SMALL, "data": str(text), "windows": 1000}
    rows = compare("nano", ["magnitude"], out=tmp_path / "run", **options)
    meta = json.loads((tmp_path / "run" / "rows.json").read_text())["meta"]
    assert meta["tokens"] == rows[0]["tokens"] < 1000 * 63
    assert meta["tokens"] % 63 == 0
    assert meta["context"] == 64


def test_a_user_error_in_a_worker_is_that_error(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("hi")
    for more in ({"jobs": 2}, {"engine": "ray"}):
        with pytest.raises(GossamerError, match="tokens, one window needs"):
            compare("nano", ["magnitude"], **{**SMALL, "data": str(short), "threads": 1, **more})


@pytest.mark.parametrize("text", ["[]", "null", '{"signature": []}', "{"])
def test_a_damaged_run_is_named(tmp_path, text):
    out = tmp_path / "run"
    compare("nano", ["magnitude"], out=out, **SMALL)
    (out / "run.json").write_text(text)
    with pytest.raises(GossamerError, match="damaged"):
        compare("nano", ["magnitude"], out=out, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": -1}, "windows is -1"),
        ({"samples": 0}, "samples is 0"),
        ({"seed": 2**80}, "seed is too large"),
        ({"batchsize": 4}, "did you mean batch_size"),
        ({"sparsity": "half"}, "sparsity is 'half'"),
        ({"methods": [gossamer.Wanda(sparsity=0.5)]}, "not by objects"),
        ({"jobs": 0}, "jobs is 0"),
        ({"engine": "slurm"}, "engine is 'slurm'"),
        ({"data": "/nowhere.txt"}, "nowhere"),
    ],
)
def test_bad_options_are_named(options, message):
    methods = options.pop("methods", "magnitude")
    with pytest.raises(GossamerError, match=message):
        compare("nano", methods, **{**SMALL, **options})


def test_accelerated_weights_earn_a_speed_and_real_bytes(monkeypatch, tmp_path):
    from gossamer.execute import choose
    from gossamer.kernels import measured

    def halves(key, candidates, **_):
        found = {name: 1.0 if name == "dense" else 0.5 for name in candidates}
        return measured.Choice("dense", found)

    monkeypatch.setattr(choose, "fastest", halves)
    rows = compare("nano", ["magnitude:pattern=row"], sparsity=0.9, accelerate=True, **SMALL)
    row = next(row for row in rows if row["method"] == "magnitude")
    plain = compare("nano", ["magnitude:pattern=row"], sparsity=0.9, **SMALL)
    masked = next(row for row in plain if row["method"] == "magnitude")
    assert masked["simulated"]
    assert not row["simulated"]
    assert row["bytes_moved"] < masked["bytes_moved"]
    assert row["bytes_moved"] >= row["bytes_moved_limit"]
    assert "linear layers accelerated" in row["note"]
    assert row["loss"] == masked["loss"]
