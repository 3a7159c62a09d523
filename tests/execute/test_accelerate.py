"""accelerate: what runs is what measured fastest, and everything can be undone and saved."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core import GossamerError
from gossamer.execute import AcceleratedLinear, accelerate, choose, generation
from gossamer.kernels import measured
from gossamer.models import Applied, at_work
from tests.models.tiny import tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CHOICES", str(tmp_path / "choices"))
    measured.forget()
    yield
    measured.forget()


@pytest.fixture
def times(monkeypatch):
    """Milliseconds by form that every measurement gives; by rows where a call says so."""
    table: dict[str, float] = {"dense": 1.0, "bitmask": 0.4, "csr": 0.5, "fanin": 0.3}
    seen: list[tuple[str, tuple[str, ...]]] = []

    def fake(key, candidates, **_):
        seen.append((key, tuple(candidates)))
        for call in candidates.values():
            call()
        rows = int(key.rpartition(" ")[2])
        own = {name: table.get(f"{name}@{rows}", table[name]) for name in candidates}
        return measured.Choice(min(own, key=lambda name: own[name]), own)

    monkeypatch.setattr(choose, "fastest", fake)
    table.pop("unused", None)
    fake.table, fake.seen = table, seen  # type: ignore[attr-defined]
    return fake


def pruned(
    name: str = "llama", sparsity: float = 0.8, pattern: str = "layer"
) -> tuple[Any, Applied]:
    model = tiny_model(name)
    work = gossamer.method("magnitude", sparsity=sparsity, pattern=pattern).apply(model)
    return model, work


def ids(count: int = 9, batch: int = 2):
    return torch.randint(3, 100, (batch, count), generator=torch.Generator().manual_seed(0))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_each_range_runs_on_what_won_it(times):
    times.table |= {"bitmask@4": 0.2, "csr@2": 0.1, "dense@16": 0.1, "dense@5": 0.1}
    model, _ = pruned()
    with accelerate(model, rows=(1, 4, 16), report=None) as work:
        layer = work.layers["model.layers.0.mlp.up_proj"]
        # At 4 rows csr, 0.5, is worse at its worst end than the bitmask, 0.4.
        assert layer.plan == ((1, "bitmask"), (4, "bitmask"), (16, "dense"))
        assert [layer.runs(rows) for rows in (1, 2, 4, 5, 16, 400)] == [
            *("bitmask", "bitmask", "bitmask"),
            *("dense", "dense", "dense"),
        ]
        assert {row.chosen for row in work.rows} == {"bitmask", "dense"}
        assert [row.rows for row in work.rows[:3]] == ["1", "2 to 4", "5 to 16 and more"]


def test_a_form_must_win_at_both_ends_of_a_range(times):
    times.table |= {"bitmask@2": 0.99, "csr@4": 1.5}
    model, _ = pruned()
    with accelerate(model, rows=(1, 4), report=None) as work:
        assert work.layers["model.layers.0.mlp.up_proj"].plan == ((1, "bitmask"), (4, "dense"))


def test_equal_rows_are_offered_fan_in(times):
    model, _ = pruned(pattern="row")
    with accelerate(model, rows=(1,), report=None) as work:
        assert {row.chosen for row in work.rows} == {"fanin"}
    assert all("csr" not in names for _, names in times.seen)


def test_nothing_changes_but_the_arithmetic(times):
    model, _ = pruned()
    with torch.no_grad():
        expected = model(ids()).logits
    written = model.generate(ids(), max_new_tokens=6, do_sample=False)
    before = bits(model)
    with accelerate(model, report=None) as work:
        assert len(work.layers) == 14
        with torch.no_grad():
            torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(ids(), max_new_tokens=6, do_sample=False), written)
        assert same(bits(model), before)
        assert not any(layer.keeps_dense for layer in work.layers.values())
    assert same(bits(model), before)
    assert not any(isinstance(module, AcceleratedLinear) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, expected)


def test_layers_are_the_same_objects_afterwards(times):
    model, _ = pruned()
    layers = dict(model.named_modules())
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    work = accelerate(model, report=None)
    work.restore()
    work.restore()
    assert all(layers[name] is module for name, module in model.named_modules())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == weights


@pytest.mark.parametrize("keep", [None, True, False])
def test_dense_is_kept_only_where_it_runs(times, keep):
    times.table |= {"dense@64": 0.01}
    model, _ = pruned()
    with accelerate(model, rows=(1, 64), keep_dense=keep, report=None) as work:
        layers = work.layers.values()
        assert all(layer.keeps_dense == (keep is not False) for layer in layers)
        forms = sum(form.nbytes for layer in layers for form in layer.forms.values())
        assert work.bytes_stored == forms + (work.dense_bytes if keep is not False else 0)
        assert work.bytes_moved(1) == forms
        assert work.bytes_moved(64) == (work.dense_bytes if keep is not False else forms)
        assert work.dense_bytes == sum(
            4 * layer.in_features * layer.out_features for layer in layers
        )


def test_never_dense_takes_the_best_form_even_if_slower(times):
    times.table |= {"bitmask": 3.0, "csr": 2.0}
    model, _ = pruned()
    with accelerate(model, keep_dense=False, report=None) as work:
        assert {row.chosen for row in work.rows} == {"csr"}
    with accelerate(model, report=None) as work:
        assert work.layers == {}


def test_like_layers_share_a_measurement(times):
    model, _ = pruned(pattern="row")
    with accelerate(model, rows=(1,), report=None) as work:
        assert len(times.seen) == len(work.rows) == 4  # q and o, k and v, gate and up, down
        assert len({key for key, _ in times.seen}) == 4
    measured.forget()


def test_layers_of_other_sparsity_do_not(times):
    model, _ = pruned(pattern="row")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 2:] = 0
    with accelerate(model, rows=(1,), report=None) as work:
        assert len(work.rows) == 5


def test_real_measurements_are_remembered(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "_busy", lambda device: False)
    model, _ = pruned()
    with accelerate(model, rows=(1,), report=None) as work:
        rows = work.rows
    assert all(row.milliseconds["dense"] > 0 for row in rows)
    files = sorted((tmp_path / "choices").glob("*.json"))
    assert files
    measured.forget()
    monkeypatch.setattr(measured, "_time_cpu", None)  # a measurement would raise
    with accelerate(model, rows=(1,), report=None) as work:
        assert work.rows == rows


def test_dense_models_stay_as_they_are(times):
    model = tiny_model("llama")
    lines: list[str] = []
    work = accelerate(model, report=lines.append)
    assert (work.layers, work.rows, times.seen) == ({}, [], [])
    assert "15 layers with less than 20% zeros stay dense" in lines[0]
    work.restore()


def test_tied_weights_stay_tied(times):
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight[:, 3:] = 0
        expected = model(ids()).logits
    with accelerate(model, report=None) as work:
        assert list(work.layers) == ["lm_head"]
        assert work.layers["lm_head"].keeps_dense
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with torch.no_grad():
            torch.testing.assert_close(model(ids()).logits, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_one_layer_used_twice_is_replaced_twice(times):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.second = self.first
            with torch.no_grad():
                self.first.weight[:, 2:] = 0

        def forward(self, x):
            return self.second(self.first(x))

    model = Twice().eval()
    x = torch.randn(3, 32)
    expected = model(x)
    with accelerate(model, report=None):
        assert isinstance(model.first, AcceleratedLinear)
        assert model.second is model.first
        torch.testing.assert_close(model(x), expected)
    assert type(model.second) is nn.Linear


def test_what_is_no_plain_linear_is_left_with_a_line(times):
    class Own(nn.Linear):
        pass

    model, _ = pruned()
    layer = model.model.layers[0].mlp.up_proj
    own = Own(layer.in_features, layer.out_features, bias=False)
    own.weight = layer.weight
    model.model.layers[0].mlp.up_proj = own
    hooked = model.model.layers[1].mlp.up_proj
    handle = hooked.register_forward_hook(lambda *_: None)
    with accelerate(model, report=None) as work:
        assert model.model.layers[0].mlp.up_proj is own
        assert model.model.layers[1].mlp.up_proj is hooked
        text = str(work)
    assert "model.layers.0.mlp.up_proj left as it is: Own is no plain nn.Linear" in text
    assert "model.layers.1.mlp.up_proj left as it is: it has hooks" in text
    handle.remove()


def test_gpt2_is_left_with_a_line(times):
    model, _ = pruned("gpt2")
    with accelerate(model, report=None) as work:
        assert any("Conv1D is no plain nn.Linear" in note for note in work.notes)


def test_half_precision_without_a_kernel_stays_dense_with_a_line(times):
    model, _ = pruned()
    model.half()
    with accelerate(model, report=None) as work:
        assert work.layers == {}
        assert any("float32 and bfloat16, not float16" in note for note in work.notes)


def test_saving_writes_the_zeros(times, tmp_path):
    model, applied = pruned()
    before = bits(model)
    work = accelerate(model, report=None)
    applied.save(tmp_path / "sparse")
    work.restore()
    again = type(model).from_pretrained(tmp_path / "sparse")
    assert same(bits(again), before)
    accelerate(model, report=None)
    model.save_pretrained(tmp_path / "plain")
    assert same(bits(type(model).from_pretrained(tmp_path / "plain")), before)


def test_the_pruning_still_reports_its_bytes(times):
    model, applied = pruned()
    saved, rows = applied.weight_bytes_saved(), applied.report().rows
    with accelerate(model, report=None):
        assert applied.weight_bytes_saved() == saved
        assert applied.report().rows == rows


def test_undoing_the_pruning_undoes_this_first(times):
    dense = bits(tiny_model("llama"))
    model, applied = pruned()
    work = accelerate(model, report=None)
    applied.restore()
    assert same(bits(model), dense)
    assert (at_work(model), work.layers) == ((), {})


def test_what_would_corrupt_is_refused(times):
    model, _ = pruned()
    with accelerate(model, report=None):
        for act in (
            lambda: accelerate(model),
            lambda: gossamer.method("wanda").apply(model, ids(32)),
            lambda: model.to(torch.bfloat16),
            lambda: model.load_state_dict(bits(model)),
        ):
            with pytest.raises(GossamerError, match=r"restore\(\)"):
                act()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        model.to("cpu").train()
        with pytest.raises(GossamerError, match="training mode"):
            model(ids(4))
        model.eval()
    model.to(torch.bfloat16)


def test_rounding_cannot_be_undone_without_the_dense(times):
    model, _ = pruned()
    before = bits(model)
    with torch.no_grad():
        expected = model(ids()).logits
    work = accelerate(model, dtype=torch.bfloat16, keep_dense=True, report=None)
    with torch.no_grad():
        got = model(ids()).logits
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    work.restore()
    assert same(bits(model), before)
    work = accelerate(model, dtype=torch.bfloat16, report=None)
    with pytest.raises(GossamerError, match="rounded without keeping"):
        work.restore()


def test_an_error_while_measuring_leaves_the_model_as_it_was(monkeypatch):
    model, _ = pruned()
    before, count = bits(model), 0

    def fail(key, candidates, **_):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return measured.Choice("bitmask", {"dense": 2.0, "bitmask": 1.0})

    monkeypatch.setattr(choose, "fastest", fail)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, rows=(1,), report=None)
    assert same(bits(model), before)
    assert not any(isinstance(module, AcceleratedLinear) for module in model.modules())
    accelerate(model, rows=(1,), report=None).restore()


def test_quantised_models_are_refused():
    model, _ = pruned()
    model.config.quantization_config = {"bits": 4}
    with pytest.raises(GossamerError, match="quantised"):
        accelerate(model)


@pytest.mark.parametrize("rows", [(), (4, 1), (0,), (1.5,), (2, 2)])
def test_bad_ranges_are_refused(rows):
    with pytest.raises(GossamerError, match="ascending whole numbers"):
        accelerate(tiny_model("llama"), rows=rows)


def test_gradients_reach_the_inputs(times):
    layer = nn.Linear(32, 8)
    with torch.no_grad():
        layer.weight[:, 4:] = 0
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    x, y = (torch.ones(2, 32, requires_grad=True) for _ in range(2))
    with accelerate(model, report=None):
        model(x).sum().backward()
    layer(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_methods_that_skip_channels_are_called(times, monkeypatch):
    model, applied = pruned()
    row = measured.ChoiceRow("layer", (4, 4), "1", "axpy", {"dense": 2.0, "axpy": 1.0})
    called: list[object] = []

    def own(batch_sizes, progress):
        called.append(batch_sizes)
        return [row]

    monkeypatch.setattr(applied, "accelerate", own, raising=False)
    monkeypatch.setattr(applied, "decelerate", lambda: called.append("off"), raising=False)
    with accelerate(model, rows=(1, 4, 64), report=None) as work:
        assert work.rows == [row]
        assert work.layers == {}  # its kernels read the dense weights
        assert "runs the decode steps on its own kernels" in str(work)
    assert called == [(1, 4), "off"]


def test_dense_and_accelerated_are_timed_in_turn(times, monkeypatch):
    model, _ = pruned()
    work = accelerate(model, keep_dense=True, report=None)
    from gossamer.execute import timing

    ran: list[bool] = []

    def fake(own, tokens, count):
        dense = not any(isinstance(module, AcceleratedLinear) for module in own.modules())
        ran.append(dense)
        return 4.0 if dense else 2.0

    monkeypatch.setattr(timing, "_generate", fake)
    pair = generation(work, new_tokens=8, rounds=2)
    assert ran == [True, False] * 3
    assert (pair.speedup, pair.dense.median, pair.accelerated.median) == (2.0, 2.0, 4.0)
    assert "1 threads" in str(pair)
    work.restore()
    work = accelerate(model, report=None)
    with pytest.raises(GossamerError, match="keep_dense=True"):
        generation(work)
    work.restore()


def test_the_table_says_what_was_chosen(times):
    model, _ = pruned(pattern="row")
    lines: list[str] = []
    with accelerate(model, rows=(1, 4), report=lines.append):
        pass
    (text,) = lines
    assert "14 linear layers accelerated" in text
    assert "rows 2 to 4 and more: fanin 3.33x (dense 1.000, bitmask 0.400, fanin 0.300 ms)" in text
