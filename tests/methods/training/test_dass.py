"""DASS: from a space to a pruned network and back."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.training.architecture.space import MixedOp, linear_space, mixed_ops
from gossamer.methods.training.dass import DASS

QUICK = {"pretrain": 4, "learn": 4, "tune": 4, "batch_size": 16}


def made():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return linear_space(6, 3, width=8, nodes=2).eval()


def data(count=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def test_the_model_becomes_what_was_found_and_comes_back():
    space = made()
    parts, x = dict(space.named_modules()), data()[0]
    with torch.no_grad():
        before = space(x)
    work = DASS(sparsity=0.75, **QUICK).apply(space, data())
    assert set(work.architecture) == {"2.edges.0_1", "2.edges.0_2", "2.edges.1_2"}
    assert not any(isinstance(m, MixedOp) for m in space.modules())
    report = work.report()
    assert report.sparsity == pytest.approx(0.75, abs=0.01)
    for row in report.rows:
        weight = space.get_parameter(f"{row.name}.weight")
        assert float((weight == 0).double().mean()) == pytest.approx(row.sparsity)
    text = str(report)
    for place, op in work.architecture.items():
        assert f"found {place}: {op} 0." in text
    assert "12 updates of weights or scores and 8 of the architecture" in text
    work.restore()
    assert dict(space.named_modules()) == parts
    with torch.no_grad():
        assert torch.equal(space(x), before)


def test_an_architecture_of_ones_own_is_trained_as_it_is():
    space = made()
    wanted = dict(zip(mixed_ops(space), ("identity", "none", "linear"), strict=True))
    work = DASS(sparsity=0.5, **QUICK).apply(space, data(), architecture=wanted)
    assert work.architecture == wanted
    assert {row.name for row in work.report().rows} == {"1", "2.edges.1_2.1", "4"}


def test_training_learns():
    space = made()
    x, y = data(400)
    DASS(sparsity=0.5, pretrain=60, learn=30, tune=60, search="random").apply(space, (x, y))
    with torch.no_grad():
        assert float((space(x).argmax(1) == y).double().mean()) > 0.8


def test_stored_networks_want_their_own_space():
    space = made()
    work = DASS(sparsity=0.5, **QUICK).apply(space, data())
    state = work.state()
    wide = linear_space(6, 3, width=12, nodes=2)
    with pytest.raises(GossamerError, match="does not fit this space; build it with the widths"):
        work.method.reattach(wide, state.meta, state.tensors)
    with pytest.raises(GossamerError, match="does not fit this space: 2.edges"):
        work.method.reattach(linear_space(6, 3, nodes=1), state.meta, state.tensors)


def test_bad_input():
    x, y = data()
    method = DASS(**QUICK)
    for bad, text in [
        (None, "pair of tensors"),
        ((x, y[:3]), "whole numbers"),
        ((x, y.float()), "whole numbers"),
        ((x * torch.nan, y), "NaN or infinity"),
        ((x, y + 3), "labels go from 3 to 5; the model has 3 classes"),
        ((x[:, :4], y), r"failed on the first batch, inputs \(1, 4\)"),
    ]:
        with pytest.raises(GossamerError, match=text):
            method.apply(made(), bad)
    with pytest.raises(GossamerError, match="holds nothing to search"):
        method.apply(torch.nn.Linear(6, 3), (x, y))
    for name, value in [("search", "darts"), ("validation", 1.0), ("lr", 0.0), ("tune", 0)]:
        with pytest.raises(GossamerError, match=name):
            DASS(**{name: value})
