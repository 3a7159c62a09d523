"""Windows by head: the mask in words, and the executor against the definition."""

import pytest
import torch

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import choose, execute, run
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.spans.index import SpanIndex, logical_lengths


def padded(length, starts):
    padding = torch.ones(len(starts), length, dtype=torch.bool)
    for row, start in enumerate(starts):
        padding[row, :start] = False
    return padding


LAYOUTS = {
    "plain": Layout(2, 20, 20),
    "padded": Layout(2, 20, 20, padding=padded(20, (0, 6))),
    "chunk": Layout(2, 7, 20, query_offset=13),
    "decode": Layout(2, 1, 20, query_offset=19, padding=padded(20, (3, 0))),
    "own window": Layout(2, 20, 20, causal=False, rule=lambda b, h, q, k: (k <= q) & (q - k < 9)),
}
RECENT = {"one": ((3, 20),), "by row": ((3, 20), (5, 2)), "alike": ((4, 4),)}


def call(layout, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(heads, count, width):
        return torch.randn(2, heads, count, width, dtype=dtype, generator=generator)

    return Call(draw(4, layout.queries, 8), draw(2, layout.keys, 8), draw(2, layout.keys, 6))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("recent", RECENT)
def test_the_mask_is_sinks_and_each_heads_latest(name, recent):
    layout, spans = LAYOUTS[name], RECENT[recent]
    mask = SpanIndex(layout, 2, spans).mask()
    own = layout.mask()
    for row in range(2):
        first = 0 if layout.padding is None else int(layout.padding[row].int().argmax())
        for head in range(2):
            span = spans[row % len(spans)][head]
            for q in range(layout.queries):
                at = layout.query_offset + q
                for k in range(layout.keys):
                    near = at - k < span or k - first < 2
                    want = near and bool(own[row % len(own), 0, q, k]) and at >= first
                    assert bool(mask[row % len(mask), head, q, k]) == want


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("recent", RECENT)
def test_the_executor_is_the_definition(name, recent):
    layout = LAYOUTS[name]
    index, it = SpanIndex(layout, 2, RECENT[recent]), call(layout)
    got, want = run("spans", it, index), run("reference", it, index)
    real = torch.ones(2, layout.queries, dtype=torch.bool)
    if layout.padding is not None:
        real = layout.padding[:, layout.query_offset : layout.query_offset + layout.queries]
    got, want = got.transpose(1, 2)[real], want.transpose(1, 2)[real]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_long_prompts_run_by_windows_and_full_spans_run_dense():
    layout = Layout(1, 512, 512)
    assert choose(SpanIndex(layout, 4, ((32, 512),))) == "spans"
    assert SpanIndex(layout, 4, ((512, 512),)).whole
    assert choose(SpanIndex(layout, 4, ((512, 512),))) == "dense"


def test_packed_sequences_fall_back_to_a_mask():
    document = torch.tensor([0] * 8 + [1] * 12)
    layout = Layout(
        2,
        20,
        20,
        causal=False,
        regular=False,
        rule=lambda b, h, q, k: (k <= q) & (document[q] == document[k]),
    )
    it, index = call(layout), SpanIndex(layout, 1, ((3, 5),))
    got, name = execute(it, index)
    assert name == "masked"
    torch.testing.assert_close(got, run("reference", it, index), atol=1e-6, rtol=1e-6)


def test_lengths_are_those_of_the_real_tokens():
    assert logical_lengths(LAYOUTS["plain"]) == (20,)
    assert logical_lengths(LAYOUTS["padded"]) == (20, 14)
    assert logical_lengths(LAYOUTS["chunk"]) == (20,)
    assert logical_lengths(Layout(2, 20, 20, padding=padded(20, (6, 6)))) == (14,)
