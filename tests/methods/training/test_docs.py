"""The examples of docs/training.md run."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from gossamer import load, methods
from gossamer.models import at_work
from gossamer.models.store import read_stages
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model, tiny_tokenizer

PAGE = Path(__file__).parents[3] / "docs" / "training.md"


def test_the_loops_of_the_page_train_sparsely(tmp_path):
    ids = random_tokens().input_ids
    rows = [{"input_ids": row, "labels": row} for row in ids]
    names = {
        "torch": torch,
        "Trainer": Trainer,
        "model": tiny_model("llama"),
        "batches": [{"input_ids": ids[:2], "labels": ids[:2]}] * 30,
        "dataset": rows,
        "folder": tmp_path,
        "tokenizer": tiny_tokenizer(),
        "arguments": TrainingArguments(
            output_dir=str(tmp_path / "runs"),
            max_steps=4,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            dataloader_pin_memory=False,
        ),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    for index, block in enumerate(blocks):
        if "Trainer(" in block:
            names["model"] = tiny_model("llama")
        exec(compile(block, f"{PAGE.name}:{index}", "exec"), names)
    assert names["applied"].report().sparsity == pytest.approx(0.9, abs=1e-3)
    assert names["callback"].applied.report().sparsity == pytest.approx(0.9, abs=1e-3)
    for folder in ("sparse", "trained"):
        assert len(at_work(load(tmp_path / folder).model)) == 1
        (stage,) = read_stages(tmp_path / folder)
        assert stage.method["method"] == "rigl"


def test_the_table_names_every_method_of_the_protocol():
    from gossamer.methods.training.base import SparseTraining

    text = PAGE.read_text(encoding="utf-8")
    for key in methods.keys("training"):
        if issubclass(methods.get(key), SparseTraining):
            assert f"`{key}`" in text
