"""Estimates by kernels are those of core: checked where the kernels' definitions run."""

import pytest
import torch

from gossamer.core.scores.attention_estimate import block_means
from gossamer.methods.attention.estimate import covering, fast, last_mass, means
from gossamer.methods.attention.flexprefill import FlexPrefill
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
    method = FlexPrefill(gamma=0.6, block_size=4, budget_tokens=4)
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
