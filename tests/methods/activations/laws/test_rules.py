"""Every rule goes from nothing removed to everything, and removes by its own score."""

import pytest
import torch

from gossamer.methods.activations.calibration import token_loss
from gossamer.methods.activations.laws.rules import gates_by
from gossamer.methods.activations.levels import cett_curves
from gossamer.models import Tokens, find_sites
from tests.models.tiny import tiny_model

torch.set_num_threads(1)


def _tokens(seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (6, 24), generator=generator))


def _seen(model, path: str, tokens: Tokens, behind: bool) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    module = model.get_submodule(path)

    def look(_, args, out=None):
        rows.append((args[0] if out is None else out).detach().flatten(0, 1))

    handle = (
        module.register_forward_hook(look) if behind else module.register_forward_pre_hook(look)
    )
    with torch.no_grad():
        model(tokens.input_ids)
    handle.remove()
    return rows[0].abs()


@pytest.mark.parametrize("rule", ["cett", "topk", "fat", "plain", "unweighted"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_level_goes_from_nothing_to_everything(rule, name) -> None:
    model, tokens = tiny_model(name), _tokens()
    sites = find_sites(model)
    gates_at = gates_by(rule, model, sites, tokens)
    removed = []
    for level in (0.0, 0.3, 0.6, 1.0):
        _, shares = token_loss(model, sites, tokens, gates_at(level))
        removed.append(sum(shares.values()) / len(shares))
    assert removed[0] == 0
    assert removed == sorted(removed)
    assert 0.02 < removed[1] < removed[2] < 0.98
    assert removed[3] > 0.98


def test_one_threshold_serves_all_layers() -> None:
    model, tokens = tiny_model("llama"), _tokens()
    sites = find_sites(model)
    for rule, path, behind in (
        ("fat", "model.layers.{}.mlp.act_fn", True),
        ("plain", "model.layers.{}.mlp.down_proj", False),
    ):
        gates = gates_by(rule, model, sites, tokens)(0.4)
        values = [_seen(model, path.format(i), tokens, behind) for i in (0, 1)]
        pooled = torch.cat([v.flatten() for v in values])
        cuts = {round(float(gate.cut), 6) for gate in gates}
        assert len(cuts) == 1
        assert cuts.pop() == pytest.approx(float(pooled.quantile(0.4)), rel=5e-3)
        for gate, value in zip(gates, values, strict=True):
            share = float((value <= gate.cut).float().mean())
            assert gate.sparsity == pytest.approx(share, abs=5e-3)


def test_top_k_keeps_the_same_count_for_every_token_and_layer() -> None:
    model, tokens = tiny_model("llama"), _tokens()
    gates = gates_by("topk", model, find_sites(model), tokens)(0.25)
    assert [gate.keep for gate in gates] == [48, 48]
    rows = _seen(model, "model.layers.1.mlp.act_fn", tokens, True)
    removed = gates[1].removes(rows)
    assert set(removed.sum(1).tolist()) == {16}
    assert float(rows[removed].max()) <= float(rows.max())
    for row, gone in zip(rows, removed, strict=True):
        assert float(row[gone].max()) <= float(row[~gone].min())


def test_cett_is_the_shared_error_level() -> None:
    model, tokens = tiny_model("llama"), _tokens()
    ours = gates_by("cett", model, find_sites(model), tokens)(0.2)
    theirs = cett_curves(model, tokens).gates(0.2)
    assert [g.name for g in ours] == [g.name for g in theirs]
    assert all(torch.equal(a.cut, b.cut) for a, b in zip(ours, theirs, strict=True))


def test_without_norms_the_level_is_still_the_error() -> None:
    model, tokens = tiny_model("llama"), _tokens()
    gates = gates_by("unweighted", model, find_sites(model), tokens)(0.3)
    for i, gate in enumerate(gates):
        down = model.get_submodule(f"model.layers.{i}.mlp.down_proj")
        rows: list[torch.Tensor] = []
        handle = down.register_forward_pre_hook(lambda _, a, r=rows: r.append(a[0].detach()))
        with torch.no_grad():
            model(tokens.input_ids)
        handle.remove()
        a = rows[0].flatten(0, 1)
        assert gate.cut.numel() == 1
        lost = a.masked_fill(a.abs() > gate.cut, 0) @ down.weight.T
        error = (lost.norm(dim=1) / (a @ down.weight.T).norm(dim=1)).mean()
        assert float(error.detach()) == pytest.approx(0.3, abs=0.02)
