"""Neuronpedia: features from its JSON, and as the batches that its importer takes.

Three forms are read: a feature of its web interface (or a list of them), SAEDashboard's
``batch-N.json``, and the folder of its exports with ``features``, ``activations`` and
``explanations``. Written are SAEDashboard's batches, with explanations beside them.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.core import GossamerError
from gossamer.models.store import atomic_folder, write_json
from gossamer.report.features.explanations import read_explanations, read_values
from gossamer.report.features.records import Example, Feature, Group, Histogram, rounded

__all__ = ["is_neuronpedia", "read_neuronpedia", "write_neuronpedia"]

_BATCH = 128
"""Features of a written file."""
_TOP = -1.0
"""Neuronpedia's lower edge of the group of largest codes; their share is -1 too."""


def is_neuronpedia(source: str | Path) -> bool:
    """Whether a path looks like Neuronpedia's JSON and not like a dictionary."""
    path = Path(source).expanduser()
    if path.is_dir():
        return (path / "features").is_dir() or any(path.glob("batch-*.json"))
    return path.is_file() and {".json", ".jsonl"} & set(path.suffixes) != set()


def read_neuronpedia(source: str | Path) -> list[Feature]:
    """Features as Neuronpedia stores them, in the order of their indices.

    Parameters
    ----------
    source : a file (JSON or JSONL, also gzipped), or a folder of batches or of an export.

    Raises
    ------
    GossamerError
        If there is no such feature, or one lacks what a feature has.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else _files(path, "features") or _files(path, "")
    examples, words = _beside(path)
    found: dict[int, Feature] = {}
    for file in files:
        for entry in _entries(read_values(file)):
            try:
                feature = _feature(entry, examples, words)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise GossamerError(
                    f"{file} holds a feature that lacks or misstates {error}; export it again"
                ) from None
            found[feature.index] = feature
    if not found:
        raise GossamerError(
            f"{path} holds no feature of Neuronpedia; give a feature's JSON, a batch-N.json, or a "
            "folder with features/batch-N.jsonl.gz"
        )
    return [found[index] for index in sorted(found)]


def _files(folder: Path, inside: str) -> list[Path]:
    names = folder / inside
    return sorted(p for p in names.glob("batch-*") if {".json", ".jsonl"} & set(p.suffixes))


def _beside(path: Path) -> tuple[dict[int, list[Any]], dict[int, str]]:
    """What an export keeps apart from the features: examples and explanations by index."""
    examples: dict[int, list[Any]] = defaultdict(list)
    words: dict[int, str] = {}
    if path.is_dir():
        for file in _files(path, "activations"):
            for row in read_values(file):
                if isinstance(row, Mapping) and "index" in row:
                    examples[int(row["index"])].append(row)
        for file in _files(path, "explanations"):
            words = {**read_explanations(file), **words}
    return examples, words


def _entries(values: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    for value in values:
        if isinstance(value, list):
            yield from _entries(value)
        elif isinstance(value, Mapping):
            inside = value.get("features")
            if isinstance(inside, list):
                yield from _entries(inside)
            elif "pos_str" in value or "activations" in value:
                yield value


def _feature(
    entry: Mapping[str, Any], examples: Mapping[int, list[Any]], words: Mapping[int, str]
) -> Feature:
    index = int(entry["feature_index"] if "feature_index" in entry else entry["index"])
    given = [row for row in entry.get("activations") or examples.get(index, ()) if row["tokens"]]
    values = [float(value) for row in given for value in row["values"] if value]
    top = float(entry.get("maxActApprox") or max([0.0, *values]))
    told = [str(one.get("description") or "") for one in entry.get("explanations") or ()]
    share = entry.get("frac_nonzero")
    return Feature(
        index=index,
        density=None if share is None else float(share),
        top=top,
        bottom=min([0.0, *values]),
        mean=None,
        fires=_fires(given),
        histogram=_bars(entry, "freq"),
        positive=_pairs(entry, "pos"),
        negative=_pairs(entry, "neg"),
        logits=_bars(entry, "logits"),
        neighbours=_neighbours(index, entry),
        groups=tuple(_groups(given, top)),
        explanation=next(filter(None, told), words.get(index, "")),
    )


def _pairs(entry: Mapping[str, Any], side: str) -> tuple[tuple[str, float], ...]:
    names, values = entry.get(f"{side}_str") or (), entry.get(f"{side}_values") or ()
    return tuple((str(n), float(v)) for n, v in zip(names, values, strict=True))


def _bars(entry: Mapping[str, Any], kind: str) -> Histogram:
    """From the middles of bars and their heights."""
    counts = [int(n) for n in entry.get(f"{kind}_hist_data_bar_heights") or ()]
    middles = [float(v) for v in entry.get(f"{kind}_hist_data_bar_values") or ()][: len(counts)]
    if not middles:
        return Histogram(0.0, 0.0, ())
    half = (middles[-1] - middles[0]) / max(1, len(middles) - 1) / 2
    return Histogram(middles[0] - half, middles[-1] + half, tuple(counts[: len(middles)]))


def _neighbours(index: int, entry: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    pairs = zip(
        entry.get("topkCosSimIndices") or (), entry.get("topkCosSimValues") or (), strict=True
    )
    return tuple((int(i), float(v)) for i, v in pairs if int(i) != index)


def _fires(rows: Sequence[Mapping[str, Any]], most: int = 4) -> tuple[str, ...]:
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        for token, value in zip(row["tokens"], row["values"], strict=True):
            sums[str(token)] += abs(float(value))
    best = sorted((t for t in sums if sums[t] > 0), key=lambda t: -sums[t])
    return tuple(best[:most])


def _groups(rows: Sequence[Mapping[str, Any]], top: float) -> Iterator[Group]:
    """Rows by their interval; those without one are the largest."""
    spans: dict[tuple[float, float, float], list[Example]] = defaultdict(list)
    for row in rows:
        low, high, share = (
            row.get(short, row.get(long))
            for short, long in (
                ("bin_min", "binMin"),
                ("bin_max", "binMax"),
                ("bin_contains", "binContains"),
            )
        )
        key = (_TOP, top, _TOP) if low is None or low == _TOP else (low, high or top, share or 0.0)
        spans[key].append(_example(row))
    for low, high, share in sorted(spans, key=lambda k: (k[0] != _TOP, -k[0])):
        examples = spans[low, high, share]
        examples.sort(key=lambda one: -max(one.values))
        if low == _TOP:
            yield Group("top", 0.0, float(high), 1.0, tuple(examples))
        else:
            yield Group("interval", float(low), float(high), float(share), tuple(examples))


def _example(row: Mapping[str, Any]) -> Example:
    tokens = tuple(str(token) for token in row["tokens"])
    values = tuple(float(value or 0) for value in row["values"])
    if len(tokens) != len(values):
        raise ValueError(f"values: {len(values)} for {len(tokens)} tokens")
    sizes = [abs(value) for value in values]
    return Example(tokens, values, sizes.index(max(sizes)))


# -- writing -----------------------------------------------------------------------------------


def write_neuronpedia(
    features: Iterable[Feature],
    folder: str | Path,
    *,
    model: str,
    source: str,
    layer: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write features for Neuronpedia: ``batch-N.json``, and ``explanations`` where there are any.

    Parameters
    ----------
    folder : new or empty; it appears whole or not at all.
    model, source, layer : Neuronpedia's names for the model and the set of dictionaries, and the
        block that is read.
    facts : for every feature: ``n_prompts_total``, ``n_tokens_in_prompt``, ``dataset``.

    Raises
    ------
    GossamerError
        If the folder holds something or cannot be written.
    """
    told: list[dict[str, Any]] = []
    head = {"model_id": model, "layer": layer, "sae_set": source, "sae_id_suffix": None}
    with atomic_folder(folder) as part:
        batch: list[dict[str, Any]] = []
        number = 0

        def close() -> None:
            nonlocal number
            write_json(part / f"batch-{number}.json", {**head, "features": batch})
            number += 1
            batch.clear()

        for feature in features:
            batch.append(_entry(feature, facts or {}))
            if feature.explanation:
                words = {"index": str(feature.index), "description": feature.explanation}
                told.append({"modelId": model, "layer": f"{layer}-{source}", **words})
            if len(batch) == _BATCH:
                close()
        if batch or not number:
            close()
        if told:
            (part / "explanations").mkdir()
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in told)
            file = part / "explanations" / "batch-0.jsonl"
            file.write_text("".join(lines), encoding="utf-8")
    return Path(folder)


