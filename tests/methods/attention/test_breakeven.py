import torch

from gossamer.methods.attention import breakeven
from gossamer.methods.attention.breakeven import BreakEven, Timing
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.oracle_top_k import OracleTopK
from tests.methods.attention.test_executor import make
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def clocked(monkeypatch, times):
    ticks = iter(times)
    monkeypatch.setattr(breakeven, "_now", lambda call: next(ticks))


def use(even, call, layout):
    with even.timed(call, layout) as chosen:
        chosen()


def test_the_second_call_of_a_kind_decides(monkeypatch):
    call, layout, even = make(1, 8, 8), Layout(1, 8, 8), BreakEven()
    # begun, chosen, ended, dense done; first a warm-up that counts for nothing.
    clocked(monkeypatch, [0, 9, 99, 100, 0, 2, 5, 9])
    use(even, call, layout)
    assert not even.timings
    use(even, call, layout)
    assert list(even.timings.values()) == [Timing(dense=4, select=2, attend=3)]
    assert even.prefers_dense(call, layout)
    use(even, call, layout)
    assert "runs full" in even.notes()[0]
    assert "prefill at 8 tokens" in even.notes()[0]


def test_kinds_are_told_apart(monkeypatch):
    even = BreakEven()
    clocked(monkeypatch, [0, 1, 2, 9] * 2)
    for _ in range(2):
        use(even, make(1, 8, 8), Layout(1, 8, 8))
    assert not even.prefers_dense(make(1, 8, 8), Layout(1, 8, 8))
    assert len(even.timings) == 1
    decode = Layout(1, 1, 8, query_offset=7)
    assert not even.prefers_dense(make(1, 1, 8), decode)
    clocked(monkeypatch, [0, 1, 2, 2] * 2)
    for _ in range(2):
        use(even, make(1, 1, 8), decode)
    assert even.prefers_dense(make(1, 1, 8), decode)
    assert not even.prefers_dense(make(2, 1, 8), decode)


def test_the_fastest_backend_runs_full_attention_where_choosing_costs_more():
    """The oracle computes all scores to choose: it can only lose."""
    model = tiny_model("llama")
    ids = random_tokens().input_ids
    with torch.no_grad():
        dense = model(ids).logits
        with OracleTopK(sparsity=0.5, backend="fastest").apply(model, random_tokens()) as work:
            got = [model(ids).logits for _ in range(2)][1]
            assert work.ran["dense"] >= 1
            assert any("runs full" in note for note in work.report().notes)
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-4)
