"""Streaming equals the model's own forward, measures exactly, and leaves nothing behind."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Stat, UnsupportedModel
from gossamer.models import Block, Inputs, SiteMap, Tokens, find_sites, stream
from gossamer.models.spool import Spool, Stored
from tests.models.tiny import ARCHITECTURES, DECODERS, tiny_model

NOTHING: frozenset[Stat] = frozenset()
L2 = frozenset({Stat.INPUT_L2})


def text(rows: int = 5, length: int = 20, pad: str | None = None, seed: int = 0) -> Tokens:
    """Random tokens; two rows are padded by 7 and 3 on a side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if pad is not None:
        for row, count in ((1, 7), (rows - 1, 3)):
            mask[row, slice(0, count) if pad == "left" else slice(length - count, None)] = False
    return Tokens(ids, mask)


def data_for(name: str, pad: str | None = None) -> Tokens | Inputs:
    if name == "vit":
        generator = torch.Generator().manual_seed(0)
        return Inputs({"pixel_values": torch.randn(5, 3, 16, 16, generator=generator)})
    return text(pad=pad)


def own_outputs(model: nn.Module, sites: SiteMap, data: Tokens | Inputs) -> list[list[Tensor]]:
    """Outputs of every block for every batch in the model's own forward."""
    outputs: list[list[Tensor]] = [[] for _ in sites.blocks]
    handles = []
    for index, path in enumerate(sites.blocks):
        take = outputs[index]
        handles.append(
            model.get_submodule(path).register_forward_hook(
                lambda _m, _a, out, take=take: take.append(out if torch.is_tensor(out) else out[0])
            )
        )
    with torch.no_grad():
        for batch in data.batches(2):
            model.get_submodule(sites.base)(**batch)
    for handle in handles:
        handle.remove()
    return outputs


