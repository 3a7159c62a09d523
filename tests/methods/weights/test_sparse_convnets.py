"""Pruned pointwise convolutions: what is pruned, what runs where, and how it is undone."""

import copy

import pytest
import torch
from torch import nn

from gossamer import SparseConvNets
from gossamer.core import GossamerError, UnsupportedModel
from gossamer.kernels.measured import Choice
from gossamer.methods.weights.convnets import execute
from gossamer.methods.weights.convnets.blocks import InvertedResidual, SeparableBlock, convolution
from gossamer.methods.weights.convnets.sites import followers, pointwise
from gossamer.methods.weights.convnets.training import classification_loss
from gossamer.models import Inputs, at_work
from tests.models.vision import images, logits, mobilenet


def net() -> nn.Sequential:
    """A stem, a separable block, an inverted residual and a head, with normalisation that bites."""
    torch.manual_seed(0)
    made = nn.Sequential(
        *convolution(3, 8, 3),
        SeparableBlock(8, 16, stride=2),
        InvertedResidual(16, 16, expand=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    made.train()(torch.randn(16, 3, 12, 12))
    return made.eval()


def pictures(count: int = 12) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, 12, 12, generator=generator)
    return Inputs({"input": x, "labels": torch.arange(count) % 5})


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(pictures().values["input"])


def patched(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


# ---- sites --------------------------------------------------------------------------------------


def test_pointwise_convolutions_but_the_first_and_no_others():
    names = [site.name for site in pointwise(net())]
    assert names == ["3.3", "4.body.0", "4.body.6"]
    first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3))
    assert [site.name for site in pointwise(first)] == ["1"]
    with pytest.raises(UnsupportedModel, match="no 1x1 convolution"):
        pointwise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)))
    assert len(pointwise(mobilenet())) == 34


def test_a_site_is_a_view_of_the_weight():
    model = net()
    site = pointwise(model)[0]
    site.weight(model)[2, 3] = 42.0
    assert model[3][3].weight[2, 3, 0, 0] == 42.0
    assert site.shape == (16, 8)


def test_quantised_or_reparameterised_weights_are_refused():
    model = net()
    torch.nn.utils.parametrizations.weight_norm(model[3][3])
    with pytest.raises(GossamerError, match="3.3 holds .* reparameterised weights"):
        SparseConvNets().apply(model)


def test_followers_are_found_where_the_structure_shows_them():
    model = net()
    found = followers(model, pointwise(model))
    assert found["3.3"].norm is model[3][4]
    assert found["3.3"].bounds == (0.0, 6.0)
    assert found["4.body.6"].norm is model[4].body[7]
    assert found["4.body.6"].bounds == (-torch.inf, torch.inf)
    hf = mobilenet()
    found = followers(hf, pointwise(hf))
    assert all(f.norm is not None for f in found.values())
    assert {f.bounds for f in found.values()} == {(0.0, 6.0), (-torch.inf, torch.inf)}


def test_followers_that_are_watched_shared_or_without_statistics_are_left_alone():
    shared = nn.ReLU()
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 4, 1), shared,
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Hardtanh(-2, 3), nn.Conv2d(4, 4, 1), nn.GELU(),
    )  # fmt: skip
    sites = pointwise(model)
    found = followers(model, sites)
    modules = {name: f.modules for name, f in found.items()}
    assert modules == {"1": (), "3": (), "5": (), "8": (model[9], model[10]), "11": ()}
    assert found["8"].bounds == (-2.0, 3.0)
    handle = model[9].register_forward_hook(lambda *_: None)
    assert followers(model, sites)["8"].modules == ()
    handle.remove()


