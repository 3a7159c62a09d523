"""The claims runner: records, verdicts, the ledger."""

import json
from dataclasses import replace

import pytest

from gossamer import methods
from gossamer.claims import lm, runner
from gossamer.claims.base import Claim, Verdict, mean
from gossamer.core import GossamerError
from tests.models.tiny import tiny_folder


def claim(verdict=Verdict.HOLDS, tier="smoke", **values):
    return Claim(
        name="doubles",
        sentence="Twice one is two.",
        paper="2",
        experiment="multiply",
        run=lambda seed: {"x": 2.0 * seed},
        check=lambda figures: verdict,
        ours="{x:.1f}",
        tier=tier,
        **values,
    )


@pytest.fixture
def one_claim(monkeypatch):
    def put(*claims):
        monkeypatch.setattr(runner, "claims_of", lambda key: claims)

    return put


def test_a_record_says_what_was_measured_and_with_what(one_claim, tmp_path):
    one_claim(claim(seeds=(1, 2)), claim(tier="gpu"))
    (record,) = runner.run("wanda", "smoke", tmp_path)
    assert record["figures"] == [{"x": 2.0}, {"x": 4.0}]
    assert record["ours"] == "3.0"
    assert record["verdict"] == "holds"
    assert record["command"] == "gossamer claim wanda --tier smoke"
    assert {"commit", "device", "threads", "versions", "seeds", "seconds", "date"} <= set(record)
    held = json.loads((tmp_path / "claims" / "wanda.smoke.json").read_text())
    assert held == [record]
    assert runner.ledger(tmp_path) == [record]


def test_the_worst_verdict_counts():
    records = [{"method": "wanda", "verdict": v} for v in ("holds", "weaker", "not testable here")]
    assert runner.verdict_of("wanda", records) == "weaker"
    assert (
        runner.verdict_of("wanda", [*records, {"method": "wanda", "verdict": "fails"}]) == "fails"
    )
    assert runner.verdict_of("teal", records) is None


def test_wrong_tiers_are_refused(one_claim):
    one_claim(claim())
    with pytest.raises(GossamerError, match="unknown tier 'smoky'; did you mean smoke"):
        list(runner.run("wanda", "smoky"))


def test_every_committed_record_names_an_existing_claim():
    folder = runner.results_folder()
    assert folder is not None
    for record in runner.ledger(folder):
        found = {c.name: c for c in runner.claims_of(record["method"])}
        assert record["claim"] in found
        assert record["seeds"] == list(found[record["claim"]].seeds)
        assert record["verdict"] in tuple(Verdict)


def test_every_method_has_a_committed_smoke_record():
    held = {r["method"] for r in runner.ledger() if r["tier"] == "smoke"}
    assert held == set(methods.keys())


def test_mean():
    assert mean([{"a": 1.0}, {"a": 3.0}], "a") == 2.0


def test_a_portable_claim_runs_on_another_model(one_claim, tmp_path):
    folder = tiny_folder(tmp_path / "other")
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    seen = []

    def run(seed):
        tokens = lm.calibration(seed)
        seen.append((lm.nano().model.config.hidden_size, len(tokens), lm.heldout().length))
        return {"x": lm.loss(lm.nano().model)}

    portable = replace(claim(portable=True), run=run, experiment="{model}, loss", ours="{x:.2f}")
    one_claim(claim(), portable)
    place = lm.Place(model=str(folder), data=str(text), samples=3, windows=2, length=16)
    (record,) = runner.run("wanda", "smoke", tmp_path, place=place)
    assert seen == [(32, 3, 16)] * 3
    assert record["experiment"].startswith("other (")
    assert "windows of 16 tokens" in record["experiment"]
    assert (tmp_path / "claims" / "wanda.smoke.other.json").is_file()
    assert runner.ledger(tmp_path) == [record]
    assert lm.here().model == "nano"


def test_another_model_needs_its_text():
    with pytest.raises(GossamerError, match="held-out text of x/y is not known"):
        lm.Place(model="x/y")
