import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.kernels.skip_softmax import skip_softmax, skip_softmax_decode
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import choose, execute, run
from gossamer.methods.attention.index import WindowIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import kept_mass
from gossamer.methods.attention.tile_skip import ThresholdIndex
from tests.methods.attention.planted import planted


def call_of(queries, keys, rows=2, heads=4, shared=2, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, queries), (shared, keys), (shared, keys))
    query, key, value = (torch.randn(rows, *s, 16, generator=generator) for s in sizes)
    # The queries of a head ask for about the same: only then do all rows of a tile agree.
    query = 0.5 * query + 3.0 * torch.randn(1, heads, 1, 16, generator=generator)
    return Call(query, key, value, **more)


def index_of(call, layout, threshold, tile=8):
    value = torch.tensor([threshold], dtype=torch.float64)
    return ThresholdIndex(layout, call, value, (tile, tile))


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize(("queries", "past"), [(48, 0), (24, 24), (13, 30), (7, 0)])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_prompts_are_what_the_kernel_s_definition_says(threshold, queries, past, softcap):
    call = call_of(queries, queries + past, softcap=softcap)
    layout = Layout(2, queries, queries + past, query_offset=past)
    index = index_of(call, layout, threshold)
    want, count = skip_softmax(
        *(call.query, call.key, call.value, threshold),
        query_offset=past,
        softcap=softcap,
        tile=(8, 8),
        backend="reference",
    )
    torch.testing.assert_close(index.attend(call), want, atol=1e-5, rtol=1e-4)
    skipped = index.skipped.flatten(1, 2).sum(-1)
    assert torch.equal(skipped, count[..., 0].long())
    if queries == 48 and threshold != 0.01:
        assert bool(skipped.any()) == (threshold > 0)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
def test_padding_before_the_text_moves_the_first_tile(threshold):
    call, first = call_of(48, 48), torch.tensor([0, 11])
    padding = torch.arange(48) >= first[:, None]
    index = index_of(call, Layout(2, 48, 48, padding=padding), threshold)
    want, count = skip_softmax(
        *(call.query, call.key, call.value, threshold),
        first=first,
        tile=(8, 8),
        backend="reference",
    )
    got = index.attend(call)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1, :, 11:], want[1, :, 11:], atol=1e-5, rtol=1e-4)
    whole = slice(2, None)
    skipped = index.skipped.flatten(1, 2).sum(-1)
    assert torch.equal(skipped[:, :, whole], count[:, :, whole, 0].long())


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_decoding_is_what_the_kernel_s_definition_says(threshold, sinks):
    logits = torch.tensor([1.0, -1.0, 4.0, 0.5]) if sinks else None
    call = call_of(1, 61, sink_logits=logits)
    layout = Layout(2, 1, 61, query_offset=60)
    index = index_of(call, layout, threshold)
    want, count = skip_softmax_decode(
        *(call.query, call.key, call.value, threshold),
        sinks=logits,
        tile=8,
        splits=1,
        backend="reference",
    )
    torch.testing.assert_close(index.attend(call), want, atol=1e-5, rtol=1e-4)
    assert torch.equal(index.skipped[:, :, 0, 0].sum(-1), count[:, :, 0, 0].long())


def test_the_rest_of_a_static_cache_is_absent():
    call = call_of(1, 64)
    layout = Layout(2, 1, 64, query_offset=40)
    index = index_of(call, layout, 0.5)
    want, _ = skip_softmax_decode(
        call.query, call.key, call.value, 0.5, end=41, tile=8, backend="reference"
    )
    torch.testing.assert_close(index.attend(call), want, atol=1e-5, rtol=1e-4)
    assert not index.skipped[..., 6:].any()


@given(
    queries=st.integers(2, 30),
    past=st.integers(0, 20),
    threshold=st.floats(1e-3, 1.0),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_lost_mass_is_bounded_and_counts_agree(queries, past, threshold, seed):
    call = call_of(queries, queries + past, rows=1, seed=seed)
    layout = Layout(1, queries, queries + past, query_offset=past)
    index = index_of(call, layout, threshold, tile=4)
    mask = index.head_mask()
    score = torch.einsum("bgrqd,bgkd->bgrqk", call.grouped_query().double(), call.key.double())
    seen = layout.mask()[:, :, None]
    weights = (score * call.factor).masked_fill(~seen, -torch.inf).softmax(-1)
    lost = (weights * ~mask).sum(-1)
    rows = torch.arange(queries) // 4
    bound = index.skipped.sum(-1)[..., rows] * 4 * threshold
    assert (lost <= bound + 1e-6).all()
    assert index.pairs() == (int(mask.sum()), int(seen.expand_as(mask).sum()))
    want = 1 - lost.mean((0, 3)).flatten()
    torch.testing.assert_close(kept_mass(call, index), want.float(), atol=1e-4, rtol=0)
    masked = (weights * mask) / (weights * mask).sum(-1, keepdim=True)
    out = torch.einsum("bgrqk,bgke->bgrqe", masked, call.value.double()).flatten(1, 2)
    torch.testing.assert_close(index.attend(call).double(), out, atol=1e-4, rtol=1e-3)


def test_one_planted_tile_is_found_and_kept():
    plant = planted(["needle"], 256)
    layout = Layout(1, 256, 256)
    index = index_of(plant.call, layout, 1e-3, tile=16)
    kept = index.mask()[0, 0, -1].view(-1, 16).any(1)
    needle = plant.kept[0, -1].view(-1, 16).any(1)
    assert bool((kept | ~needle).all())
    assert kept.sum() < 8


def test_only_its_own_executors_run_it():
    call = call_of(16, 16)
    layout = Layout(2, 16, 16)
    index = index_of(call, layout, 0.3)
    out, ran = execute(call, index)
    assert ran == "skip"
    assert torch.equal(out, run("reference", call, index))
    with pytest.raises(ValueError, match="no mask says which"):
        choose(index, "masked", call)
    with pytest.raises(ValueError, match="no threshold"):
        choose(WindowIndex(layout, 1, 2), "skip", call)
    assert choose(index_of(call, layout, 0.0), "auto", call) == "dense"


def test_tiles_that_touch_the_diagonal_or_the_first_key_stay():
    call = call_of(32, 32)
    skipped = index_of(call, Layout(2, 32, 32), 1.0).skipped
    assert not skipped[..., 0].any()
    assert not skipped.diagonal(dim1=3, dim2=4).any()
    assert skipped.any()
    assert not skipped[..., torch.ones(4, 4).triu(1).bool()].any()


def test_rows_have_thresholds_of_their_own():
    call, layout = call_of(32, 32), Layout(2, 32, 32)
    both = ThresholdIndex(layout, call, torch.tensor([0.0, 0.5], dtype=torch.float64), (8, 8))
    assert not both.skipped[0].any()
    assert torch.equal(both.skipped[1], index_of(call, layout, 0.5).skipped[1])
    assert not both.whole
    assert math.isfinite(float(both.attend(call).sum()))