# ---- pruning and running ------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("pattern", ["layer", "row", "block:2x1", "block:4x1"])
def test_the_kernel_computes_what_the_pruned_model_does(pattern: str, fuse: bool):
    sparse, dense = net(), net()
    method = SparseConvNets(sparsity=0.75, pattern=pattern, fuse=fuse, execute="sparse")
    work = method.apply(sparse)
    still = SparseConvNets(sparsity=0.75, pattern=pattern, execute="dense").apply(dense)
    assert (work.simulated, still.simulated) == (False, True)
    assert patched(sparse) == (8 if fuse else 3)
    assert patched(dense) == 0
    torch.testing.assert_close(output(sparse), output(dense), rtol=0, atol=1e-5)
    assert not torch.allclose(output(sparse), output(net()), atol=1e-3)
    block = {"block:2x1": 2, "block:4x1": 4}.get(pattern, 1)
    if block > 1:
        assert {layer.block for layer in work.execution.layers.values()} == {block}
    for name, site in work.sites.items():
        kept = site.weight(sparse) != 0
        assert int(kept.sum()) == round(0.25 * site.size), name
        if pattern == "row":
            assert set(kept.sum(1).tolist()) == {site.shape[1] // 4}
    work.restore()
    assert patched(sparse) == 0


def test_the_smallest_weights_go_and_all_others_stay():
    model, before = net(), net()
    SparseConvNets(sparsity=0.5).apply(model)
    now, old = model[3][3].weight.flatten(), before[3][3].weight.flatten()
    kept = now != 0
    assert torch.equal(now[kept], old[kept])
    assert old[kept].abs().min() >= old[~kept].abs().max()
    for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        if name not in ("3.3.weight", "4.body.0.weight", "4.body.6.weight"):
            assert torch.equal(a, b), name


def test_training_the_sparse_model_on_takes_effect():
    model, dense = net(), net()
    work = SparseConvNets(sparsity=0.75, execute="sparse").apply(model)
    SparseConvNets(sparsity=0.75, execute="dense").apply(dense)
    for one in (model, dense):
        one.train()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            classification_loss(one, pictures().values).backward()
            optimizer.step()
        one.eval()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True)
    )
    torch.testing.assert_close(output(model), output(dense), rtol=0, atol=1e-5)
    work.enforce()
    assert float((model[3][3].weight == 0).float().mean()) == 0.75
    running = output(model)
    work.execution.stop()
    torch.testing.assert_close(running, output(model), rtol=0, atol=1e-5)


