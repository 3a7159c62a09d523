"""The Trainer of transformers: schedule, checkpoints, resuming."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from gossamer.core import GossamerError
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.sparsifier.callback import SparsifierCallback
from gossamer.methods.training.sparsifier.checkpoint import STATE_FILE, read_state
from gossamer.models import at_work
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


class Windows(Dataset):
    def __init__(self):
        self.ids = random_tokens().input_ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(folder, callback, **values):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=4,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **values,
    )
    return Trainer(tiny_model("llama"), args, train_dataset=Windows(), callbacks=[callback])


METHOD = RigL(sparsity=0.75, every=2, pattern="row")


def test_the_trainer_trains_sparsely_and_resumes_exactly(tmp_path):
    callback = SparsifierCallback(METHOD)
    whole = trainer(tmp_path / "a", callback)
    whole.train()
    work = callback.applied
    assert callback.sparsifier is None
    assert work.report().sparsity == pytest.approx(0.75, abs=1e-2)
    assert work.method.steps == 8
    for layer in work.layers:
        weight = whole.model.get_parameter(layer.parameter).detach()
        assert not weight[~work.selection(layer.name).mask()].any()

    state = read_state(tmp_path / "a" / "checkpoint-4" / STATE_FILE)
    assert state["updates"] == 4
    again_callback = SparsifierCallback(METHOD)
    again = trainer(tmp_path / "a", again_callback)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for name, mask in work.masks.items():
        assert torch.equal(mask, again_callback.applied.masks[name]), name
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)

    work.save(tmp_path / "sparse")
    assert (tmp_path / "sparse" / "gossamer.json").exists()


def test_undo_puts_the_weights_before_training_back(tmp_path):
    callback = SparsifierCallback(METHOD, undo=True)
    run = trainer(tmp_path, callback)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    callback.applied.restore()
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert not at_work(run.model)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    (tmp_path / STATE_FILE).write_bytes(b"no")
    with pytest.raises(GossamerError, match="holds no state of a sparse training"):
        read_state(tmp_path / STATE_FILE)
    with pytest.raises(GossamerError, match="holds no state"):
        read_state(tmp_path / "missing")
