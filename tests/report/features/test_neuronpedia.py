import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gossamer.core import GossamerError
from gossamer.report.features import is_neuronpedia, read_neuronpedia, write_neuronpedia
from tests.report.features.made import made

FACTS = {"n_prompts_total": 7, "n_tokens_in_prompt": 24, "dataset": "text"}

# As its web interface gives a feature, shortened.
WEB: dict[str, Any] = {
    "modelId": "gpt2-small", "layer": "6-res", "index": "650", "maxActApprox": 4.0,
    "frac_nonzero": 0.0123,
    "freq_hist_data_bar_heights": [5, 3, 1], "freq_hist_data_bar_values": [0.5, 1.5, 2.5],
    "logits_hist_data_bar_heights": [2, 4], "logits_hist_data_bar_values": [-1, 1],
    "pos_str": [" a", "b"], "pos_values": [2.5, 1], "neg_str": ["c"], "neg_values": [-3],
    "topkCosSimIndices": [650, 12], "topkCosSimValues": [1, 0.25],
    "explanations": [{"description": "letters", "explanationModelName": "x", "typeName": "y"}],
    "activations": [
        {"tokens": ["x", " y"], "values": [0, 4.0], "maxValue": 4, "maxValueTokenIndex": 1,
         "binMin": None, "binMax": None, "binContains": None},
        {"tokens": ["z"], "values": [1.0], "maxValue": 1, "maxValueTokenIndex": 0,
         "binMin": 0, "binMax": 2, "binContains": 0.75},
    ],
}  # fmt: skip


def test_a_feature_of_the_web_interface(tmp_path: Path):
    path = tmp_path / "650.json"
    path.write_text(json.dumps(WEB))
    assert is_neuronpedia(path)
    (feature,) = read_neuronpedia(path)
    assert (feature.index, feature.density, feature.top) == (650, 0.0123, 4.0)
    assert feature.explanation == "letters"
    assert feature.positive == ((" a", 2.5), ("b", 1.0))
    assert feature.negative == (("c", -3.0),)
    assert feature.neighbours == ((12, 0.25),)
    assert feature.histogram.counts == (5, 3, 1)
    assert (feature.histogram.low, feature.histogram.high) == (0.0, 3.0)
    assert feature.histogram.centres == [0.5, 1.5, 2.5]
    top, interval = feature.groups
    assert (top.kind, top.examples[0].tokens, top.examples[0].at) == ("top", ("x", " y"), 1)
    assert (interval.low, interval.high, interval.share) == (0.0, 2.0, 0.75)
    assert feature.fires == (" y", "z")


def test_what_is_written_is_read_again(tmp_path: Path):
    book = made().book
    features = [f for f in book.features(range(40)) if not f.dead]
    folder = write_neuronpedia(
        features, tmp_path / "out", model="tiny", source="set", layer=1, facts=FACTS
    )
    assert is_neuronpedia(folder)
    again = read_neuronpedia(folder)
    assert [f.index for f in again] == [f.index for f in features]
    for old, new in zip(features, again, strict=True):
        assert new.positive == old.positive
        assert new.negative == old.negative
        assert new.neighbours == old.neighbours
        assert new.explanation == old.explanation
        assert new.histogram.counts == old.histogram.counts
        assert new.histogram.high == pytest.approx(old.histogram.high, rel=1e-2)
        assert new.density == pytest.approx(old.density)
        assert new.top == pytest.approx(old.top, rel=1e-3)
        assert {e for g in new.groups for e in g.examples} \
            >= {replace(e, at=max(range(len(e.values)), key=lambda i: e.values[i]))
                for g in old.groups for e in g.examples}  # fmt: skip
        spans = [(g.kind, g.share) for g in old.groups]
        assert [(g.kind, g.share) for g in new.groups] == spans


def test_batches_have_every_field_that_its_importer_reads(tmp_path: Path):
    book = made().book
    folder = write_neuronpedia(
        book.features([3, 7]), tmp_path / "out", model="tiny", source="set", layer=1, facts=FACTS
    )
    assert sorted(p.name for p in folder.iterdir()) == ["batch-0.json", "explanations"]
    batch = json.loads((folder / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 1, "set")
    assert batch["sae_id_suffix"] is None
    asked = {
        "feature_index", "neuron_alignment_indices", "neuron_alignment_values",
        "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson",
        "correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson",
        "correlated_features_l1", "neg_str", "neg_values", "pos_str", "pos_values",
        "frac_nonzero", "freq_hist_data_bar_heights", "freq_hist_data_bar_values",
        "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
        "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations",
    }  # fmt: skip
    for entry in batch["features"]:
        assert asked <= set(entry)
        # Its page reads a value for each bar.
        for kind in ("freq", "logits"):
            heights = entry[f"{kind}_hist_data_bar_heights"]
            assert len(heights) == len(entry[f"{kind}_hist_data_bar_values"]) > 0
        for one in entry["activations"]:
            assert {"bin_min", "bin_max", "bin_contains", "qualifying_token_index"} <= set(one)
            assert len(one["tokens"]) == len(one["values"])
    told = (folder / "explanations" / "batch-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["description"] for line in told] == ["Capital letters"]


def test_a_batch_holds_so_many(tmp_path: Path):
    feature = made().book.feature(3)
    many = [replace(feature, index=index) for index in range(130)]
    folder = write_neuronpedia(many, tmp_path / "out", model="m", source="s")
    sizes = [
        len(json.loads((folder / f"batch-{n}.json").read_text())["features"]) for n in range(2)
    ]
    assert sizes == [128, 2]
    assert [f.index for f in read_neuronpedia(folder)] == list(range(130))


def test_the_folder_of_an_export(tmp_path: Path):
    bare = {k: v for k, v in WEB.items() if k not in ("activations", "explanations")}
    rows = {
        "features": [bare, {**bare, "index": "3"}],
        "activations": [{**row, "index": "650"} for row in WEB["activations"]],
        "explanations": [{"index": "3", "description": "three"}],
    }
    for name, held in rows.items():
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in held)
        (tmp_path / name / "batch-0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert is_neuronpedia(tmp_path)
    third, last = read_neuronpedia(tmp_path)
    assert (third.index, third.explanation, third.groups) == (3, "three", ())
    assert (last.index, len(last.groups), last.explanation) == (650, 2, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds no feature"),
        ("nonsense", "no readable JSON"),
        (json.dumps({"pos_str": []}), "misstates 'index'"),
        (json.dumps({**WEB, "activations": [{"tokens": ["a"], "values": [1, 2]}]}), "misstates"),
        (json.dumps({**WEB, "pos_values": [1]}), "misstates"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(GossamerError, match=message) as caught:
        read_neuronpedia(path)
    assert "\n" not in str(caught.value)


def test_a_dictionary_is_not_taken_for_it(tmp_path: Path):
    made().dictionary.save(tmp_path / "sae")
    assert not is_neuronpedia(tmp_path / "sae")
    assert not is_neuronpedia(tmp_path / "nothing")