_ABSENT = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
    "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
    "decoder_weights_dist", "vector",
)  # fmt: skip
"""What its importer asks for and is not measured here."""


def _entry(feature: Feature, facts: Mapping[str, Any]) -> dict[str, Any]:
    bars: dict[str, Any] = {}
    for kind, made in (("freq", feature.histogram), ("logits", feature.logits)):
        # Middles, not edges: its page reads as many values as heights.
        bars[f"{kind}_hist_data_bar_values"] = [rounded(value) for value in made.centres]
        bars[f"{kind}_hist_data_bar_heights"] = list(made.counts)
    return {
        "feature_index": feature.index,
        **{name: [] for name in _ABSENT},
        "topkCosSimIndices": [index for index, _ in feature.neighbours],
        "topkCosSimValues": [value for _, value in feature.neighbours],
        "neg_str": [token for token, _ in feature.negative],
        "neg_values": [value for _, value in feature.negative],
        "pos_str": [token for token, _ in feature.positive],
        "pos_values": [value for _, value in feature.positive],
        "frac_nonzero": feature.density or 0.0,
        **bars,
        "n_prompts_total": 0,
        "n_tokens_in_prompt": 0,
        "dataset": "",
        **facts,
        "activations": [
            {
                "bin_min": _TOP if group.kind == "top" else group.low,
                "bin_max": group.high,
                "bin_contains": _TOP if group.kind == "top" else group.share,
                "qualifying_token_index": example.at,
                "tokens": list(example.tokens),
                "values": list(example.values),
            }
            for group in feature.groups
            for example in group.examples
        ],
    }
