"""One competition of all layers: counting over processes selects what sorting everything does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.core import GossamerError, kept_count
from gossamer.methods.training.sparsifier.compete import _over_processes, competing
from gossamer.methods.training.sparsifier.layers import Layer
from gossamer.methods.training.sparsifier.masks import Held


def parts(*shapes):
    layers = tuple(
        Layer(f"l{at}", "linear", 0, f"l{at}.weight", shape, transposed=at == 1)
        for at, shape in enumerate(shapes)
    )
    held = {}
    for layer in layers:
        weight = nn.Parameter(
            torch.zeros(layer.shape).T if layer.transposed else torch.zeros(layer.shape)
        )
        held[layer.parameter] = Held(layer.parameter, weight, weight)
    return layers, held


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, -1.0, 1.0, 1e-30, 3e38]),
    st.floats(-4, 4, width=32),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=21, max_size=21), st.floats(0, 1))
def test_counting_digits_selects_as_sorting_does(values, sparsity):
    layers, held = parts((2, 3), (3, 2), (3, 3))
    flat = torch.tensor(values)
    scores = {"l0": flat[:6].view(2, 3), "l1": flat[6:12].view(3, 2), "l2": flat[12:].view(3, 3)}

    def local(layer):
        return scores[layer.name]

    keep = max(kept_count(21, sparsity), 3)
    want = {layer.name: mask for layer, mask, _ in competing(layers, held, local, sparsity)}
    found = {layer.name: mask for layer, mask in _over_processes(layers, held, local, keep)}
    for name, mask in want.items():
        assert torch.equal(mask, found[name]), (name, scores, keep)
    assert sum(int(mask.sum()) for mask in found.values()) == keep


def test_by_hand():
    """The best of every layer is safe; of equal scores the earlier layer's first entry stays."""
    layers, held = parts((1, 3), (2, 1))
    scores = {"l0": torch.tensor([[5.0, 2.0, 2.0]]), "l1": torch.tensor([[2.0], [1.0]])}
    found = {
        layer.name: (mask.tolist(), quota.keep, quota.floored)
        for layer, mask, quota in competing(layers, held, lambda layer: scores[layer.name], 0.4)
    }
    assert found == {
        "l0": ([[True, True, False]], 2, False),
        "l1": ([[True], [False]], 1, True),
    }


def test_nan_has_no_rank():
    layers, held = parts((1, 2))
    score = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(GossamerError, match="score of l0 holds 1 NaN"):
        list(_over_processes(layers, held, lambda layer: score, 1))
