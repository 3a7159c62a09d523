"""Objectives of a search, by worked numbers and against the dense network."""

import copy
from math import log

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layers import find_layers
from gossamer.methods.training.tickets.looking import SearchData
from gossamer.methods.training.tickets.objectives import (
    OBJECTIVES,
    Frozen,
    reverse_kl,
    standardised,
)
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def pair(rows=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (rows,), generator=generator)


def frozen(model, **values):
    return Frozen(model, find_layers(model), SearchData([pair()], **values))


def half_masks(network, value=0.5):
    return {
        path: torch.full_like(weight, value).requires_grad_()
        for path, weight in network.weights.items()
    }


class TestDivergence:
    def test_the_sparse_network_comes_first(self):
        """KL(s ‖ d) for s = (1/2, 1/2), d = (9/10, 1/10), not KL(d ‖ s)."""
        sparse = torch.tensor([[0.0, 0.0]])
        dense = torch.tensor([[log(9.0), 0.0]])
        reverse = 0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1)
        forward = 0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5)
        assert reverse == pytest.approx(0.5108, abs=1e-4)
        assert forward == pytest.approx(0.3681, abs=1e-4)
        assert float(reverse_kl(sparse, dense)) == pytest.approx(reverse, abs=1e-6)

    def test_the_mean_over_positions_and_zero_for_equals(self):
        torch.manual_seed(0)
        logits = torch.randn(2, 5, 7)
        assert float(reverse_kl(logits, logits + 3.0)) == pytest.approx(0.0, abs=1e-6)
        other = torch.randn(2, 5, 7)
        parts = [float(reverse_kl(logits[i], other[i])) for i in range(2)]
        assert float(reverse_kl(logits, other)) == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_standardising_is_along_one_side_or_over_everything():
    values = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    rows = standardised(values, -1)
    assert torch.allclose(rows, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) / 2**0.5)
    whole = standardised(values)
    assert float(whole.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(whole.std()) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_by_masks_are_those_of_finite_differences(name):
    model = net()
    network = frozen(model)
    before = copy.deepcopy(model.state_dict())
    masks = half_masks(network)
    value = OBJECTIVES[name].value(network, pair(), masks)
    slopes = torch.autograd.grad(value, list(masks.values()))
    small = 1e-5
    for slope, path in zip(slopes, masks, strict=True):
        at = (1, 2)
        found = []
        for sign in (1, -1):
            moved = {p: m.detach().clone() for p, m in masks.items()}
            moved[path][at] += sign * small
            moved = {p: m.requires_grad_() for p, m in moved.items()}
            found.append(float(OBJECTIVES[name].value(network, pair(), moved).detach()))
        expected = (found[0] - found[1]) / (2 * small)
        assert float(slope[at]) == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert isinstance(model[0].weight, nn.Parameter)


@pytest.mark.parametrize("name", ["kl", "ratio", "features", "gradients"])
def test_full_masks_are_no_distance_and_others_some(name):
    network = frozen(net())
    value = OBJECTIVES[name].value
    assert float(value(network, pair(), half_masks(network, 1.0)).detach()) == pytest.approx(
        0.0, abs=1e-6
    )
    assert float(value(network, pair(), half_masks(network, 0.3)).detach()) > 1e-4


def test_task_and_norm_are_those_of_the_masked_network():
    model = net()
    network = frozen(model)
    masks = half_masks(network, 0.5)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (halved[0], halved[2]):
            layer.weight.mul_(0.5)
    x, y = pair()
    loss = cross_entropy(halved(x), y)
    assert float(OBJECTIVES["task"].value(network, pair(), masks).detach()) == pytest.approx(
        float(loss.detach()), rel=1e-6
    )
    loss.backward()
    # The gradient by a weight behind a mask is the mask times that by their product.
    parts = [0.5 * halved[i].weight.grad for i in (0, 2)] + [halved[i].bias.grad for i in (0, 2)]
    expected = torch.cat([p.flatten() for p in parts]).norm()
    assert float(OBJECTIVES["norm"].value(network, pair(), masks).detach()) == pytest.approx(
        -float(expected), rel=1e-6
    )


def test_weights_are_put_back_after_an_error_and_shared_ones_masked_everywhere():
    model = net()
    model.add_module("again", nn.Linear(6, 12, bias=False).double())
    model.again.weight = model[0].weight
    network = frozen(model)
    masks = half_masks(network, 0.0)
    with pytest.raises(RuntimeError, match="stop"), network.behind(masks):
        assert not model[0].weight.any()
        assert not model.again.weight.any()
        raise RuntimeError("stop")
    assert model.again.weight is model[0].weight is network.weights["0.weight"]


class TestLooking:
    def test_a_list_is_read_over_and_over_an_iterator_once(self):
        data = SearchData([1, 2])
        batches = data.forever()
        assert [next(batches) for _ in range(5)] == [1, 2, 1, 2, 1]
        batches = SearchData(iter([1, 2])).forever()
        assert [next(batches), next(batches)] == [1, 2]
        with pytest.raises(GossamerError, match="ended after 2 batches; give a list"):
            next(batches)
        with pytest.raises(GossamerError, match="ended after 0 batches"):
            next(SearchData([]).forever())

    def test_padding_counts_for_nothing(self):
        model = tiny_model("llama")
        ids = random_tokens().input_ids[:2]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, 3:] = False
        data = SearchData([])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        found = data.logits(model, batch)
        assert found.shape == (int(mask.sum()), model.config.vocab_size)
        assert torch.allclose(found[-1], model(**batch).logits[1, 2], atol=1e-6)
        assert float(data.loss(model, batch).detach()) > 0

    def test_its_own_loss(self):
        x, y = pair()
        data = SearchData([(x, y)], loss=lambda model, batch: model(batch[0]).square().mean())
        model = net()
        assert float(data(model).detach()) == pytest.approx(
            float(model(x).square().mean().detach())
        )
        assert float(SearchData([(x, y)])(model).detach()) == pytest.approx(
            float(cross_entropy(model(x), y).detach()), rel=1e-6
        )

    def test_what_cannot_be_read(self):
        model = net()
        with pytest.raises(GossamerError, match="no labels; use objective kl or features"):
            SearchData([pair()[0]])(model)
        with pytest.raises(GossamerError, match="is a str; give dicts"):
            SearchData(["text"])(model)
        with pytest.raises(GossamerError, match="gives no logits"):
            SearchData([]).logits(nn.Sequential(*net(), nn.Flatten(0)), pair()[0])
