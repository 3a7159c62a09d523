import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import choose, run
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.subset import SubsetIndex, places_of


def made(seed, queries, keys, batch=2, shared=1, padded=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    padding = None
    if padded:
        padding = torch.ones(batch, keys, dtype=torch.bool)
        padding[1, : keys // 3] = False
    layout = Layout(batch, queries, keys, query_offset=keys - queries, padding=padding)
    call = Call(normal(batch, 4, queries, 8), normal(batch, 2, keys, 8), normal(batch, 2, keys, 6))
    read = torch.rand(batch, shared, keys, generator=generator) < 0.5
    asked = torch.rand(batch, shared, queries, generator=generator) < 0.6
    return call, SubsetIndex(layout, asked, read)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.sampled_from([1, 2]))
def test_equals_the_reference(seed, padded, chunk, shared):
    call, index = made(seed, 5 if chunk else 11, 11, shared=shared, padded=padded)
    torch.testing.assert_close(
        run("subset", call, index), run("reference", call, index), atol=1e-5, rtol=1e-4
    )


def test_a_whole_prompt_among_its_own_tokens_needs_no_mask():
    call, index = made(1, 12, 12)
    same = torch.zeros(2, 1, 12, dtype=torch.bool)
    same[0, 0, [0, 3, 4, 9]] = same[1, 0, [1, 2, 10, 11]] = True
    index = SubsetIndex(index.layout, same, same)
    got = run("subset", call, index)
    torch.testing.assert_close(got, run("reference", call, index), atol=1e-5, rtol=1e-4)
    assert (got[0, :, 1] == 0).all()
    assert (got[0, :, 3] != 0).any()


def test_pairs_are_those_of_the_mask():
    for padded in (False, True):
        _, index = made(2, 5, 11, padded=padded)
        own = index.layout.mask().expand(2, -1, -1, -1)
        assert index.pairs() == (int(index.mask().sum()), int(own.sum()))


def test_nothing_chosen_gives_zeros():
    call, index = made(3, 6, 6)
    none = torch.zeros(2, 1, 6, dtype=torch.bool)
    assert (run("subset", call, SubsetIndex(index.layout, none, none)) == 0).all()


def test_it_is_what_auto_takes_and_refuses_other_indices():
    call, index = made(4, 6, 6)
    assert choose(index, "auto", call) == "subset"
    from gossamer.methods.attention.index import WindowIndex

    with pytest.raises(GossamerError, match="not those among some tokens"):
        choose(WindowIndex(index.layout, 1, 2), "subset", call)


def test_places():
    assert places_of(torch.zeros(2, 3, dtype=torch.bool)).shape == (2, 0)
