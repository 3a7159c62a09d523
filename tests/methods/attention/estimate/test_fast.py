"""Estimates by kernels are those of core: checked where the kernels' definitions run."""

import pytest
import torch

from gossamer.core.scores.attention_estimate import block_means
from gossamer.methods.attention.estimate import covering, fast, last_mass, means
from gossamer.methods.attention.flexprefill import FlexPrefill
from gossamer.methods.attention.head_search import Head, Online
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.ranked import first_ranks
from tests.methods.attention.test_executor import make


@pytest.fixture
def kernels(monkeypatch):
    """As if the kernels could run here."""
    asked: list[int] = []

    def allow(*_: object, **__: object) -> None:
        asked.append(1)

    return lambda: monkeypatch.setattr(fast, "select_refusal", allow) or asked


def _layouts() -> list[Layout]:
    left = torch.ones(2, 40, dtype=torch.bool)
    left[0, :11] = False
    right = torch.ones(2, 40, dtype=torch.bool)
    right[1, 33:] = False
    return [
        Layout(2, 40, 40),
        Layout(2, 16, 40, query_offset=24),
        Layout(2, 40, 40, padding=left),
        Layout(2, 40, 40, padding=right),
    ]


@pytest.mark.parametrize("layout", _layouts(), ids=["plain", "chunk", "left", "right"])
def test_last_queries(layout, kernels) -> None:
    call = make(2, layout.queries, layout.keys, softcap=3.0)
    expected = last_mass(call, layout, 8)
    method = FlexPrefill(gamma=0.63, block_size=4, budget_tokens=4)
    before = method.plan(torch.nn.Module(), None, 40).select(call, layout, 0)
    asked = kernels()
    for one, two in zip(last_mass(call, layout, 8), expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    after = method.plan(torch.nn.Module(), None, 40).select(call, layout, 0)
    assert torch.equal(before.mask(), after.mask())
    assert asked


def test_means_and_covering(kernels) -> None:
    x = torch.randn(2, 3, 2, 21, 5)
    share = torch.rand(3, 50).softmax(-1)
    chosen = covering(share, 0.7, first_ranks)
    kernels()
    torch.testing.assert_close(means(x, 4, None), block_means(x, 4), atol=1e-6, rtol=1e-5)
    assert torch.equal(covering(share, 0.7, first_ranks), chosen)


PLAIN = [
    Layout(2, 40, 40),
    Layout(2, 16, 40, query_offset=24),
    Layout(2, 15, 37, query_offset=22),
    Layout(2, 18, 40, query_offset=4),
]


@pytest.mark.parametrize("layout", PLAIN, ids=["prompt", "chunk", "between blocks", "static cache"])
def test_block_lists_of_plain_calls(layout, kernels) -> None:
    call = make(2, layout.queries, layout.keys, softcap=3.0)
    kinds = [
        Head("vertical_slash", 7, 4),
        Head("a_shape", 3, 9),
        Head("block_sparse", 2, 1),
        Head("dense", 0, 0),
        Head("vertical_slash", 0, 50),
        Head("block_sparse", 4, 1),
    ]
    shared = call.key.shape[1]
    mixed = [[kinds[at % 6], kinds[(5 * at + 1) % 6]] for at in range(1, shared + 1)]
    here = [[one] * shared for one in kinds if one.kind != "dense"]
    here = [[[one] for one in group] for group in here] + [mixed, mixed[::-1]]

    def indexes() -> list[BlockIndex]:
        found = [Online(call, layout, 4, 6, 2, 3).index(heads) for heads in here]
        method = FlexPrefill(gamma=0.63, block_size=4, budget_tokens=4)
        for tau in (0.0, 0.1, 1.0):
            selector = method.plan(torch.nn.Module(), None, 40)
            object.__setattr__(selector, "tau", tau)
            found.append(selector.select(call, layout, 0))
        assert all(isinstance(one, BlockIndex) for one in found)
        return found

    before = indexes()
    kernels()
    for number, (one, two) in enumerate(zip(before, indexes(), strict=True)):
        assert torch.equal(one.blocks(), two.blocks()), number
        assert torch.equal(one.mask(), two.mask()), number
        assert one.columns is None or torch.equal(one.columns, two.columns)
