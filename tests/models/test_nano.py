"""The packaged model loads, beats its baselines, matches its card, and can be trained again."""

import json
import math
import random
import subprocess
import sys
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.models import nano
from gossamer.models.nano import card, corpus, train

FOLDER = Path(nano.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(nano.path()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(nano.path())


@pytest.fixture(scope="module")
def record():
    return json.loads((nano.path() / "training.json").read_text("utf-8"))


# --- the packaged model ------------------------------------------------------------------------


def test_model_is_the_llama_the_card_describes(model, record):
    config = model.config
    assert sum(one.numel() for one in model.parameters()) == record["parameters"]
    assert 4e6 <= record["parameters"] <= 8e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.max_position_embeddings >= 2048
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert all(size % 16 == 0 for one in model.parameters() for size in one.shape)
    assert all(bool(torch.isfinite(one).all()) for one in model.parameters())


def test_head_is_stored_once():
    assert "lm_head.weight" not in load_file(nano.path() / "model.safetensors")


def test_packaged_data_stays_small():
    files = [one for one in FOLDER.rglob("*") if one.is_file() and "__pycache__" not in one.parts]
    assert sum(one.stat().st_size for one in files) <= 16e6
    assert (nano.path() / "model.safetensors").stat().st_size < 15.5e6


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_tokenizer_is_exact(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "text", ["def f():\n\tx = 1\n\n    \ty\r\n", "  # é ∑ 🎉 日本\n", "x   ==  12345.6e-7 \n \n"]
)
def test_tokenizer_keeps_layout(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_padded_batch_generates_what_each_prompt_generates_alone(model, tokenizer):
    prompts = ["def add(a, b):", "import os\n\n\nclass Reader:\n    def __init__(self"]
    # bf16 rounds differently in differently shaped batches; fp32 decides ties alike.
    exact = AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32).eval()
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    together = exact.generate(**batch, max_new_tokens=12, do_sample=False)[:, -12:]
    for prompt, row in zip(prompts, together, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        made = exact.generate(**alone, max_new_tokens=12, do_sample=False)[0, -12:]
        assert made.tolist() == row.tolist()


def test_model_beats_counting_on_packages_it_never_saw(model, tokenizer, record):
    losses, count = 0.0, 0
    with torch.inference_mode():
        for document in nano.heldout_documents():
            tokens = torch.tensor([tokenizer(document[:3000]).input_ids[:512]])
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            losses += float(loss) * (tokens.numel() - 1)
            count += tokens.numel() - 1
            if count > 4000:
                break
    assert count > 4000
    assert math.exp(losses / count) < record["baselines"]["bigram"] / 5
    assert record["heldout"]["perplexity"] < record["baselines"]["bigram"] / 5
    assert record["baselines"]["bigram"] < record["baselines"]["unigram"]


# --- the packaged texts ------------------------------------------------------------------------


def test_texts_are_whole_disjoint_files():
    calibration, heldout = nano.calibration_documents(), nano.heldout_documents()
    assert not set(calibration) & set(heldout)
    for documents in (calibration, heldout):
        assert len(documents) == len(set(documents)) > 20
        assert 400e3 <= sum(len(one.encode()) for one in documents) <= 600e3
        assert all(one.endswith("\n") and "\x1e" not in one for one in documents)
        for one in documents[:5]:
            compile(one, "document", "exec", dont_inherit=True)


def test_every_shipped_package_is_credited(record):
    credits = (FOLDER / "texts" / "LICENSES.txt").read_text("utf-8")
    for name in (*corpus.HELDOUT, *corpus.CALIBRATION):
        version = next(
            one["version"] for one in record["corpus"]["packages"] if one["name"] == name
        )
        assert credits.count(f"{name} {version}") >= 2  # once as a source, once above its notice


# --- the card ----------------------------------------------------------------------------------


def test_card_says_what_the_record_says(record):
    text = (nano.path() / "README.md").read_text("utf-8")
    assert text == card.render(record)
    assert f"**{record['heldout']['perplexity']:.3f}**" in text
    assert f"{record['baselines']['bigram']:.1f}" in text
    assert f"{record['baselines']['unigram']:.1f}" in text
    assert f"{record['parameters']:,}" in text
    assert all(
        f"| {one['name']} | {one['version']} |" in text for one in record["corpus"]["packages"]
    )


def test_split_is_by_package(record):
    splits = {one["name"]: one["split"] for one in record["corpus"]["packages"]}
    assert {name for name, split in splits.items() if split == "held out"} == set(corpus.HELDOUT)
    assert not {"hypothesis", "tqdm", "certifi", "docutils", "pathspec"} & set(splits)


# --- corpus ------------------------------------------------------------------------------------


def metadata(**fields) -> Message:
    message = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License_Expression": "MIT"}, "MIT"),
        ({"License_Expression": "BSD-3-Clause AND MIT"}, "BSD-3-Clause AND MIT"),
        ({"License_Expression": "GPL-3.0-only OR MIT"}, "GPL-3.0-only OR MIT"),
        ({"License_Expression": "MPL-2.0 AND MIT"}, None),
        ({"License": "MIT", "License_Expression": "MPL-2.0"}, None),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, "BSD"),
        (
            {"Classifier": ["License :: Public Domain", "License :: OSI Approved :: MIT License"]},
            None,
        ),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
        ({"License": "Copyright (c) somebody, all rights reserved"}, None),
        ({"License": "LGPL with exceptions"}, None),
        ({}, None),
    ],
)
def test_only_stated_permissive_licences_count(fields, licence):
    assert corpus.permissive_licence(metadata(**fields)) == licence


