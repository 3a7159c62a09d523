"""Distillation: the divergence by hand, the mixed loss and its gradient, passes left alone."""

from math import log
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.methods.training.ast import AST
from gossamer.methods.training.nm.distillation import divergence, mixing
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def test_by_hand():
    teacher = torch.tensor([[0.8, 0.2]]).log()
    ours = torch.tensor([[0.5, 0.5]]).log()
    want = 0.8 * log(0.8 / 0.5) + 0.2 * log(0.2 / 0.5)
    assert float(divergence(ours, teacher)) == pytest.approx(want, abs=1e-6)
    assert float(divergence(teacher, teacher, 2.0)) == pytest.approx(0.0, abs=1e-7)
    # T² keeps the size of gradients: far from the limit T² KL(T) tends to a constant.
    assert float(divergence(2 * ours, 2 * teacher, 2.0)) == pytest.approx(4 * want, abs=1e-5)


def test_padding_does_not_count():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    where = torch.tensor([[1, 1, 0], [1, 0, 0]])
    part = torch.cat([ours[0, :2], ours[1, :1]]), torch.cat([theirs[0, :2], theirs[1, :1]])
    assert torch.allclose(divergence(ours, theirs, 2.0, where), divergence(*part, 2.0))


def test_the_mixed_loss():
    student = SimpleNamespace(logits=torch.randn(4, 3), loss=torch.tensor(2.0))
    theirs = torch.randn(4, 3)

    class Teacher(nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=theirs)

    hook = mixing(Teacher(), 0.25, 2.0)
    far = float(divergence(student.logits, theirs, 2.0))
    found = hook(nn.Linear(1, 1), (), {"x": 0, "labels": 0}, student)
    assert float(found.loss) == pytest.approx(0.75 * 2.0 + 0.25 * far)
    with torch.no_grad():
        assert hook(nn.Linear(1, 1), (), {"x": 0}, student) is None


def test_the_teacher_is_the_model_it_began_with():
    model = tiny_model("llama").train()
    ids = random_tokens().input_ids[:2]
    dense = model(input_ids=ids).logits.detach()
    sparsifier = AST(steps=2).attach(model, torch.optim.AdamW(model.parameters()))
    assert torch.equal(sparsifier.teacher(input_ids=ids).logits, dense)
    assert not any(p.requires_grad for p in sparsifier.teacher.parameters())
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    plain = float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    far = float(divergence(logits, dense, 2.0))
    mixed = float(model(input_ids=ids, labels=ids).loss.detach())
    assert mixed == pytest.approx(0.33 * plain + 0.67 * far, rel=1e-5)
    sparsifier.remove()
    assert float(model(input_ids=ids, labels=ids).loss.detach()) == pytest.approx(plain, rel=1e-6)
