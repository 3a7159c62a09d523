"""N:M training in any loop: dense weights behind a mask, exact resumption, exact end."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core import NM, GossamerError
from gossamer.methods.training.ast import AST
from gossamer.methods.training.cast import CAST
from gossamer.methods.training.gradient_flow import GradientFlow
from gossamer.methods.training.sparsifier.checkpoint import read_state, write_state
from gossamer.methods.training.sr_ste import SRSTE

METHODS = {
    "sr_ste": SRSTE(steps=12),
    "sr_ste_rarely": SRSTE(steps=12, pattern="1:4", every=3),
    "cast": CAST(steps=12, every=2, pull=1e-2, distill=0.0),
    "cast_taught": CAST(steps=12, every=2, pull=1e-2),
    "cast_plain": CAST(steps=12, every=2, pull=1e-2, parts=0, distill=0.0),
    "ast": AST(steps=12, every=2),
    "ast_boosted": AST(steps=12, every=2, slorb=4, distill=0.0),
    "fading": GradientFlow(steps=12, dense=0.2),
    "fading_through": GradientFlow(steps=12, course="linear", straight_through=True),
    "narrowing": GradientFlow(steps=12, pattern="1:8", course="stepwise"),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x, labels=None):
        logits = self.body(x)
        loss = None if labels is None else cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def batch(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(rows, 8, generator=generator),
        torch.randint(0, 4, (rows,), generator=generator),
    )


def run(model, optimizer, sparsifier, steps):
    for step in steps:
        x, y = batch(step)
        model(x, labels=y).loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("key", METHODS)
def test_the_end_is_exactly_n_of_m_under_any_optimizer(key, optimizer):
    method, model = METHODS[key], Net()
    trains = OPTIMIZERS[optimizer](model.parameters())
    if method.changes_adam and optimizer != "adamw":
        with pytest.raises(GossamerError, match=r"attach to torch.optim.Adam"):
            method.attach(model, trains)
        return
    sparsifier = method.attach(model, trains)
    run(model, trains, sparsifier, range(method.steps))
    work = sparsifier.finish()
    assert not model._forward_hooks
    assert not trains._optimizer_step_pre_hooks
    assert not trains._optimizer_step_post_hooks
    for layer in work.layers:
        weight = model.get_parameter(layer.parameter)
        assert not weight._backward_hooks
        method.pattern.check(work.selection(layer.name))
        groups = weight.detach().reshape(-1, method.pattern.of)
        assert int(groups.count_nonzero(1).max()) <= method.pattern.keep
        assert weight.detach()[work.selection(layer.name).mask()].any()
        state = trains.state[weight]
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                assert not value[~work.selection(layer.name).mask()].any()
    assert work.report().sparsity == pytest.approx(method.final_sparsity)


@pytest.mark.parametrize("key", METHODS)
def test_resuming_mid_schedule_is_bit_exact(key, tmp_path):
    method = METHODS[key]
    straight = Net()
    trains = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    whole = method.attach(straight, trains)
    run(straight, trains, whole, range(method.steps))

    first = Net()
    before = torch.optim.AdamW(first.parameters(), lr=1e-2)
    half = method.attach(first, before)
    run(first, before, half, range(7))
    saved = copy.deepcopy((first.state_dict(), before.state_dict()))
    write_state(half.state_dict(), tmp_path / "state")

    again = Net(seed=1)
    after = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(saved[0])
    after.load_state_dict(saved[1])
    given = {"teacher": Net()} if method.distilled_share else {}
    state = read_state(tmp_path / "state")
    if given:
        with pytest.raises(GossamerError, match="teacher="):
            method.attach(again, after, state=state)
    rest = method.attach(again, after, state=state, **given)
    assert rest.updates == 7
    run(again, after, rest, range(7, method.steps))
    for path, one in whole.held.items():
        assert torch.equal(one.mask, rest.held[path].mask)
    assert whole.flops.to_dict() == rest.flops.to_dict()
    whole.finish()
    rest.finish()
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("key", ["sr_ste", "cast", "ast", "fading"])
def test_masters_in_float32_keep_the_dense_weights(key):
    method, model = METHODS[key], Net().bfloat16()
    if method.distilled_share:
        method = AST(steps=12, every=2, distill=0.0)
    names = dict(model.named_parameters())
    masters = {name: nn.Parameter(p.detach().float()) for name, p in names.items()}
    trains = torch.optim.AdamW(masters.values(), lr=1e-3)
    sparsifier = method.attach(model, trains, masters=masters)
    for step in range(12):
        x, y = batch(step)
        cross_entropy(model(x.bfloat16()).logits.float(), y).backward()
        for name, p in names.items():
            masters[name].grad = p.grad.float()
        trains.step()
        with torch.no_grad():
            for name, p in names.items():
                p.copy_(masters[name])
                p.grad = None
        sparsifier.step()
        for path, one in sparsifier.held.items():
            assert masters[path][~one.mask].any()
            if key in ("sr_ste", "ast"):
                assert not names[path][~one.mask].any()
    sparsifier.finish()
    for path, one in sparsifier.held.items():
        assert not names[path][~one.mask].any()
        assert torch.equal(names[path], one.master.to(torch.bfloat16))


def test_an_update_left_out_by_the_gradient_scaler_does_not_count():
    model = Net()
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = SRSTE(steps=6).attach(model, trains)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        x, y = batch(step)
        x = x * float("inf") if step == 1 else x
        scaler.scale(model(x, labels=y).loss).backward()
        scaler.step(trains)
        scaler.update()
        sparsifier.step()
        trains.zero_grad()
        for one in sparsifier.held.values():
            assert not one.weight.detach()[~one.mask].any()
    assert sparsifier.updates == 5
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("key", ["sr_ste", "cast", "ast_boosted", "fading"])
def test_a_fused_optimizer_that_unscales_by_itself(key):
    """It sees gradients times 1024; what is added to them, and other tensors' gradients, follow."""
    method = replace(METHODS[key], steps=6)
    method = replace(method, pull=0.05) if key != "fading" else method
    ends = []
    for scale in (0.0, 1024.0):
        model = Net()
        trains = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        sparsifier = method.attach(model, trains)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
        for step in range(6):
            x, y = batch(step)
            scaler.scale(model(x, labels=y).loss).backward()
            scaler.step(trains)
            scaler.update()
            sparsifier.step()
            trains.zero_grad()
        saved = copy.deepcopy(trains.state_dict())
        trains.load_state_dict(saved)
        ends.append([p.detach().clone() for p in model.parameters()])
        sparsifier.finish()
    assert sparsifier.updates == 6
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_undo_and_state_of_another_training():
    model = Net()
    start = copy.deepcopy(model.state_dict())
    trains = torch.optim.AdamW(model.parameters())
    sparsifier = AST(steps=2, slorb=4).attach(model, trains, undo=True)
    run(model, trains, sparsifier, range(2))
    state = sparsifier.state_dict()
    work = sparsifier.finish()
    assert len(work.branches) == 2
    assert "dense weights that train" in " ".join(work.report().notes)
    work.restore()
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(GossamerError, match="slorb differs"):
        AST(steps=2).attach(model, trains, state=state, teacher=Net())


