"""Any loop: masks hold after every update, whatever the optimizer, precision or accumulation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from gossamer.core import GossamerError
from gossamer.methods.training.gmp import GMP
from gossamer.methods.training.granet import GraNet
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.set import SET

METHODS = {
    "random_pruning": RandomPruning(sparsity=0.75, steps=12),
    "set": SET(sparsity=0.75, steps=12, every=3),
    "rigl": RigL(sparsity=0.75, steps=12, every=3),
    "gmp": GMP(sparsity=0.75, steps=12, every=3),
    "gmp_returning": GMP(sparsity=0.75, steps=12, every=3, keep_removed=True),
    "granet": GraNet(sparsity=0.75, steps=12, every=3),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def net(seed=0, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))


def batch(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(rows, 8, generator=generator),
        torch.randint(0, 4, (rows,), generator=generator),
    )


def run(model, optimizer, sparsifier, steps):
    for step in steps:
        x, y = batch(step)
        cross_entropy(model(x), y).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()


def assert_zero(sparsifier):
    for one in sparsifier.held.values():
        for tensor in one.tensors(sparsifier.optimizer):
            assert not tensor.detach()[~one.mask].any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("key", METHODS)
def test_removed_weights_and_their_state_are_zero_after_every_update(key, optimizer):
    model, method = net(), METHODS[key]
    trains = OPTIMIZERS[optimizer](model.parameters())
    sparsifier = method.attach(model, trains)
    for step in range(method.steps):
        run(model, trains, sparsifier, [step])
        assert_zero(sparsifier)
        kept = sum(int(m.weight.count_nonzero()) for m in model if isinstance(m, nn.Linear))
        assert kept <= sum(sparsifier.kept().values())
        wanted = method.sparsity_at(step + 1)
        assert sparsifier.sparsity == pytest.approx(wanted, abs=2 / 192)
    assert sparsifier.sparsity == pytest.approx(0.75, abs=2 / 192)
    model[0].bias.sum().backward()
    work = sparsifier.finish()
    assert not model[0].weight._backward_hooks
    assert not trains._optimizer_step_pre_hooks
    assert not trains._optimizer_step_post_hooks
    assert work.report().sparsity == pytest.approx(sparsifier.sparsity, abs=1e-9)


@pytest.mark.parametrize("key", METHODS)
def test_resuming_mid_schedule_is_bit_exact(key):
    method = METHODS[key]
    straight = net()
    trains = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    whole = method.attach(straight, trains)
    run(straight, trains, whole, range(method.steps))

    first = net()
    before = torch.optim.AdamW(first.parameters(), lr=1e-2)
    half = method.attach(first, before)
    run(first, before, half, range(7))
    saved = copy.deepcopy((first.state_dict(), before.state_dict(), half.state_dict()))

    again = net(seed=1)
    after = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(saved[0])
    after.load_state_dict(saved[1])
    rest = method.attach(again, after, state=saved[2])
    assert rest.updates == 7
    run(again, after, rest, range(7, method.steps))
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for path, one in whole.held.items():
        assert torch.equal(one.mask, rest.held[path].mask)
    assert whole.flops.to_dict() == rest.flops.to_dict()


def test_accumulation_grows_where_the_sum_of_gradients_is_largest():
    results = []
    for parts in (1, 4):
        model = net()
        trains = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = RigL(sparsity=0.75, steps=12, every=3).attach(model, trains)
        for step in range(12):
            x, y = batch(step)
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (cross_entropy(model(xs), ys) / parts).backward()
            trains.step()
            sparsifier.step()
            trains.zero_grad()
        results.append((model, {k: v.mask for k, v in sparsifier.held.items()}))
    for name, mask in results[0][1].items():
        assert torch.equal(mask, results[1][1][name])
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_an_update_left_out_by_the_gradient_scaler_does_not_count():
    model = net()
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = RigL(sparsity=0.75, steps=12, every=2).attach(model, trains)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        x, y = batch(step)
        x = x * float("inf") if step == 1 else x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(trains)
        scaler.update()
        sparsifier.step()
        trains.zero_grad()
        assert_zero(sparsifier)
    assert sparsifier.updates == 5
    assert all(p.isfinite().all() for p in model.parameters())


def test_half_precision_weights_with_masters_keep_both_sparse():
    model = net().bfloat16()
    names = dict(model.named_parameters())
    masters = {name: nn.Parameter(p.detach().float()) for name, p in names.items()}
    trains = torch.optim.AdamW(masters.values(), lr=1e-4)
    sparsifier = RigL(sparsity=0.75, steps=12, every=3).attach(model, trains, masters=masters)
    first = {k: v.mask.clone() for k, v in sparsifier.held.items()}
    for step in range(12):
        x, y = batch(step)
        cross_entropy(model(x.bfloat16()).float(), y).backward()
        for name, p in names.items():
            masters[name].grad = p.grad.float()
        trains.step()
        with torch.no_grad():
            for name, p in names.items():
                p.copy_(masters[name])
                p.grad = None
        sparsifier.step()
        assert_zero(sparsifier)
    assert any(not torch.equal(first[k], v.mask) for k, v in sparsifier.held.items())
    for path, one in sparsifier.held.items():
        assert torch.equal(names[path], one.master.to(torch.bfloat16))


def test_gradients_that_clipping_sees_are_those_of_the_sparse_network():
    model = net()
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = RigL(sparsity=0.75, steps=12, every=2).attach(model, trains)
    x, y = batch(0)
    cross_entropy(model(x), y).backward()
    assert not model[0].weight.grad[~sparsifier.mask("0")].any()
    trains.step()
    sparsifier.step()
    trains.zero_grad()
    assert sparsifier.needs_dense_gradient
    cross_entropy(model(x), y).backward()
    assert model[0].weight.grad[~sparsifier.mask("0")].any()


def test_a_change_of_rigl_takes_the_place_of_the_update():
    model = net()
    trains = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sparsifier = RigL(sparsity=0.5, steps=12, every=2).attach(model, trains)
    run(model, trains, sparsifier, [0])
    before = copy.deepcopy(model.state_dict())
    mask = sparsifier.mask("0").clone()
    run(model, trains, sparsifier, [1])
    both = mask & sparsifier.mask("0")
    unchanged = model[0].weight[both] == before["0.weight"][both]
    # Kept weights stand still; just dropped ones that grew again start from zero.
    assert bool((unchanged | (model[0].weight[both] == 0)).all())
    assert torch.equal(model[0].bias, before["0.bias"])
    assert not model[0].weight[~mask].any()


def test_tied_and_skipped_layers_train_densely():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = RandomPruning(sparsity=0.5, steps=4, skip="2").attach(model, trains)
    assert [layer.name for layer in sparsifier.layers] == ["0"]
    assert int(model[2].weight.count_nonzero()) == 128
    with pytest.raises(GossamerError, match="skip '9'|skip"):
        RandomPruning(sparsity=0.5, steps=4, skip="9").attach(model, trains)


def test_finish_restores_only_with_a_copy():
    model = net()
    start = copy.deepcopy(model.state_dict())
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = RandomPruning(sparsity=0.5, steps=2).attach(model, trains, undo=True)
    run(model, trains, sparsifier, range(2))
    work = sparsifier.finish()
    assert "dense weights, to undo" in " ".join(work.report().notes)
    work.restore()
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    sparsifier = RandomPruning(sparsity=0.5, steps=2).attach(model, trains)
    work = sparsifier.finish()
    assert any("ended at update 0 of 2" in text for text in work.report().warnings)
    with pytest.raises(GossamerError, match="undo=True"):
        work.restore()


def test_an_interrupted_step_is_told_from_one_that_was_left_out():
    model = net()
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = RandomPruning(sparsity=0.5, steps=4).attach(model, trains)
    assert sparsifier.step() is False
    x, _ = batch(0)
    mse_loss(model(x), torch.zeros(8, 4)).backward()
    trains.step()
    with pytest.raises(GossamerError, match="after every optimizer.step"):
        trains.step()


class TestBadInput:
    def test_optimizer_state_of_another_shape(self):
        model = net()
        trains = torch.optim.AdamW(model.parameters())
        run_once = RandomPruning(sparsity=0.5, steps=4).attach(model, trains)
        run(model, trains, run_once, [0])
        run_once.remove()
        trains.state[model[0].weight]["exp_avg"] = torch.zeros(3, 3)
        with pytest.raises(GossamerError, match=r"exp_avg of 0.weight has shape \(3, 3\)"):
            RandomPruning(sparsity=0.5, steps=4).attach(model, trains)

    @pytest.mark.parametrize("cls", [GMP, GraNet])
    def test_a_schedule_that_ends_before_it_starts(self, cls):
        with pytest.raises(GossamerError, match="ends at 0.2 .* before it starts at 0.5"):
            cls(sparsity=0.9, start=0.5, until=0.2)

    def test_a_sparsity_that_would_empty_a_layer_is_floored_and_said(self):
        model = net()
        trains = torch.optim.SGD(model.parameters(), lr=0.1)
        method = RandomPruning(sparsity=0.999, steps=1, allocation="uniform")
        sparsifier = method.attach(model, trains)
        assert sparsifier.kept() == {"0": 1, "2": 1}
        warnings = sparsifier.finish().report().warnings
        assert any("0 would be emptied; it keeps 1" in text for text in warnings)

    def test_a_competition_empties_no_layer_and_says_so(self):
        model = net()
        with torch.no_grad():
            model[2].weight.mul_(1e-6)
        trains = torch.optim.SGD(model.parameters(), lr=1e-9)
        method = GMP(sparsity=0.9, steps=2, every=1, pattern="model", until=0.5)
        sparsifier = method.attach(model, trains)
        run(model, trains, sparsifier, [0])
        assert sparsifier.kept()["2"] == 1
        assert any("2 would be emptied" in text for text in sparsifier.warnings)

    def test_another_world_size(self):
        model = net()
        trains = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = RandomPruning(sparsity=0.5, steps=4).attach(model, trains)
        state = {**sparsifier.state_dict(), "world_size": 4}
        with pytest.raises(GossamerError, match="saved by 4 processes, now there are 1"):
            sparsifier.load_state_dict(state)

    def test_a_state_of_another_training_or_model(self):
        model = net()
        trains = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = RandomPruning(sparsity=0.5, steps=4).attach(model, trains)
        state = sparsifier.state_dict()
        sparsifier.remove()
        other = RandomPruning(sparsity=0.6, steps=4).attach(model, trains)
        with pytest.raises(GossamerError, match="another training .sparsity differs"):
            other.load_state_dict(state)
        wide = net(width=20)
        with pytest.raises(GossamerError, match="packed mask"):
            RandomPruning(sparsity=0.5, steps=4).attach(
                wide, torch.optim.SGD(wide.parameters(), lr=0.1), state=state
            )

    def test_an_optimizer_of_another_model(self):
        with pytest.raises(GossamerError, match="does not train 0.weight"):
            RandomPruning(steps=4).attach(net(), torch.optim.SGD(net().parameters(), lr=0.1))

    def test_patterns_a_method_does_not_take(self):
        with pytest.raises(GossamerError, match="granet takes no pattern 2:4"):
            GraNet(pattern="2:4")
        with pytest.raises(GossamerError, match="divisible by 3"):
            model = net()
            RigL(pattern="1:3").attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
