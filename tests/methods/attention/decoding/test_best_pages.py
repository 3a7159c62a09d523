import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.methods.attention.decoding.best_pages import BestPages
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import EXECUTORS, choose, run
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.quest import PageSelector


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(past, spare=0, batch=1, seed=0, page=4, keep=3, **options):
    keys = past + 1 + spare
    call = Call(
        normal(batch, 4, 1, 8, seed=seed),
        normal(batch, 2, keys, 8, seed=seed + 1),
        normal(batch, 2, keys, 6, seed=seed + 2),
        **options,
    )
    layout = Layout(batch, 1, keys, query_offset=past)
    score = normal(batch, 2, past // page, seed=seed + 3).float().round(decimals=0)  # many ties
    return call, BestPages(layout, page, score, min(keep, past // page + 1))


def test_lists_hold_the_best_the_own_and_of_equals_the_earlier():
    score = torch.tensor([[[1.0, 3.0, 3.0, 2.0, 3.0]]])
    index = BestPages(Layout(1, 1, 22, query_offset=21), 4, score, 3)
    assert index.indices.tolist() == [1, 2, 5]
    assert index.indptr.tolist() == [[[0, 3]]]
    assert index.mask()[0, 0, 0].nonzero()[:, 0].tolist() == [*range(4, 12), 20, 21]
    # The query's own page is half full: 8 + 2 of 22 keys.
    assert index.pairs() == (10, 22)
    assert not index.whole
    assert BestPages(index.layout, 4, score, 6).whole


@given(
    past=st.integers(1, 90),
    spare=st.integers(0, 5),
    page=st.sampled_from([1, 2, 4, 16]),
    keep=st.integers(1, 6),
    options=st.sampled_from([{}, {"softcap": 2.0}, {"sink_logits": torch.arange(4.0)}]),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_the_kernel_that_chooses_is_handed_the_whole_call(past, spare, page, keep, options, seed):
    call, index = made(past, spare, 2, seed, page, keep, **options)
    for name in ("triton_decode", "gather"):
        gap = EXECUTORS[name].run(call, index) - run("reference", call, index)
        assert float(gap.abs().max()) < 1e-12, name


def test_nothing_is_listed_unless_an_executor_asks(monkeypatch):
    call, index = made(40)
    fused = EXECUTORS["triton_decode"]
    fused.run(call, index)
    assert fused.worth(call, index)
    assert not fused.worth(call, made(40, keep=99)[1])
    assert "the kernel needs CUDA" in str(fused.refusal(call, index))
    assert "_lists" not in vars(index)
    assert choose(index, "auto", call) == "gather"
    assert "_lists" in vars(index)
    assert choose(made(40, keep=99)[1], "auto", call) == "dense"


@pytest.mark.parametrize("past", [16, 31, 40, 47])
@pytest.mark.parametrize("amount", [(0.5, None), (None, 16), (0.0, None), (None, 1)])
def test_quest_chooses_the_pages_that_lists_of_a_padded_batch_hold(past, amount):
    """The same row, once alone and once beside a longer one: fused and listed must agree."""
    key, query = normal(1, 2, past + 1, 8, seed=1), normal(1, 4, 1, 8, seed=2)
    selector = PageSelector(4, "minmax", *amount)
    alone = selector.select(Call(query, key, key), Layout(1, 1, past + 1, query_offset=past), 0)
    assert isinstance(alone, BestPages)
    wide = torch.nn.functional.pad(key, (0, 0, 5, 0)).repeat(2, 1, 1, 1)
    padding = torch.ones(2, past + 6, dtype=torch.bool)
    padding[1, :5] = False
    layout = Layout(2, 1, past + 6, query_offset=past + 5, padding=padding)
    both = selector.select(Call(query.repeat(2, 1, 1, 1), wide, wide), layout, 0)
    assert not isinstance(both, BestPages)
    assert torch.equal(both.mask()[1, ..., 5:], alone.mask()[0])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scorer", ["minmax", "meanstd"])
@pytest.mark.parametrize("past", [777, 4095, 4096])
def test_on_a_gpu_choosing_and_attending_never_wait_for_the_device(scorer, past):
    make = lambda *s: torch.randn(*s, device="cuda").bfloat16()  # noqa: E731
    query, key, value = make(2, 8, 1, 64), make(2, 2, past + 1, 64), make(2, 2, past + 1, 64)
    layout = Layout(2, 1, past + 1, query_offset=past, device=query.device)
    selector = PageSelector(16, scorer, 0.75, None)

    def step():
        index = selector.select(Call(query, key, value), layout, 0)
        call = Call(query, key, value)
        return index, run(choose(index, "auto", call), call, index)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index, found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "_lists" not in vars(index)
    assert choose(index, "auto", Call(query, key, value)) == "triton_decode"
    wide = Call(query.double(), key.double(), value.double())
    expected = run("reference", wide, index)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2
