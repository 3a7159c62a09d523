"""Scores before training, by hand, and that looking leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel
from transformers.utils import ModelOutput

from gossamer.core import GossamerError, unpack_bits
from gossamer.methods.training.at_start.sanity import CHECKS, sanity_checks, shuffled
from gossamer.methods.training.grasp import GraSP
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.random_search import RandomSearch
from gossamer.methods.training.snip import SNIP
from gossamer.methods.training.sparsifier.layers import find_layers
from gossamer.methods.training.synflow import SynFlow
from gossamer.models import Tokens
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 4))


def loss(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator)
    return cross_entropy(model(x), torch.randint(0, 4, (32,), generator=generator))


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_snip_is_what_the_loss_changes_by_when_a_gate_closes():
    model = net().double().eval()
    layers = find_layers(model)
    found = SNIP().start_scores(model, layers, lambda m: loss_64(m))
    small = 1e-6
    for layer in layers:
        weight = model.get_parameter(layer.parameter)
        at = (1, 2)
        with torch.no_grad():
            value = weight[at].clone()
            weight[at] = value * (1 + small)
            up = loss_64(model)
            weight[at] = value * (1 - small)
            down = loss_64(model)
            weight[at] = value
        expected = abs(float((up - down).detach()) / (2 * small))
        assert float(found[layer.name][at]) == pytest.approx(expected, rel=1e-3)


def loss_64(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    return cross_entropy(model(x), torch.randint(0, 4, (32,), generator=generator))


def test_grasp_is_the_change_of_the_gradients_norm():
    """Half of the squared norm of the gradient changes by w · Hg for each relative change of w."""
    model = net().double().eval()
    layers = find_layers(model)
    found = GraSP().start_scores(model, layers, loss_64)
    weights = [model.get_parameter(layer.parameter) for layer in layers]

    def half_norm():
        gradients = torch.autograd.grad(loss_64(model), weights)
        return 0.5 * sum(float(g.square().sum()) for g in gradients)

    small, at = 1e-5, (2, 3)
    for layer, weight in zip(layers, weights, strict=True):
        with torch.no_grad():
            value = weight[at].clone()
            weight[at] = value * (1 + small)
        up = half_norm()
        with torch.no_grad():
            weight[at] = value * (1 - small)
        down = half_norm()
        with torch.no_grad():
            weight[at] = value
        assert float(found[layer.name][at]) == pytest.approx((up - down) / (2 * small), rel=1e-3)


def test_synflow_of_one_round_by_hand_and_conserved_by_layers():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    found = SynFlow(rounds=1).start_scores(model, find_layers(model), None)
    assert found["0"].tolist() == [[5.0, 10.0], [18.0, 24.0]]
    assert found["1"].tolist() == [[15.0, 42.0]]
    assert found["0"].sum() == found["1"].sum()
    assert model[1].weight.tolist() == [[-5.0, 6.0]]


def test_synflow_in_rounds_keeps_a_path_where_one_round_cuts_it():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False), nn.Linear(40, 2, bias=False)
    )
    wide = {}
    for rounds in (1, 100):
        method = SynFlow(sparsity=0.998, rounds=rounds)
        twin = copy.deepcopy(model)
        sparsifier = method.attach(twin, optimizer(twin))
        wide[rounds] = sparsifier.kept()
        flow = twin[2].weight.abs() @ twin[1].weight.abs() @ twin[0].weight.abs()
        assert (float(flow.sum().detach()) > 0) == (rounds == 100)
    assert sum(wide[100].values()) == sum(wide[1].values())


@pytest.mark.parametrize("method", [SNIP(), GraSP(), SynFlow(rounds=3)])
def test_looking_leaves_no_trace_but_the_zeros(method):
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    model[0].weight.grad = mark = torch.ones(12, 6)
    state = torch.get_rng_state()
    given = None if isinstance(method, SynFlow) else loss
    sparsifier = method.attach(model, optimizer(model), loss=given)
    assert torch.equal(state, torch.get_rng_state())
    assert model[2].training
    assert model[0].weight.grad is mark
    for name, one in sparsifier.held.items():
        assert one.weight.dtype == torch.float32
        assert torch.equal(one.weight.detach(), before[name] * one.mask)
    assert sum(sparsifier.kept().values()) == 12
    sparsifier.remove()


@pytest.mark.parametrize("cls", [SNIP, GraSP])
def test_without_a_loss_they_say_what_to_give(cls):
    model = net()
    with pytest.raises(GossamerError, match="attach with loss="):
        cls().attach(model, optimizer(model))
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(GossamerError, match="needs the size of its input"):
        SynFlow().attach(conv, optimizer(conv))


def test_inverting_keeps_the_others():
    masks = []
    for invert in (False, True):
        model = net()
        method = SNIP(sparsity=0.5, pattern="layer", allocation="uniform", invert=invert)
        masks.append(method.attach(model, optimizer(model), loss=loss).mask("0"))
    assert torch.equal(masks[0], ~masks[1])


def test_shuffling_moves_masks_and_keeps_their_counts():
    model = net()
    sparsifier = RandomPruning(sparsity=0.5).attach(model, optimizer(model))
    for path, bits in shuffled(sparsifier, 3).items():
        mask, old = (
            unpack_bits(bits, tuple(sparsifier.held[path].mask.shape)),
            sparsifier.held[path],
        )
        assert mask.sum() == old.mask.sum()
        assert not torch.equal(mask, old.mask)


def test_the_checks_train_four_networks_that_differ_as_they_should():
    seen = []

    def run(model, attach):
        start = model[0].weight.detach().clone()
        trains = optimizer(model)
        sparsifier = attach(model, trains)
        masks = sparsifier.mask("0").clone()
        seen.append((start, masks))
        loss(model).backward()
        trains.step()
        sparsifier.step()
        assert not model[0].weight.detach()[~masks].any()
        sparsifier.remove()
        return float(len(seen))

    method = SNIP(sparsity=0.5, pattern="layer", steps=1)
    assert sanity_checks(method, net, run, loss=loss) == dict(
        zip(CHECKS, (1.0, 2.0, 3.0, 4.0), strict=True)
    )
    (weights, found), (same, moved), (other, again), (last, inverse) = seen
    assert torch.equal(weights, same)
    assert torch.equal(weights, last)
    assert not torch.equal(weights, other)
    assert torch.equal(found, again)
    assert found.sum() == moved.sum() == inverse.sum()
    assert not torch.equal(found, moved)
    assert not torch.equal(found, inverse)


@pytest.mark.parametrize("method", [SNIP(steps=5), GraSP(steps=5), RandomSearch(steps=5)])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda m: m(torch.ones(3, 6)), r"torch.float32 of shape \(3, 4\)"),
        (lambda m: torch.tensor(1.0), "a constant"),
        (lambda m: ModelOutput(loss=loss(m)), "a ModelOutput"),
        (lambda m: loss(m).item(), "a float"),
        (3, "3, which is no function of the model"),
    ],
)
def test_a_loss_that_is_no_number_of_the_weights_is_refused(method, wrong, got):
    model = net()
    line = f"loss= must return one number that depends on the weights; got {got}"
    with pytest.raises(GossamerError, match=line):
        method.attach(model, optimizer(model), loss=wrong)


@pytest.mark.parametrize("method", [SNIP(), GraSP(), RandomSearch()])
def test_a_loss_that_is_nan_or_passes_the_layers_by_is_refused(method):
    model = net()
    with pytest.raises(GossamerError, match="got nan|the loss is nan under draw 1"):
        method.attach(model, optimizer(model), loss=lambda m: loss(m) * float("nan"))
    with pytest.raises(GossamerError, match="got one that reaches none of the 2 layers"):
        method.attach(model, optimizer(model), loss=lambda m: m[0].bias.exp().sum())


def test_grasp_says_that_a_linear_loss_has_no_curvature():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(GossamerError, match="linear in the weights.*use snip"):
        GraSP().attach(model, optimizer(model), loss=lambda m: m(torch.ones(1, 3)).sum())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_synflow_needs_no_loss_of_a_language_model(name):
    """What flows in is what apply feeds it: embeddings of ones, not ids."""
    model = tiny_model(name)
    method = SynFlow(sparsity=0.5, rounds=2)
    layers = find_layers(model)
    found = method.start_scores(model, layers, None)
    ids = Tokens.from_ids(torch.ones(1, 8, dtype=torch.int64))
    applied = method.start_scores(model, layers, method.first_loss(ids))
    for layer in layers:
        assert torch.equal(found[layer.name], applied[layer.name])
    assert any(score.max() > 0 for score in found.values())


def test_synflow_flows_through_an_encoder_and_says_where_it_cannot():
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = BertModel(config)
    sparsifier = SynFlow(sparsity=0.5, rounds=2).attach(model, optimizer(model))
    sparsifier.remove()
    with pytest.raises(GossamerError, match="BertModel computes no loss on this data"):
        SynFlow(rounds=2, steps=1).apply(BertModel(config), random_tokens())
    strange = nn.Sequential(nn.Flatten(0), nn.Linear(6, 3))
    strange[0].forward = lambda x: x[:, :4]
    with pytest.raises(GossamerError, match="takes no input of ones.*attach with loss="):
        SynFlow(rounds=2).attach(strange, optimizer(strange))
