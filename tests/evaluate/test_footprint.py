from typing import Any

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.evaluate import bitmask_bytes, footprint
from gossamer.models import find_sites
from gossamer.models.applied import Applied, Report, SiteRow, State
from tests.models.tiny import tiny_model


class Working(Applied):
    """A method that reports what a test tells it."""

    def __init__(self, model: nn.Module, report: Report, saved: int = 0, **tensors: Any) -> None:
        self.model, self._report, self._saved, self._tensors = model, report, saved, tensors
        self.simulated = report.simulated

    def _undo(self) -> None:
        self.model = None  # type: ignore[assignment]

    def state(self) -> State:
        return State({}, self._tensors)

    def report(self) -> Report:
        return self._report

    def weight_bytes_saved(self) -> int:
        return self._saved


def report(unit: str, rows: list[SiteRow], *, simulated: bool = True) -> Report:
    return Report({"method": "test"}, tuple(rows), unit, 10**6, simulated)


@torch.no_grad()
def halve(model: nn.Module) -> None:
    """Zero every second input of every site."""
    for site in find_sites(model).sites:
        site.weight(model)[:, ::2] = 0


def test_bitmask_bytes_by_hand():
    assert bitmask_bytes(100, 50, 2) == 100 + 13
    assert bitmask_bytes(100, 100, 2) == 200  # dense is never worse
    assert bitmask_bytes(16, 0, 4) == 2


def test_dense_llama_by_hand():
    # hidden 32, inner 64, 4 heads and 2 key-value heads of 8, vocabulary 128, fp32, 2 blocks.
    model = tiny_model("llama")
    prunable = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64)
    norms, table = 5 * 32, 128 * 32
    result = footprint(model)
    assert result.prunable == prunable
    assert result.parameters == prunable + norms + 2 * table
    assert result.bytes_stored == 4 * result.parameters
    # One row of the embedding, the whole head.
    assert result.bytes_moved == 4 * (prunable + norms + table + 32)
    assert result.bytes_moved_limit == result.bytes_moved
    assert (result.sparsity, result.sparsity_all, result.bytes_cache) == (0, 0, 0)
    assert not result.simulated


def test_a_tied_head_is_stored_once_and_read_whole():
    model = tiny_model("gpt2")
    result = footprint(model)
    table = model.lm_head.weight
    assert table is model.transformer.wte.weight
    assert result.bytes_stored == 4 * sum(p.numel() for p in model.parameters())
    lookups = 4 * (32 + 32)  # one row of the tokens' and of the positions' table
    rest = sum(p.numel() for p in model.transformer.h.parameters()) + 2 * 32
    assert result.bytes_moved == 4 * (rest + table.numel()) + lookups


def test_zeros_in_half_precision():
    model = tiny_model("llama").bfloat16()
    halve(model)
    result = footprint(model)
    assert result.sparsity == 0.5
    assert result.sparsity_all == pytest.approx(0.5 * result.prunable / result.parameters)
    # Stored and moved are those of dense: zeros take their place.
    assert result.bytes_stored == 2 * result.parameters
    assert result.bytes_moved - result.bytes_moved_limit == result.prunable * (2 - 1 - 1 / 8)


def test_experts_move_their_routed_share():
    model = tiny_model("mixtral")  # 2 of 4 experts
    result = footprint(model)
    stacks = [p for n, p in model.named_parameters() if ".experts." in n]
    idle = sum(p.nbytes for p in stacks) // 2
    table = model.model.embed_tokens.weight
    assert result.bytes_moved == 4 * result.parameters - idle - table.nbytes + 4 * 32
    halve(model)
    sites = find_sites(model).sites
    active = sum(s.size * (0.5 if s.expert is not None else 1) for s in sites)
    saved = result.bytes_moved - footprint(model).bytes_moved_limit
    assert saved == pytest.approx(active * (2 - 1 / 8), abs=1)


def test_simulated_pruning_moves_everything_and_stores_its_masks():
    model = tiny_model("llama")
    plain = footprint(model)
    halve(model)
    sites = find_sites(model).sites
    rows = [SiteRow(s.name, s.role, s.block, s.size, 0.5) for s in sites]
    mask = torch.zeros(1000, dtype=torch.uint8)
    result = footprint(model, Working(model, report("weights", rows), mask=mask))
    assert result.simulated
    assert result.sparsity == 0.5
    assert result.unit == "weights"
    assert result.bytes_stored == plain.bytes_stored + 1000
    assert result.bytes_moved == plain.bytes_moved
    assert result.bytes_moved_limit < plain.bytes_moved
    real = Working(model, report("weights", rows, simulated=False))
    assert footprint(model, real).bytes_moved == result.bytes_moved_limit


def test_a_stated_saving_counts():
    model = tiny_model("llama")
    site = find_sites(model).sites[0]
    row = SiteRow(site.name, site.role, 0, site.shape[1], 0.25)
    work = Working(model, report("input channels", [row]), saved=1024)
    result = footprint(model, work)
    assert result.bytes_moved - result.bytes_moved_limit == 1024
    assert result.sparsity == 0.25
    assert result.unit == "input channels"


def test_the_cache_and_attention_pairs():
    model = tiny_model("llama")
    # 2 blocks, keys and values, 2 heads of 8, 4 bytes; a text of 9 tokens reads 5 on average.
    result = footprint(model, context=9)
    assert result.bytes_cache == 5 * 2 * 2 * 2 * 8 * 4
    assert result.bytes_moved == footprint(model).bytes_moved + result.bytes_cache
    rows = [SiteRow(f"model.layers.{i}.self_attn", "attention", i, 45, 0.6) for i in range(2)]
    result = footprint(model, Working(model, report("attention pairs", rows)), context=9)
    assert result.bytes_moved - result.bytes_moved_limit == pytest.approx(0.6 * result.bytes_cache)


def test_several_methods_and_an_encoder():
    model = tiny_model("llama")
    halve(model)
    site = find_sites(model).sites[0]
    row = SiteRow(site.name, site.role, 0, site.size, 0.5)
    first = Working(model, report("weights", [row]), a=torch.zeros(8, dtype=torch.uint8))
    second = Working(model, report("input channels", [row]), b=torch.zeros(2))
    result = footprint(model, [first, second])
    assert result.bytes_stored == footprint(model).bytes_stored + 16
    assert result.sparsity == 0.5
    assert footprint(tiny_model("bert")).bytes_moved > 0


def test_bad_context():
    with pytest.raises(GossamerError, match="context is -1"):
        footprint(tiny_model("llama"), context=-1)