CODE = "def double(value):\n    return value + value\n\n\n" * 10


def test_clean_normalises_newlines():
    assert corpus.clean(("\ufeff" + CODE.replace("\n", "\r\n")).encode()) == CODE.strip("\n") + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n",
        "# This file is auto-generated\n" + CODE,
        "# GNU General Public License\n" + CODE,
        CODE + "x = '" + "a" * 500 + "'\n",
        "table = [\n" + "    1234, 5678,\n" * 50 + "]\n",
        CODE * 1000,
        CODE + "\x1e",
    ],
    ids=["tiny", "generated", "copyleft", "long line", "numbers", "huge", "separator"],
)
def test_clean_drops(text):
    assert corpus.clean(text.encode()) is None


def test_clean_drops_what_is_not_utf8():
    assert corpus.clean(CODE.encode("utf-16")) is None


def install(site: Path, name: str, licence: str, files: dict[str, str]) -> None:
    """Lay out a distribution as an installer would."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {licence}\n"
    (info / "METADATA").write_text(text)
    (info / "LICENSE").write_text(f"terms of {name}\n")
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content)
    recorded = [*files, f"{info.name}/METADATA", f"{info.name}/LICENSE", f"{info.name}/RECORD"]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in recorded))


def program(seed: int, functions: int = 25) -> str:
    """Python-like text with something to learn."""
    draw = random.Random(seed)
    verbs, nouns = ("load", "save", "check", "merge"), ("table", "index", "record", "stream")
    parts = []
    for _ in range(functions):
        verb, noun = draw.choice(verbs), draw.choice(nouns)
        parts.append(f"def {verb}_{noun}({noun}):\n    return {noun}.{verb}()\n")
    return "\n\n".join(parts)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    held = {f"flask/part{i}.py": program(1000 + i) for i in range(4)}
    held["flask/words.py"] = "\n".join(
        f"# a long remark with the number {word} that only this project makes"
        for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")
    )
    install(folder, "flask", "BSD-3-Clause", held)
    own = {f"alpha/part{i}.py": program(i) for i in range(40)}
    own["alpha/copy.py"] = own["alpha/part0.py"]
    own["alpha/_vendor/flask.py"] = program(5000)
    own["alpha/borrowed.py"] = held["flask/words.py"] + "\n" + program(6000, 2)
    install(folder, "alpha", "MIT", own)
    install(folder, "beta", "GPL-3.0-only", {"beta/part.py": program(7000)})
    return folder


def test_collect_keeps_heldout_text_out_of_training(site):
    packages = {one.name: one for one in corpus.collect([site])}
    assert set(packages) == {"alpha", "flask"}
    names = {name for name, _ in packages["alpha"].files}
    assert len(names) == 40
    assert not {"alpha/_vendor/flask.py", "alpha/borrowed.py"} & names
    assert len(names & {"alpha/copy.py", "alpha/part0.py"}) == 1
    assert packages["alpha"].notices == "terms of alpha\n"


def test_collect_caps_a_package(site):
    small = {one.name: one for one in corpus.collect([site], most=10_000)}["alpha"]
    assert 0 < sum(len(text) for _, text in small.files) <= 10_000


# --- training ----------------------------------------------------------------------------------


def test_baselines_worked_by_hand():
    # Counts of 0 1 0 1 0 2, plus one each: 4, 3, 2 of 9. After 0 come 1, 1, 2: two kinds.
    scores = train.baselines(np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1, 2]), 3)
    unigram = [3 / 9, 2 / 9]
    bigram = [(2 + 2 * 3 / 9) / (3 + 2), (0 + 1 * 2 / 9) / (2 + 1)]
    for name, terms in {"unigram": unigram, "bigram": bigram}.items():
        assert scores[name] == pytest.approx(math.prod(terms) ** (-1 / 2))


@given(
    st.integers(1, 7), st.integers(1, 4), st.integers(0, 3), st.integers(0, 5), st.integers(40, 90)
)
def test_windows_visit_each_token_at_most_once_per_epoch(context, batch, seed, epoch, length):
    windows = train.Windows(torch.arange(length), context, batch, seed)
    seen = []
    for step in range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch):
        inputs, targets = windows.at(step)
        assert inputs.shape == (batch, context)
        assert torch.equal(inputs + 1, targets)
        seen += targets.flatten().tolist()
    assert len(seen) == len(set(seen)) > length - 1 - context - batch * context
    again = train.Windows(torch.arange(length), context, batch, seed)
    assert torch.equal(again.at(step)[0], inputs)


def test_windows_refuse_a_corpus_too_small():
    with pytest.raises(ValueError, match="larger corpus"):
        train.Windows(torch.arange(10), 8, 4, 0)


def test_rate_rises_stays_and_ends_at_zero():
    values = [train.rate(one, 0.1, 0.5) for one in (0.0, 0.1, 0.3, 0.5, 0.75, 1.0)]
    assert values == pytest.approx([0.0099, 1.0, 1.0, 1.0, 0.5, 0.0], abs=1e-3)


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def run(line: str, *more: object) -> None:
    train.main([*line.split(), *map(str, more)])


@pytest.fixture(scope="module")
def prepared(site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    run(
        f"prepare --vocabulary 300 --text-bytes 5000 --texts {folder / 'texts'}",
        *("--corpus", folder / "corpus.zip", "--packages-dir", site),
    )
    return folder / "corpus.zip"


def tiny(prepared: Path, out: Path, end: str = "--steps 30", *more: object) -> dict:
    run(
        f"train --every 10 --batch 8 --context 64 --lr 1e-2 --no-samples {end}",
        *("--corpus", prepared, "--out", out, "--shape", json.dumps(SHAPE), *more),
    )
    return json.loads((out / "training.json").read_text("utf-8"))


def test_training_learns_and_resumes_to_the_same_weights(prepared, tmp_path, monkeypatch):
    whole = tiny(prepared, tmp_path / "whole")
    losses = [row[3] for row in whole["curve"]]
    assert losses[-1] < losses[0] - 0.3
    assert whole["heldout"]["perplexity"] < whole["baselines"]["unigram"]
    assert "/" not in whole["command"]
    assert (tmp_path / "whole" / "README.md").read_text("utf-8") == card.render(whole)

    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return clip(*args, **options)

    saved = tmp_path / "saved"
    kept = ("--steps 30", "--checkpoint", saved, "--save-every", 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny(prepared, tmp_path / "resumed", *kept)
    assert torch.load(saved, weights_only=True)["step"] == 10
    tiny(prepared, tmp_path / "resumed", *kept)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_time_limit_ends_the_run(prepared, tmp_path):
    timed = tiny(prepared, tmp_path / "timed", "--time-limit 1 --reserve 0")
    assert timed["seconds"] < 5
    assert timed["steps"] > 1


def test_training_needs_an_end(prepared, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["train", "--corpus", str(prepared), "--out", str(tmp_path)])
    assert "--time-limit" in capsys.readouterr().err


def test_script_runs_as_a_plain_file():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "train.py"), "train", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--time-limit" in done.stdout