def test_a_copy_runs_by_itself():
    model = net()
    SparseConvNets(sparsity=0.75, execute="sparse").apply(model)
    twin = copy.deepcopy(model)
    expected = output(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(output(twin), expected, rtol=0, atol=0)


def test_moved_to_another_dtype_it_runs_dense():
    model, dense = net(), net()
    SparseConvNets(sparsity=0.75, execute="sparse").apply(model)
    SparseConvNets(sparsity=0.75, execute="dense").apply(dense)
    x = pictures().values["input"].double()
    with torch.no_grad():
        assert torch.equal(model.double()(x), dense.double()(x))
    with pytest.raises(GossamerError, match='holds torch.float64 .* execute="dense"'):
        SparseConvNets(execute="sparse").apply(net().double())
    with SparseConvNets().apply(net().double()) as work:
        assert "all dense" in str(work.report())


# ---- choosing -----------------------------------------------------------------------------------


def test_auto_follows_the_rule_of_two_thirds():
    for sparsity, sparse in ((0.6, False), (0.75, True)):
        with SparseConvNets(sparsity=sparsity).apply(net()) as work:
            assert bool(work.sparse) is sparse
            assert work.simulated is not sparse
    assert "all dense: 60" in str(SparseConvNets(sparsity=0.6).apply(net()).report())


def test_auto_with_images_takes_what_is_measured_faster(monkeypatch: pytest.MonkeyPatch):
    keys: list[str] = []

    def judged(key: str, candidates: dict, **_: object) -> Choice:
        keys.append(key)
        results = {name: call() for name, call in candidates.items()}
        torch.testing.assert_close(results["sparse"], results["dense"], rtol=0, atol=1e-5)
        fast = "16x8" in key
        return Choice("sparse" if fast else "dense", {"dense": 1.0, "sparse": 0.5 if fast else 2})

    monkeypatch.setattr(execute, "fastest", judged)
    model = net()
    work = SparseConvNets(sparsity=0.75).apply(model, pictures())
    assert work.sparse == ("3.3",)
    assert not work.simulated
    assert "on 1x8x6x6" in keys[0]
    text = str(work.report())
    assert "1 of 3 pointwise convolutions run on the sparse kernel, by measurement" in text
    assert "4.body.0: dense 1.000 ms, sparse 2.000 ms; dense runs" in text
    assert work.weight_bytes_saved() == 4 * 128 - work.execution.layers["3.3"].packed.nbytes
    state = work.state()
    again = net()
    SparseConvNets(sparsity=0.75, execute="dense").apply(again, undo=False).forget()
    back = SparseConvNets(sparsity=0.75).reattach(again, state.meta, state.tensors)
    assert back.sparse == ("3.3",)
    assert len(keys) == 3
    assert torch.equal(output(again), output(model))


def test_a_mask_that_the_weights_no_longer_have_is_refused():
    model = net()
    state = SparseConvNets(sparsity=0.75).apply(model).state()
    fresh = net()
    with pytest.raises(GossamerError, match="not zero where its saved mask removes"):
        SparseConvNets(sparsity=0.75).reattach(fresh, state.meta, state.tensors)
    assert not at_work(fresh)
    assert patched(fresh) == 0


# ---- training -----------------------------------------------------------------------------------


def test_gradual_pruning_learns_keeps_zeros_and_is_undone():
    model, before = net(), net()
    seen: list[str] = []
    work = SparseConvNets(sparsity=0.75, steps=40, lr=1e-2, batch_size=6, execute="sparse").apply(
        model, pictures(), progress=lambda done, total, what: seen.append(f"{done}/{total} {what}")
    )
    assert len(work.losses) == 40
    assert sum(work.losses[-5:]) < 0.7 * sum(work.losses[:5])
    assert seen[0] == "1/40 gradual pruning, sparsity 0.0%"
    assert seen[-1] == "40/40 gradual pruning, sparsity 75.0%"
    assert work.report().sparsity == pytest.approx(0.75)
    assert not torch.equal(model[6 + 1].weight, before[6 + 1].weight)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    work.restore()
    for (name, a), (_, b) in zip(
        model.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert torch.equal(output(model), output(before))


def test_an_interrupt_while_training_leaves_the_model_as_it_was():
    model, before = net(), net()

    def stop(done: int, *_: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    for undo in (True, False):
        with pytest.raises(KeyboardInterrupt):
            SparseConvNets(steps=9, batch_size=4).apply(model, pictures(), undo=undo, progress=stop)
        assert not at_work(model)
        assert torch.equal(output(model), output(before))


def test_a_transformers_model_trains_without_a_trace_in_its_configuration():
    model = mobilenet()
    dense, config = logits(model), model.config.to_json_string()
    with SparseConvNets(steps=2, batch_size=4, execute="sparse").apply(model, images()) as work:
        assert len(work.sparse) == 34
        assert not torch.allclose(logits(model), dense)
    assert torch.equal(logits(model), dense)
    assert model.config.to_json_string() == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseConvNets(pattern="2:4"), "pattern is 2:4; the kernel reads"),
        (lambda: SparseConvNets(pattern="model"), "pattern is model"),
        (lambda: SparseConvNets(pattern="block:4x4"), "pattern is block:4x4"),
        (lambda: SparseConvNets(execute="fast"), "unknown execution 'fast'"),
        (lambda: SparseConvNets(steps=-1), "steps is -1"),
        (lambda: SparseConvNets(lr=0.0), "lr is 0"),
        (lambda: SparseConvNets(steps=3).apply(net()), "needs data with labels"),
        (
            lambda: SparseConvNets(steps=3).apply(
                net(), Inputs({"input": torch.zeros(1, 3, 4, 4)})
            ),
            "needs data with labels",
        ),
        (lambda: SparseConvNets().apply(net(), 3.5), "data are float; give Inputs"),
        (
            lambda: SparseConvNets(pattern="block:4x1").apply(
                nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1))
            ),
            "1: pattern block:4x1 needs a matrix whose sides are divisible",
        ),
        (
            lambda: SparseConvNets(steps=2).apply(
                net(), Inputs({"input": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(4)})
            ),
            "class numbers as labels; labels are torch.float32",
        ),
    ],
)
def test_what_cannot_be_done_is_said(make, message: str):
    with pytest.raises(GossamerError, match=message):
        make()


def test_weights_that_are_not_finite_are_named():
    model = net()
    with torch.no_grad():
        model[4].body[6].weight[0, 0] = torch.nan
    with pytest.raises(GossamerError, match="4.body.6 holds NaN"):
        SparseConvNets().apply(model)
    assert not at_work(model)
