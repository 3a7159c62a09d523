"""The Trainer of transformers: schedule, checkpoints, resuming."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from gossamer.core import GossamerError
from gossamer.methods.training.cast import CAST
from gossamer.methods.training.concrete_ticket import ConcreteTicket
from gossamer.methods.training.grasp import GraSP
from gossamer.methods.training.imp import IMP
from gossamer.methods.training.random_search import RandomSearch
from gossamer.methods.training.reprogramming import Reprogramming
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.snip import SNIP
from gossamer.methods.training.sparsifier.callback import SparsifierCallback
from gossamer.methods.training.sparsifier.checkpoint import STATE_FILE, TEACHER_FILE, read_state
from gossamer.methods.training.synflow import SynFlow
from gossamer.methods.weights.wanda import Wanda
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
    given = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(**given | values)
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


@pytest.mark.parametrize("given", ["a copy", "a module", "a folder"])
def test_a_teacher_is_there_again_after_resuming(tmp_path, given):
    """CAST distils from the dense model, which a checkpoint in the middle does not hold."""
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    teacher = {"a copy": None, "a module": dense, "a folder": tmp_path / "dense"}[given]
    method = CAST(every=2, pull=1e-3)

    callback = SparsifierCallback(method, teacher=teacher)
    whole = trainer(tmp_path / "runs", callback)
    whole.train()
    work = callback.applied
    note = next(n for n in work.report().notes if n.startswith("memory"))
    size = sum(p.numel() * p.element_size() for p in dense.parameters())
    assert f"teacher {size:,} bytes" in note

    kept = tmp_path / "runs" / TEACHER_FILE
    assert kept.exists() == (given == "a copy")
    again_callback = SparsifierCallback(method, teacher=teacher)
    again = trainer(tmp_path / "runs", again_callback)
    again.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-4"))
    for name, mask in work.masks.items():
        assert torch.equal(mask, again_callback.applied.masks[name]), name
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for layer in work.layers:
        method.pattern.check(work.selection(layer.name))

    if given == "a copy":
        kept.write_bytes(b"no")
        with pytest.raises(GossamerError, match="holds no teacher of this model.*teacher="):
            trainer(tmp_path / "runs", SparsifierCallback(method)).train(
                resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-4")
            )


def test_accumulated_parts_of_an_update_distil_as_one_batch(tmp_path):
    """Two parts of two rows train as one of four: the divergence is a mean over the update."""
    ends = []
    for parts in (1, 2):
        callback = SparsifierCallback(CAST(every=2, pull=1e-3, distill=0.9))
        run = trainer(
            tmp_path / str(parts),
            callback,
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
            save_strategy="no",
        )
        norms = []
        run.add_callback(_Norms(norms))
        run.train()
        ends.append((norms, [p.detach().clone() for p in run.model.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


class _Norms(TrainerCallback):
    """Gradient norms before every update."""

    def __init__(self, found):
        self.found = found

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        squares = (p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        self.found.append(float(sum(squares).sqrt()))


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


def first_windows(model):
    ids = random_tokens().input_ids[:2].to(model.device)
    return model(input_ids=ids, labels=ids).loss


IDS = [{"input_ids": random_tokens().input_ids[:2]}]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (SNIP(), {"loss": first_windows}),
        (GraSP(), {"loss": first_windows}),
        (RandomSearch(draws=2), {"loss": first_windows}),
        (ConcreteTicket(search=0.5), {"data": IDS}),
        (SynFlow(rounds=2), {}),
    ],
)
def test_methods_that_look_at_the_untrained_network_train(tmp_path, method, given):
    callback = SparsifierCallback(method, **given)
    trainer(tmp_path, callback, max_steps=2, save_strategy="no").train()
    assert callback.applied.report().sparsity == pytest.approx(method.final_sparsity, abs=0.02)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (SNIP(), {}, r"snip looks.*give loss=.*SparsifierCallback\(method, loss="),
        (GraSP(), {}, "grasp looks.*give loss="),
        (RandomSearch(), {}, "random_search looks.*give loss="),
        (ConcreteTicket(), {}, "concrete_ticket looks.*give data="),
        (SNIP(), {"data": IDS}, "snip searches on no data; leave data out"),
        (IMP(), {}, "several times and rewinds.*find_ticket.*apply"),
        (RigL(), {"teacher": "nano"}, "rigl as given does not distil; leave teacher out"),
        (CAST(distill=0), {"teacher": "nano"}, "cast as given does not distil"),
        ("rigl", {}, r"such as RigL\(sparsity=0.9\); got 'rigl'$"),
        (RigL, {}, "got the class RigL$"),
        (Wanda(), {}, "got Wanda$"),
        (Reprogramming(), {}, "got Reprogramming$"),
    ],
)
def test_what_cannot_be_one_run_of_a_trainer_is_refused(method, given, message):
    with pytest.raises(GossamerError, match=message):
        SparsifierCallback(method, **given)
