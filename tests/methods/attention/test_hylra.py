import pytest

from gossamer.core import GossamerError
from gossamer.methods.attention.hylra import HyLRA
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
