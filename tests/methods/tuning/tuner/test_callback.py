"""The Trainer of transformers: schedule, checkpoints that hold what trains, resuming."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from gossamer.core import GossamerError
from gossamer.methods.tuning.pst import PST
from gossamer.methods.tuning.tuner.callback import (
    STATE_FILE,
    TunerCallback,
    read_state,
    write_state,
)
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

METHOD = PST(sparsity=0.75, rank=2, score_rank=2)


class Windows(Dataset):
    def __init__(self):
        self.ids = random_tokens().input_ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(folder, callback, model, **values):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=4,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **values,
    )
    return Trainer(model, args, train_dataset=Windows(), callbacks=[callback])


def test_the_trainer_tunes_and_resumes_exactly(tmp_path):
    model = tiny_model("llama")
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    callback = TunerCallback(METHOD.attach(model))
    trainer(tmp_path, callback, model).train()
    work = callback.applied
    assert work.method.steps == 8
    assert not work.report().warnings
    assert work.report().sparsity == pytest.approx(0.75, abs=1e-9)

    folder = tmp_path / "checkpoint-4"
    stored = load_file(folder / "model.safetensors")
    adapters = {name for name in stored if ".tuning." in name}
    assert len(adapters) == 6 * len(work.sites)
    assert all(torch.equal(stored[name], frozen[name]) for name in set(stored) - adapters)
    assert read_state(folder / STATE_FILE)["updates"] == 4

    again = tiny_model("llama")
    after = TunerCallback(METHOD.attach(again))
    trainer(tmp_path, after, again).train(resume_from_checkpoint=str(folder))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    work.save(tmp_path / "sparse")
    assert (tmp_path / "sparse" / "gossamer.json").exists()
    with pytest.raises(GossamerError, match="the tuner has finished"):
        trainer(tmp_path / "b", after, again).train()


def test_states_come_back_from_files_and_others_are_refused(tmp_path):
    state = METHOD.attach(tiny_model("llama")).state_dict()
    write_state(state, tmp_path / "state")
    back = read_state(tmp_path / "state")
    assert back["updates"] == 0
    METHOD.attach(tiny_model("llama"), state=back)
    (tmp_path / "other").write_bytes(b"nothing")
    for name in ("other", "missing"):
        with pytest.raises(GossamerError, match="holds no state of a tuning"):
            read_state(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "got"), [(METHOD, "PST"), (PST, "the class PST"), ("pst", "'pst'")]
)
def test_only_a_tuner_at_work_is_taken(given, got):
    with pytest.raises(GossamerError, match=rf"PST\(...\).attach\(model\); got {got}$"):
        TunerCallback(given)
