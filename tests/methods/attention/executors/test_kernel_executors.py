"""Executors on our kernels: what they hand over, checked where the kernels' definitions run."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.attention.diffusion.blocks import everything
from gossamer.methods.attention.executors import EXECUTORS, choose, run
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from tests.methods.attention.test_executor import make
from tests.methods.attention.test_gather import draw


@given(
    queries=st.integers(2, 90),
    past=st.integers(0, 80),
    spare=st.integers(0, 9),
    block=st.sampled_from([(64, 64), (128, 64)]),
    columns=st.integers(0, 3),
    left=st.integers(0, 70),
    options=st.sampled_from([{}, {"softcap": 2.0}, {"sink_logits": torch.arange(4.0)}]),
    seed=st.integers(0, 50),
)
@settings(max_examples=25, deadline=None)
def test_prefill_hands_over_the_whole_call(
    queries, past, spare, block, columns, left, options, seed
):
    keys = queries + past + spare  # a static cache is longer than the text
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[0, : min(left, queries + past - 1)] = False
    call = make(2, queries, keys, dtype=torch.float64, **options)
    layout = Layout(2, queries, keys, query_offset=past, padding=padding)
    index = draw(layout, block, 2, seed, columns=min(columns, keys))
    gap = EXECUTORS["triton_prefill"].run(call, index) - run("reference", call, index)
    assert float(gap.abs().max()) < 1e-12


def test_prefill_of_a_cache_that_lost_keys_and_of_both_directions():
    call = make(1, 70, 100, dtype=torch.float64)
    for layout in (
        Layout(1, 70, 100, query_offset=40, key_offset=10),
        Layout(1, 70, 100, rule=everything, causal=False),
    ):
        index = draw(layout, (64, 64), 2, 3, share=0.6)
        gap = EXECUTORS["triton_prefill"].run(call, index) - run("reference", call, index)
        assert float(gap.abs().max()) < 1e-12


@given(
    past=st.integers(0, 120),
    spare=st.integers(0, 9),
    page=st.sampled_from([1, 4, 16]),
    left=st.integers(0, 70),
    shared=st.sampled_from([1, 2]),
    options=st.sampled_from([{}, {"softcap": 2.0}, {"sink_logits": torch.arange(4.0)}]),
    seed=st.integers(0, 50),
)
@settings(max_examples=25, deadline=None)
def test_decode_hands_over_the_whole_call(past, spare, page, left, shared, options, seed):
    keys = past + 1 + spare
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[1, : min(left, past)] = False
    call = make(2, 1, keys, dtype=torch.float64, **options)
    layout = Layout(2, 1, keys, query_offset=past, padding=padding)
    index = draw(layout, (1, page), shared, seed)
    gap = EXECUTORS["triton_decode"].run(call, index) - run("reference", call, index)
    assert float(gap.abs().max()) < 1e-12


# Uncompiled, torch takes a second for every new shape.
@pytest.mark.parametrize(
    ("queries", "past", "block", "left", "softcap"),
    [(40, 0, (16, 16), 5, None), (17, 24, (8, 4), 0, 2.0)],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_reads_the_listed_pairs(queries, past, block, left, softcap):
    keys = queries + past
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[0, : min(left, keys - 1)] = False
    call = make(2, queries, keys, softcap=softcap)
    layout = Layout(2, queries, keys, query_offset=past, padding=padding)
    index = draw(layout, block, 2, 1)
    found, expected = run("flex", call, index), run("reference", call, index)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_runs_lists_that_all_rows_share():
    call, layout = make(3, 20, 20), Layout(3, 20, 20)
    one = draw(Layout(1, 20, 20), (4, 4), 1, 1)
    index = BlockIndex(layout, one.block, one.indptr, one.indices)
    found, expected = run("flex", call, index), run("reference", call, index)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_flex_refuses_gradients_on_a_cpu():
    call = make(1, 20, 20)
    index = draw(Layout(1, 20, 20), (4, 4), 2, 1)
    assert choose(index, "flex", call) == "flex"
    call.query.requires_grad_()
    with pytest.raises(GossamerError, match="no backward pass on a CPU"):
        choose(index, "flex", call)
    with torch.no_grad():
        assert choose(index, "flex", call) == "flex"


def _index(layout: Layout, block=(64, 64)) -> BlockIndex:
    return draw(layout, block, 2, 0)


@pytest.mark.parametrize(
    ("name", "index", "reason"),
    [
        ("triton_prefill", _index(Layout(1, 64, 64)), "the kernel needs CUDA"),
        ("triton_prefill", _index(Layout(1, 64, 64), (16, 64)), "multiples of 64"),
        ("triton_prefill", _index(Layout(1, 1, 64)), "'triton_decode' is for those"),
        ("triton_decode", _index(Layout(1, 64, 64)), "takes one a row"),
        ("triton_decode", _index(Layout(1, 1, 64), (1, 16)), "the kernel needs CUDA"),
    ],
)
def test_what_cannot_run_says_why_and_auto_goes_on(name, index, reason):
    layout = index.layout
    call = make(1, layout.queries, layout.keys)
    with pytest.raises(GossamerError, match=f"backend '{name}' cannot run here: .*{reason}"):
        choose(index, name, call)
    assert not choose(index, "auto", call).startswith("triton")
    assert choose(index, "auto", call) != "flex"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_auto_takes_the_kernels():
    for queries, past, block, name in (
        (300, 200, (128, 128), "triton_prefill"),
        (1, 499, (1, 16), "triton_decode"),
    ):
        padding = torch.ones(2, 500, dtype=torch.bool, device="cuda")
        padding[0, :77] = False
        layout = Layout(
            2, queries, 500, query_offset=past, padding=padding, device=torch.device("cuda")
        )
        call = make(2, queries, 500, dtype=torch.float64)
        wide = draw(Layout(2, queries, 500, query_offset=past, padding=padding.cpu()), block, 2, 0)
        expected = run("reference", call, wide)
        moved = [x.cuda().bfloat16() for x in (call.query, call.key, call.value)]
        index = BlockIndex(layout, block, wide.indptr.cuda(), wide.indices.cuda())
        own = replace(call, query=moved[0], key=moved[1], value=moved[2])
        assert choose(index, "auto", own) == name
        found = run(name, own, index).double().cpu()
        assert float((found - expected).norm() / expected.norm()) < 1e-2
