import pytest
import torch

from gossamer.methods.attention.index import BlockIndex, FullIndex, WindowIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import Tally, kept_mass
from gossamer.methods.attention.oracle_top_k import OracleTopK
from gossamer.methods.attention.streaming_llm import StreamingLLM
from gossamer.models import Tokens
from tests.methods.attention.test_executor import make
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def by_hand(call, index):
    """Mean kept probability per head, in fp64, over queries that see a key."""
    shared, repeat = call.groups
    query = call.grouped_query().double()
    score = torch.einsum("bgrqd,bgkd->bgrqk", query, call.key.double()) * call.factor
    seen = index.layout.mask().expand(len(call.key), -1, -1, -1)
    share = score.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    kept = (share * index.mask()[:, :, None]).sum(-1)
    rows = seen.any(-1)[:, :, None].expand(-1, shared, repeat, -1)
    return ((kept * rows).sum((0, 3)) / rows[:, :1, :1].sum()).flatten()


def test_mass_is_the_kept_probability():
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :5] = False
    call, layout = make(2, 12, 12), Layout(2, 12, 12, padding=padding)
    for index in (WindowIndex(layout, 1, 3), WindowIndex(layout, 0, 1), FullIndex(layout)):
        want = by_hand(call, index).float()
        torch.testing.assert_close(kept_mass(call, index), want)
    torch.testing.assert_close(kept_mass(call, FullIndex(layout)), torch.ones(4))


def test_a_sample_of_the_queries_has_the_last_one():
    call, layout = make(1, 9, 9), Layout(1, 9, 9)
    last = layout.mask().clone()
    last[..., :-1, :] = False
    only = BlockIndex.from_blocks(layout, last.expand(1, 2, -1, -1), (1, 1))
    assert float(kept_mass(call, only, queries=1).min()) == pytest.approx(1.0)
    assert float(kept_mass(call, only, queries=9).min()) == pytest.approx(1 / 9)


def test_a_learned_sink_takes_no_share():
    call = make(1, 6, 6, sink_logits=torch.full((4,), 3.0))
    torch.testing.assert_close(kept_mass(call, FullIndex(Layout(1, 6, 6))), torch.ones(4))


def test_tally_sums_calls_by_layer_and_phase():
    tally = Tally({"prefill"})
    tally.add(0, make(1, 4, 4), WindowIndex(Layout(1, 4, 4), 0, 1))
    tally.add(0, make(1, 4, 4), FullIndex(Layout(1, 4, 4)))
    tally.add(1, make(1, 1, 4), FullIndex(Layout(1, 1, 4, query_offset=3)))
    (row,) = tally.kept()
    assert (row.layer, row.phase, row.kept, row.total) == (0, "prefill", 14, 20)
    assert 0.5 < row.mass < 1.0
    assert row.density == 0.7


def test_measured_pairs_of_a_static_method_are_its_computed_ones():
    model = tiny_model("llama")
    tokens = Tokens(random_tokens().input_ids[:1], random_tokens().attention_mask[:1])
    with StreamingLLM(sink=1, recent=5, length=24).apply(model) as work:
        rows = work.measure(tokens, decode=0)
        assert [(row.kept, row.total) for row in rows] == [work._static(24, i) for i in (0, 1)]
        assert not work.ran


def test_reports_show_what_was_measured_and_are_saved():
    model = tiny_model("llama")
    with OracleTopK(sparsity=0.5).apply(model, random_tokens()) as work:
        report = work.report()
        assert 0.4 < report.sparsity < 0.55
        assert any("keeps" in note and "prefill" in note for note in report.notes)
        assert any("decode" in note for note in report.notes)
        state = work.state()
    with work.method.reattach(model, state.meta, state.tensors) as again:
        assert again.measured == work.measured
    with OracleTopK().apply(model) as bare:
        assert any("not measured" in note for note in bare.report().notes)
        assert bare.report().sparsity == 0.0
