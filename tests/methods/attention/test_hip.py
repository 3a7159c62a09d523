import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.hip import HiP
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import kept_mass
from gossamer.methods.attention.memory import LayerState
from tests.methods.attention.planted import planted, probabilities

SMALL = {"budget_tokens": 16, "block_size": 8, "local": 8, "sink": 2, "refresh": 3}


def selector(**fields):
    return HiP(**{**SMALL, **fields}).plan(torch.nn.Module(), None, 0)


def test_window_and_sinks_are_always_read():
    plant = planted(["noise"], 100, repeat=2)
    for start in (0, 37):
        call = Call(plant.query[:, :, start:], plant.key, plant.value)
        layout = Layout(1, 100 - start, 100, query_offset=start)
        mask = selector().select(call, layout, 0).mask()[0, 0]
        for q in range(100 - start):
            at = q + start
            assert mask[q, max(0, at - 7) : at + 1].all()
            assert mask[q, : min(2, at + 1)].all()


def test_budget_is_what_a_query_reads_beside_them():
    plant = planted(["noise", "smooth"], 256)
    mask = selector(key_block=2).select(plant.call, Layout(1, 256, 256), 0).mask()[0]
    read = mask[:, 128:].sum(-1)
    assert (read <= 16 + 8 + 8 + 4 + 2).all()
    assert (read >= 16).all()


def test_smooth_keys_are_found_better_than_by_a_window():
    plant = planted(["smooth"], 512, width=64)
    layout = Layout(1, 512, 512)
    fields = {"budget_tokens": 64, "block_size": 1, "key_block": 1}
    index = selector(**fields).select(plant.call, layout, 0)
    mine = float(kept_mass(plant.call, index))
    mask = index.mask()[0, 0]
    at = torch.arange(512)
    near = (at[:, None] - at < int(mask.sum(1).float().mean())) & (at <= at[:, None])
    window = float((probabilities(plant)[0, 0] * near).sum(-1).mean())
    assert mine > window + 0.3


def test_decoding_searches_anew_after_some_tokens_and_moves_its_window():
    plant = planted(["needle"], 64, repeat=2)
    state, chosen = LayerState(), []
    for end in range(40, 48):
        call = Call(
            plant.query[:, :, end - 1 : end],
            plant.key[:, :, :end],
            plant.value[:, :, :end],
            state=state,
        )
        layout = Layout(1, 1, end, query_offset=end - 1)
        index = selector().select(call, layout, 0)
        assert index.mask()[0, 0, 0, end - 8 :].all()
        chosen.append(state.seen)
    assert chosen == [40, 40, 40, 43, 43, 43, 46, 46]
    prompt = Call(plant.query, plant.key, plant.value, state=state)
    selector().select(prompt, Layout(1, 64, 64), 0)
    assert state.seen == 0


def test_tokens_to_verify_share_one_search():
    plant = planted(["needle"], 64)
    call = Call(plant.query[:, :, 60:], plant.key, plant.value)
    index = selector(budget_tokens=8).select(call, Layout(1, 4, 64, query_offset=60), 0)
    mask = index.mask()[0, 0]
    assert mask.shape == (4, 64)
    assert mask[torch.arange(4), torch.arange(60, 64)].all()
    assert mask.sum() < 4 * 40


def test_first_layers_stay_full_by_default():
    assert HiP().dense_layers == 3


@pytest.mark.parametrize("name", ["budget_tokens", "block_size", "key_block", "refresh", "local"])
def test_impossible_parameters_are_refused(name):
    with pytest.raises(GossamerError, match=name):
        HiP(**{name: 0})


@torch.no_grad()
def test_remembered_blocks_move_with_a_cache_that_drops_its_oldest_keys():
    selector = HiP(budget_tokens=1 << 20, block_size=4, refresh=4, local=1, sink=1).plan(
        None, None, 0
    )
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 12, 4, generator=generator)
    state = LayerState()
    for step in range(3):
        # Of 12 keys the first ones are padding, so the blocks do not reach to the front.
        padding = torch.ones(1, 24 + step, dtype=torch.bool)
        padding[:, :16] = False
        layout = Layout(1, 1, 12, 23 + step, key_offset=12 + step, padding=padding)
        call = Call(query[:, :, :1], key, key, state=state)
        index = selector.select(call, layout, 0)
        assert torch.equal(index.mask(), layout.mask())
