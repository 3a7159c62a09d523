"""Hooks measure what matrices read, tell padding apart, and go away."""

import pytest
import torch
from torch import nn

from gossamer.core import Stat, UnsupportedModel
from gossamer.models import find_sites
from gossamer.models.collect import Collector
from tests.models.tiny import tiny_model

L2 = frozenset({Stat.INPUT_L2})


class Pair(nn.Module):
    """Two matrices that read the same tensor, or two."""

    def __init__(self) -> None:
        super().__init__()
        proj = {"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)}
        self.attention = nn.ModuleDict(proj)

    def forward(self, x: torch.Tensor, shared: bool, rows: int | None = None) -> None:
        self.attention["q_proj"](x)
        self.attention["k_proj"](x if shared else x * 2)
        self.attention["o_proj"](x[0][:rows])


def collector() -> tuple[nn.Module, Collector]:
    model = nn.Module()
    model.layers = nn.ModuleList([Pair()])
    return model, Collector(model, find_sites(model).sites, L2)


@pytest.mark.parametrize("shared", [True, False])
def test_only_one_tensor_is_shared(shared: bool) -> None:
    model, watch = collector()
    x = torch.randn(1, 6, 4)
    with watch.attached():
        for _ in range(2):
            with watch.batch(None):
                model.layers[0](x, shared)
    got = {n.rpartition(".")[2]: s[Stat.INPUT_L2] for n, s in watch.values().items()}
    norm = (2 * x[0].square().sum(0)).sqrt()
    torch.testing.assert_close(got["q_proj"], norm)
    torch.testing.assert_close(got["k_proj"], norm if shared else 2 * norm)
    assert (got["q_proj"] is got["k_proj"]) == shared
    assert set(watch.tokens().values()) == {12}
    # Three or two sums of squares of 4 channels in fp64; o_proj has its own.
    assert watch.nbytes == 8 * 4 * (2 if shared else 3)


def test_padding_that_cannot_be_told_apart() -> None:
    model, watch = collector()
    valid = torch.tensor([[True, True, False, True]])
    x = torch.randn(1, 4, 4)
    with watch.attached(), watch.batch(valid):
        model.layers[0](x, True)
    assert set(watch.tokens().values()) == {3}
    with (
        watch.attached(),
        watch.batch(valid),
        pytest.raises(UnsupportedModel, match="3 rows for 4"),
    ):
        model.layers[0](x, True, rows=3)
    assert not model.layers[0].attention["o_proj"]._forward_pre_hooks


def test_a_matrix_that_never_ran_was_fed_nothing() -> None:
    model = tiny_model("llama")
    watch = Collector(model, find_sites(model).in_block(0), L2)
    assert set(watch.tokens().values()) == {0}
    assert all(not s[Stat.INPUT_L2].any() for s in watch.values().values())
