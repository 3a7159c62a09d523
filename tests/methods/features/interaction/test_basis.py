import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.features.interaction.basis import (
    edges,
    edges_needed,
    interaction_basis,
    jacobians,
    listening,
    pca_basis,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


ROWS = normal(200, 5) @ normal(5, 5, seed=1) + 3


def test_jacobians_agree_with_torch():
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    found = jacobians(net, ROWS[:4])
    wanted = torch.stack([torch.autograd.functional.jacobian(net, row) for row in ROWS[:4]])
    torch.testing.assert_close(found, wanted)


def test_principal_features_are_uncorrelated_with_falling_variance():
    basis = pca_basis(ROWS)
    features = basis.features(ROWS)
    gram = features.T @ features / len(ROWS)
    torch.testing.assert_close(gram, torch.diag(basis.strength), rtol=1e-6, atol=1e-8)
    assert (basis.strength.diff() <= 0).all()
    torch.testing.assert_close(
        basis.scaled().features(ROWS).square().mean(0), torch.ones(5).double()
    )
    torch.testing.assert_close(basis.scaled().rebuild(ROWS), ROWS)


def test_features_have_the_variance_of_their_importance():
    slope = normal(4, 5, seed=2)
    basis = interaction_basis(ROWS, slope.T @ slope)
    features = basis.features(ROWS)
    gram = features.T @ features / len(ROWS)
    # C' G C = Λ, and M' becomes the identity on features that are listened to.
    torch.testing.assert_close(gram, torch.diag(basis.strength), rtol=1e-6, atol=1e-6)
    assert len(basis.strength) == 4
    heard = slope @ basis.back.T
    torch.testing.assert_close(heard.T @ heard, torch.eye(4).double(), rtol=1e-6, atol=1e-6)


def test_what_is_not_listened_to_is_dropped_without_harm():
    slope = normal(2, 5, seed=2)
    basis = interaction_basis(ROWS, slope.T @ slope)
    rebuilt = basis.rebuild(ROWS)
    assert len(basis.strength) == 2
    torch.testing.assert_close(rebuilt @ slope.T, ROWS @ slope.T)
    assert not torch.allclose(rebuilt, ROWS, atol=0.1)


def test_the_least_important_direction_costs_least():
    slope = normal(4, 5, seed=2)
    basis, pca = interaction_basis(ROWS, slope.T @ slope), pca_basis(ROWS)
    dense = ROWS @ slope.T
    for keep in range(4):
        missed = (basis.rebuild(ROWS, keep) @ slope.T - dense).square().sum(1).mean()
        assert missed == pytest.approx(float(basis.strength[keep:].sum()))
        other = (pca.rebuild(ROWS, keep) @ slope.T - dense).square().sum(1).mean()
        assert missed <= other + 1e-9


def test_a_diagonal_layer_between_interaction_bases_has_one_edge_a_feature():
    layer = nn.Linear(5, 5, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(normal(5, 5, seed=3))
    after = pca_basis(layer(ROWS).detach())
    slope = jacobians(layer, ROWS)
    before = interaction_basis(ROWS, listening(slope, after))
    weights = edges(slope, before, after)
    assert weights.shape == (5, 5)
    # A linear map is diagonal in these bases, with every edge 1.
    assert edges_needed(weights, 0.999) == 5
    torch.testing.assert_close(weights.sum(), torch.tensor(5.0).double(), rtol=1e-6, atol=1e-6)


def test_edges_needed_counts_the_largest_over_all_layers():
    assert edges_needed(torch.tensor([[5.0, 1.0], [3.0, 1.0]]), 0.8) == 2
    assert edges_needed([torch.tensor([5.0]), torch.tensor([4.0, 1.0])], 0.95) == 3


def test_rows_without_variance_or_listeners_are_refused():
    with pytest.raises(GossamerError, match="3 rows of activations do not vary"):
        pca_basis(torch.ones(3, 2))
    with pytest.raises(GossamerError, match="does not depend"):
        interaction_basis(ROWS, torch.zeros(5, 5))