class TestBadInput:
    def test_amsgrad(self):
        model = Net()
        trains = torch.optim.AdamW(model.parameters(), amsgrad=True)
        with pytest.raises(GossamerError, match="without amsgrad"):
            CAST(steps=2).attach(model, trains)

    def test_a_model_without_a_loss_to_distil_with(self):
        net = nn.Sequential(nn.Linear(8, 4))
        sparsifier = CAST(steps=2).attach(net, torch.optim.AdamW(net.parameters()))
        with pytest.raises(GossamerError, match="distill=0"):
            net(torch.randn(2, 8))
        sparsifier.remove()

    def test_widths_that_do_not_divide(self):
        model = Net()
        trains = torch.optim.AdamW(model.parameters())
        with pytest.raises(GossamerError, match="blocks of 5 inputs do not divide 8"):
            AST(steps=2, slorb=5).attach(model, trains)
        with pytest.raises(GossamerError, match="3 scales do not divide 8 inputs"):
            CAST(steps=2, parts=3).attach(model, trains)
        with pytest.raises(GossamerError, match="divisible by 3"):
            SRSTE(steps=2, pattern="1:3").attach(model, trains)

    def test_patterns_that_are_not_n_of_m(self):
        with pytest.raises(GossamerError, match="sr_ste takes no pattern layer"):
            SRSTE(pattern="layer")

    def test_phases_that_leave_no_room(self):
        with pytest.raises(GossamerError, match="dense \\+ tune < 1"):
            GradientFlow(dense=0.5, tune=0.5)
        with pytest.raises(GossamerError, match="course"):
            GradientFlow(course="sudden")
        with pytest.raises(GossamerError, match="course exponential for allocation erk"):
            GradientFlow(course="stepwise", sparsity=0.5, allocation="erk")


def test_frames_narrow_as_the_paper_lists_them():
    def frames(**values):
        return [str(frame) for frame in GradientFlow(**values).frames]

    assert frames(pattern="1:16", course="stepwise") == ["15:16", "8:16", "4:16", "2:16", "1:16"]
    assert frames(pattern="2:4", course="stepwise") == ["3:4", "2:4"]
    assert frames(pattern="1:2", course="geometric") == ["8:16", "4:8", "2:4", "1:2"]
    flow = GradientFlow(pattern="1:4", course="stepwise", steps=100, dense=0.1, tune=0.3)
    assert flow.phases == (10, 70)
    assert [str(flow.frame_at(t)) for t in (10, 29, 30, 50, 99)] == [
        "3:4", "3:4", "2:4", "1:4", "1:4",
    ]  # fmt: skip
    assert flow.pattern == NM(1, 4)


def test_beta_has_faded_before_tuning():
    flow = GradientFlow(steps=100, dense=0.1, tune=0.3)
    seen = [flow.removed_share(t) for t in range(100)]
    assert seen[:11] == [1.0] * 11
    assert seen[69] < 1e-3
    assert seen[70:] == [0.0] * 30
    assert seen == sorted(seen, reverse=True)
    assert GradientFlow(steps=100, dense=0, tune=0.5, course="linear").removed_share(
        25
    ) == pytest.approx(0.5)
