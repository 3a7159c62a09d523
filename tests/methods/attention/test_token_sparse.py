"""Token Sparse Attention: who takes part, what the others get, and order."""

import pytest
import torch

from gossamer.claims.attention.planted import planted
from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import execute, run
from gossamer.methods.attention.index import FullIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.subset import SubsetIndex, places_of
from gossamer.methods.attention.token_sparse import TokenSelector, TokenSparse
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

SELECTOR = TokenSelector((0,), 0.999, window=32, min_tokens=48, kernel=3)


def test_needles_the_last_queries_read_take_part():
    one = planted(["needle", "sink+band"], 256, repeat=2)
    index = SELECTOR.select(one.call, Layout(1, 256, 256), 0)
    assert isinstance(index, SubsetIndex)
    assert index.keys.sum(-1).tolist() == [[80, 80]]
    assert bool(index.keys[..., -32:].all())
    read = one.kept[0, 250, :224]
    assert bool(index.keys[0, 0, :224][read].all())
    assert bool(index.keys[0, 1, :4].all())
    # Heads choose their own tokens.
    assert not torch.equal(index.keys[0, 0], index.keys[0, 1])


def test_tokens_that_rest_get_zeros_and_the_others_plain_attention_among_themselves():
    one = planted(["needle", "band"], 256, repeat=2)
    layout = Layout(1, 256, 256)
    index = SELECTOR.select(one.call, layout, 0)
    out, name = execute(one.call, index)
    assert name == "subset"
    torch.testing.assert_close(out, run("reference", one.call, index), atol=1e-4, rtol=1e-4)
    rests = ~index.queries[0].repeat_interleave(2, 0)
    assert not out[0][rests].any()
    assert bool(out[0][~rests].any(-1).all())


def test_an_unsorted_gather_would_let_tokens_see_the_future():
    one = planted(["needle"], 256)
    layout = Layout(1, 256, 256)
    index = SELECTOR.select(one.call, layout, 0)
    place = places_of(index.keys)[0, 0]
    shuffled = place[torch.randperm(len(place), generator=torch.Generator().manual_seed(0))]

    def gathered(order, value):
        out = torch.nn.functional.scaled_dot_product_attention(
            one.query[:, :, order], one.key[:, :, order], value[:, :, order], is_causal=True
        )
        return torch.zeros_like(value).index_copy(2, order, out)

    later = one.value.clone()
    later[:, :, 250] += 10.0
    torch.testing.assert_close(
        gathered(place, one.value), run("reference", one.call, index), atol=1e-4, rtol=1e-4
    )
    for order, leaks in ((place, False), (shuffled, True)):
        moved = gathered(order, later)[:, :, :250] - gathered(order, one.value)[:, :, :250]
        assert bool(moved.any()) == leaks
    changed = Call(one.query, one.key, later)
    before = run("subset", one.call, index)[:, :, :250]
    assert torch.equal(run("subset", changed, index)[:, :, :250], before)


def test_short_prompts_other_layers_and_no_coverage_stay_full():
    one = planted(["band"], 256)
    layout = Layout(1, 256, 256)
    assert isinstance(SELECTOR.select(one.call, layout, 1), FullIndex)
    none = TokenSelector((0,), 0.0, 32, 48, 3)
    assert isinstance(none.select(one.call, layout, 0), FullIndex)
    long = TokenSelector((0,), 0.9, 32, 224, 3)
    assert isinstance(long.select(one.call, layout, 0), FullIndex)


def test_one_more_than_the_coverage_spares_goes():
    # Uniform attention over the 96 early tokens: 10 % of it is just under 10 of them.
    query, key = torch.zeros(1, 1, 128, 4), torch.zeros(1, 1, 128, 4)
    layout = Layout(1, 128, 128)
    selector = TokenSelector((0,), 0.1, window=32, min_tokens=1, kernel=1)
    index = selector.select(Call(query, key, key), layout, 0)
    assert int(index.keys.sum()) == 32 + 96 - 9 - 1


def test_layers_come_from_data_or_are_the_second_half():
    model = tiny_model("llama")
    method = TokenSparse(coverage=0.2, window=4, min_tokens=4, kernel=3)
    assert method.plan(model, None, 24).layers == (1,)
    found = method.plan(model, random_tokens(), 24)
    assert len(found.layers) == 1
    assert "drift" in found.notes()[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coverage": 1.0}, "below 1"),
        ({"kernel": 4}, "odd"),
        ({"quantile": 2.0}, "quantile"),
        ({"layers": (7,)}, "layer 7 does not exist; the model has layers 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        TokenSparse(**values).apply(tiny_model("llama"))
