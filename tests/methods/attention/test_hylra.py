import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.decoding.choose import Amount
from gossamer.methods.attention.decoding.profile import Profiler, best_anchors
from gossamer.methods.attention.decoding.reuse import ReuseSelector
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.hylra import HyLRA
from gossamer.methods.attention.layout import Layout
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def test_costs_count_the_keys_read():
    assert HyLRA(sparsity=0.75).costs(1000).sparse == 0.25
    assert HyLRA(budget_tokens=100).costs(1000).sparse == 0.1
    assert HyLRA(budget_tokens=100).costs(50).sparse == 1.0


def test_thresholds_decide_who_reuses():
    for overlap, table in ((0.0, (0, 0)), (1.0, (0, 1))):
        method = HyLRA(tolerance=2.0, overlap=overlap, unlike=0.0)
        with method.apply(tiny_model("llama"), random_tokens()) as work:
            assert work.selector.table == table
            assert method.replan(work.state().meta, {}).table == table


def test_layers_kept_full_are_nobody_s_anchor():
    method = HyLRA(tolerance=2.0, overlap=0.0, unlike=0.0, dense_layers=1)
    with method.apply(tiny_model("llama"), random_tokens()) as work:
        assert work.selector.table == (0, 1)


LADDER = (0.25, 0.5, 0.75, 0.9, 0.95)


def layers_that_agree(groups, stir, seed=0):
    """One call per layer, at the last of 200 keys; those of a group score keys nearly alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    for size in groups:
        query, key = 4.0 * normal(8, 2, 1, 32), normal(8, 2, 200, 32)
        for _ in range(size):
            yield Call(query, key + stir * normal(*key.shape), normal(*key.shape))


def density_at(sparsity, groups, stir):
    method, layout = HyLRA(sparsity=sparsity), Layout(8, 1, 200, query_offset=199)
    profiler = Profiler(Amount(sparsity, None), 1)
    for layer, call in enumerate(layers_that_agree(groups, stir, seed=1)):
        profiler.visit(call, layout, layer)
    table = best_anchors(profiler.found, method.costs(200))
    selector, step, shares = ReuseSelector(table, sparsity, None), {}, []
    for layer, call in enumerate(layers_that_agree(groups, stir)):
        own = Call(call.query, call.key, call.value, step=step)
        kept, total = selector.select(own, layout, layer).pairs()
        shares.append(kept / total)
    return sum(shares) / len(shares)


def test_density_falls_with_the_amount():
    densities = [density_at(sparsity, (1, 3, 1, 3), 0.1) for sparsity in LADDER]
    assert densities == sorted(densities, reverse=True)
    # Half of the layers reuse, at every amount.
    expected = [0.5 + 0.5 * (1 - sparsity) for sparsity in LADDER]
    assert densities == pytest.approx(expected, abs=0.01)


def test_layers_that_agree_by_chance_stay_full_at_every_amount():
    assert [density_at(sparsity, (1,) * 6, 0.0) for sparsity in LADDER] == [1.0] * len(LADDER)


def test_a_table_without_reuse_says_so():
    assert HyLRA().replan({"table": [0, 1, 2]}, {}).notes() == (
        "all 3 layers read all keys: none may reuse another's choice",
    )


def test_progress_is_told():
    steps = []
    work = HyLRA(prompts=3).apply(
        tiny_model("llama"),
        random_tokens(),
        progress=lambda done, total, what: steps.append((done, total)),
    )
    work.restore()
    assert steps[:3] == [(1, 3), (2, 3), (3, 3)]


def test_bad_input():
    with pytest.raises(GossamerError, match="overlap is 1.5; give a number from 0 to 1.0"):
        HyLRA(overlap=1.5)
    with pytest.raises(GossamerError, match="give it data"):
        HyLRA().apply(tiny_model("llama"))
