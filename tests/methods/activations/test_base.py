"""The shared component: greedy on real blocks, grouped heads, and the weighted score."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from gossamer.core import QuantileSketch, Stat
from gossamer.methods.activations.base import Thresholded
from gossamer.methods.activations.calibration import BlockError, trial_data
from gossamer.methods.activations.greedy import weighted_mean
from gossamer.methods.activations.teal import TEAL
from gossamer.models import Tokens, find_sites, stream
from tests.models.tiny import tiny_model

torch.set_num_threads(1)


def _tokens(rows: int = 4, length: int = 32, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (rows, length), generator=generator))


@dataclass(frozen=True, kw_only=True)
class Weighted(Thresholded):
    """|x_j| times the column norm, at two places: a configuration as short as it gets."""

    card: ClassVar = TEAL.card
    roles: ClassVar = ("mlp.down", "experts.down")

    def channel_weight(self, site, weight):
        return torch.linalg.vector_norm(weight.float(), dim=0)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral"])
def test_greedy_meets_the_target_in_every_block_and_is_no_worse_than_uniform(name: str) -> None:
    model, data = tiny_model(name), _tokens()
    options = {"sparsity": 0.5, "step": 0.2}
    greedy = TEAL(allocation="greedy", **options).apply(model, data)
    greedy.restore()
    uniform = TEAL(**options).apply(model, data)
    uniform.restore()
    assert uniform.report().sparsity == pytest.approx(0.5)
    assert greedy.report().sparsity == pytest.approx(0.5)
    better = []

    def compare(block) -> None:
        with BlockError(model, block, 1) as error:
            here = [
                [g for g in applied.gates.values() if g.block == block.index]
                for applied in (greedy, uniform)
            ]
            shares = {g.name: g.sparsity for g in here[0]}
            assert weighted_mean(shares, {g.name: g.size for g in here[0]}) == pytest.approx(0.5)
            assert len(set(shares.values())) > 1
            better.append(error(here[0]) / error(here[1]))

    stream(model, trial_data(data), frozenset(), compare, recompute=False)
    assert all(ratio <= 1 + 1e-6 for ratio in better)
    assert min(better) < 0.99


def test_the_block_error_is_the_norm_over_the_last_quarter_of_the_sequence() -> None:
    model, data = tiny_model("llama"), _tokens(3, 16)
    applied = TEAL(sparsity=0.5).apply(model, data)
    gates = [g for g in applied.gates.values() if g.block == 0]
    applied.restore()
    block = model.model.layers[0]
    hidden: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda m, a, out: hidden.append(out.detach()))
    model(data.input_ids)
    with TEAL(sparsity=0.5).apply(model, data):
        hidden.clear()
        model(data.input_ids)
    masked = hidden.pop()
    hidden.clear()
    model(data.input_ids)
    handle.remove()
    off = (masked - hidden.pop())[:, -4:]
    found: list[float] = []

    def visit(seen) -> None:
        if seen.index == 0:
            with BlockError(model, seen, 1) as error:
                found.append(error(gates))

    stream(model, data, frozenset(), visit, recompute=False, batch_size=2)
    expected = off.double().square().sum(1).sqrt().mean()
    assert found[0] == pytest.approx(float(expected), rel=1e-4)


def test_sizes_of_grouped_heads_come_from_the_shapes() -> None:
    applied = TEAL(sparsity=0.5).apply(tiny_model("llama"), _tokens())
    sizes = {g.role: g.size for g in applied.gates.values()}
    assert sizes["attention.k"] * 2 == sizes["attention.v"] * 2 == sizes["attention.q"]
    assert sizes["mlp.down"] == 2 * sizes["attention.q"]
    applied.restore()


def test_thresholds_are_quantiles_of_the_score_of_each_input() -> None:
    model, data = tiny_model("llama"), _tokens()
    seen: list[torch.Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    model(data.input_ids)
    handle.remove()
    score = seen[0].abs()
    norms = torch.linalg.vector_norm(down.weight.detach(), dim=0)
    plain = TEAL(sparsity=0.3).apply(model, data)
    plain.restore()
    name = "model.layers.1.mlp.down_proj"
    assert float(plain.gates[name].cut) == pytest.approx(float(score.quantile(0.3)), rel=3e-3)
    weighted = Weighted(sparsity=0.3).apply(model, data)
    assert set(weighted.gates) == {"model.layers.0.mlp.down_proj", name}
    threshold = float((score * norms).quantile(0.3))
    expected = threshold / norms
    torch.testing.assert_close(weighted.gates[name].cut, expected, rtol=3e-3, atol=0)
    measured = weighted.measure(_tokens(seed=1))
    weighted.restore()
    assert all(share == pytest.approx(0.3, abs=0.02) for share in measured.values())


def test_the_weighted_score_reaches_into_stacked_experts() -> None:
    model = tiny_model("mixtral")
    with Weighted(sparsity=0.3).apply(model, _tokens()) as applied:
        measured = applied.measure(_tokens(seed=1))
        assert {gate.cut.numel() for gate in applied.gates.values()} == {64}
    assert all(share == pytest.approx(0.3, abs=0.03) for share in measured.values())


def test_experts_of_a_layer_share_one_sketch_of_all_their_tokens() -> None:
    model, data = tiny_model("mixtral"), _tokens()
    counts: dict[str, int] = {}

    def visit(block) -> None:
        for site in block.sites:
            sketch = block.stats[site.name][Stat.INPUT_QUANTILES]
            assert isinstance(sketch, QuantileSketch)
            if site.role == "experts.down":
                counts[str(block.index)] = counts.get(str(block.index), 0) + sketch.tokens

    stream(model, data, frozenset({Stat.INPUT_QUANTILES}), visit, recompute=False)
    assert set(counts.values()) == {2 * data.count}


def test_works_in_bfloat16() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with Weighted(sparsity=0.5).apply(model, _tokens()) as applied:
        measured = applied.measure(_tokens(seed=1))
        assert applied.weight_bytes_saved() == pytest.approx(
            2 * 0.5 * applied.report().size, rel=0.1
        )
    assert all(share == pytest.approx(0.5, abs=0.03) for share in measured.values())
    assert find_sites(model).sites[0].weight(model).dtype == torch.bfloat16