def assert_untouched(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


@pytest.mark.parametrize("pad", [None, "left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_run_exactly_as_in_the_model(name: str, pad: str | None) -> None:
    if name == "vit" and pad is not None:
        return
    model, data = tiny_model(name), data_for(name, pad)
    sites = find_sites(model)
    expected = own_outputs(model, sites, data)
    seen: list[list[Tensor]] = []

    def visit(block: Block) -> None:
        seen.append([block.run(batch) for batch in block.batches()])

    stream(model, data, NOTHING, visit, sites=sites, batch_size=2)
    assert len(seen) == len(sites.blocks)
    for mine, own in zip(seen, expected, strict=True):
        assert len(mine) == len(own) == 3
        assert all(torch.equal(a, b) for a, b in zip(mine, own, strict=True))
    assert_untouched(model)


def linear_inputs(model: nn.Module, sites: SiteMap, data: Tokens) -> dict[str, Tensor]:
    """What every plain matrix reads in the model's own forward, real tokens only."""
    rows: dict[str, list[Tensor]] = {}
    current: dict[str, Tensor] = {}
    handles = []
    for site in sites.sites:
        if site.expert is None:

            def hook(_m: nn.Module, args: tuple[Tensor, ...], name: str = site.name) -> None:
                flat = args[0].reshape(-1, args[0].shape[-1])
                rows.setdefault(name, []).append(flat[current["valid"]])

            handles.append(site.owner(model).register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in data.batches(2):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            current["valid"] = mask.bool().flatten()
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in rows.items()}


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_statistics_equal_a_direct_computation(name: str) -> None:
    model, data = tiny_model(name), text(pad="left")
    sites = find_sites(model)
    expected = linear_inputs(model, sites, data)
    stats: dict[str, dict[Stat, object]] = {}
    counts: dict[str, int] = {}

    def visit(block: Block) -> None:
        stats.update(block.stats)
        counts.update(block.tokens)

    needs = frozenset({Stat.INPUT_L2, Stat.HESSIAN, Stat.INPUT_MOMENTS})
    stream(model, data, needs, visit, batch_size=2)
    assert set(stats) == {site.name for site in sites.sites}
    for site_name, x in expected.items():
        assert counts[site_name] == len(x) == data.count
        got = stats[site_name]
        torch.testing.assert_close(got[Stat.INPUT_L2], x.norm(dim=0).float())
        gram = (2 / len(x) * x.T @ x).float()
        torch.testing.assert_close(got[Stat.HESSIAN], gram, rtol=1e-4, atol=1e-5)
        mean, variance = got[Stat.INPUT_MOMENTS]
        torch.testing.assert_close(mean, x.mean(0).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, x.var(0, correction=0).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_statistic(name: str, side: str) -> None:
    model, plain = tiny_model(name), text(rows=3, length=12)
    padding = torch.full((3, 5), 9)
    order = (padding, plain.input_ids) if side == "left" else (plain.input_ids, padding)
    real = (torch.zeros(3, 5), torch.ones(3, 12))
    mask = torch.cat(real if side == "left" else real[::-1], 1).bool()
    results = []
    for data in (plain, Tokens(torch.cat(order, 1), mask)):
        stats: dict[str, Tensor] = {}
        stream(
            model,
            data,
            L2,
            lambda b, s=stats: s.update({n: v[Stat.INPUT_L2] for n, v in b.stats.items()}),
            batch_size=2,
        )
        results.append(stats)
    for site_name, value in results[0].items():
        torch.testing.assert_close(results[1][site_name], value, rtol=1e-4, atol=1e-5)


def test_matrices_that_read_the_same_input_share_one_statistic() -> None:
    values: dict[str, Tensor] = {}
    stream(
        tiny_model("llama"),
        text(),
        L2,
        lambda b: values.update({n: s[Stat.INPUT_L2] for n, s in b.stats.items()}),
    )
    at = "model.layers.0."
    assert values[at + "self_attn.q_proj"] is values[at + "self_attn.v_proj"]
    assert values[at + "mlp.gate_proj"] is values[at + "mlp.up_proj"]
    assert values[at + "self_attn.q_proj"] is not values[at + "self_attn.o_proj"]
    assert not torch.equal(values[at + "self_attn.q_proj"], values[at + "mlp.gate_proj"])


def zero_values(model: nn.Module) -> None:
    for site in find_sites(model).select(["attention.o", "mlp.down"], [0]):
        site.weight(model)[::2] = 0.0


@pytest.mark.parametrize("needs", [NOTHING, L2])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_later_blocks_see_the_changed_block(name: str, needs: frozenset[Stat]) -> None:
    data = text(pad="left")
    changed = tiny_model(name)
    zero_values(changed)
    expected = own_outputs(changed, find_sites(changed), data)
    dense = tiny_model(name)
    original = own_outputs(dense, find_sites(dense), data)
    for recompute, outputs in ((True, expected), (False, original)):
        model = tiny_model(name)
        seen: list[Tensor] = []

        def visit(block: Block, model: nn.Module = model, seen: list[Tensor] = seen) -> None:
            if block.index == 0:
                zero_values(model)
            else:
                seen += [batch.hidden for batch in block.batches()]

        stream(model, data, needs, visit, batch_size=2, recompute=recompute)
        assert all(torch.equal(a, b) for a, b in zip(seen, outputs[0], strict=True))
    assert not torch.equal(expected[0][0], original[0][0])


@pytest.mark.parametrize(
    ("needs", "recompute", "passes"),
    [(L2, True, (2, 1)), (L2, False, (1, 1)), (NOTHING, True, (1, 0))],
)
def test_no_block_runs_more_often_than_it_must(
    needs: frozenset[Stat], recompute: bool, passes: tuple[int, int]
) -> None:
    model, calls = tiny_model("llama"), [0, 0]

    def count(index: int) -> None:
        calls[index] += 1

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: count(i))
    stream(model, text(rows=4), needs, lambda _: None, batch_size=1, recompute=recompute)
    # One real call of the first block tells what blocks return.
    assert calls == [4 * passes[0] + 1, 4 * passes[1]]


def test_progress_counts_every_step() -> None:
    for needs, recompute in ((L2, True), (L2, False), (NOTHING, True)):
        steps: list[tuple[int, int]] = []
        stream(
            tiny_model("llama"),
            text(),
            needs,
            lambda _: None,
            batch_size=2,
            recompute=recompute,
            progress=lambda done, total, _, steps=steps: steps.append((done, total)),
        )
        assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
        assert {total for _, total in steps} == {len(steps)}


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


def test_an_interrupt_at_any_step_leaves_the_model_as_it_was() -> None:
    model = tiny_model("mixtral")
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for stop in range(1, 10):

        def progress(done: int, _total: int, _what: str, stop: int = stop) -> None:
            if done == stop:
                raise Interrupt

        with pytest.raises(Interrupt):
            stream(model, text(), L2, lambda _: None, batch_size=2, progress=progress)
        assert_untouched(model)
        assert [module.training for module in model.modules()] == modes

    def visit(_: Block) -> None:
        raise Interrupt

    with pytest.raises(Interrupt):
        stream(model, text(), L2, visit, batch_size=2)
    assert_untouched(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_an_own_forward_of_a_block_survives() -> None:
    model = tiny_model("llama")
    block = model.model.layers[0]
    own = block.forward
    block.forward = own
    stream(model, text(), L2, lambda _: None)
    assert vars(block)["forward"] is own


def test_resident_tensors_do_not_grow_with_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []
    read = Spool.read
    for rows in (4, 16):
        live: list[weakref.ref[Tensor]] = []
        peaks.append(0)

        def counted(spool: Spool, place: Stored, live: list[weakref.ref[Tensor]] = live) -> Tensor:
            tensor = read(spool, place)
            live.append(weakref.ref(tensor))
            peaks[-1] = max(peaks[-1], sum(ref() is not None for ref in live))
            return tensor

        monkeypatch.setattr(Spool, "read", counted)

        def visit(block: Block) -> None:
            for batch in block.batches():
                block.run(batch)

        stream(tiny_model("gemma3"), text(rows=rows, pad="left"), L2, visit, batch_size=1)
        assert len(live) > 2 * rows
    assert peaks[0] == peaks[1]


def test_statistics_memory_is_that_of_one_block() -> None:
    needs = frozenset({Stat.HESSIAN})
    result = stream(tiny_model("llama"), text(), needs, lambda _: None, batch_size=2)
    # Four inputs: of q, k, v; of o; of gate, up; of down.
    assert result.stats_bytes == 4 * (3 * 32**2 + 64**2)
    assert result.batch_bytes == 4 * 2 * 20 * 32


def test_gradients_can_be_asked_for() -> None:
    shapes: dict[str, torch.Size] = {}

    def visit(block: Block) -> None:
        for name, stats in block.stats.items():
            mean, square = stats[Stat.GRADIENT]
            assert mean.shape == square.shape
            assert set(stats) in ({Stat.GRADIENT}, {Stat.GRADIENT, Stat.INPUT_L2})
            shapes[name] = mean.shape

    model = tiny_model("gpt2")
    for extra in (NOTHING, L2):
        stream(model, text(rows=2), extra | {Stat.GRADIENT}, visit)
    assert shapes == {s.name: s.shape for s in find_sites(model).sites}


def test_infinite_activations_name_the_site() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(GossamerError, match=r"layers\.1\.self_attn\.q_proj.*NaN or infinity"):
        stream(model, text(), L2, lambda _: None)
    assert_untouched(model)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused() -> None:
    model = tiny_model("llama")
    layers = model.model.layers

    class Doubled(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.self_attn, self.mlp = block.self_attn, block.mlp

        def forward(self, hidden: Tensor, **_: object) -> Tensor:
            return hidden

    sites = find_sites(model)
    model.model.layers = nn.ModuleList([layers[0], Doubled(layers[1])])
    original = model.model.layers[1].forward
    handle = model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    with pytest.raises(UnsupportedModel, match="changes hidden states before block 1"):
        stream(model, text(), L2, lambda _: None, sites=sites)
    handle.remove()
    assert model.model.layers[1].forward == original


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Iterator[object]:
        return open("/dev/full", "r+b", buffering=0)

    model = tiny_model("llama")
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(GossamerError, match=r"is full.*TMPDIR"):
        stream(model, text(), L2, lambda _: None)
    assert_untouched(model)
