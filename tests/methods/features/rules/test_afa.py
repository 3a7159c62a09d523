import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.objective import objective
from gossamer.methods.features.rules import Batch, TopAFA


def brute(pre, atoms, goal):
    """The kept latents of one row, by trying every count."""
    sizes = pre.clamp_min(0) * atoms.norm(dim=1)
    order = sizes.argsort(descending=True, stable=True)
    lengths = [float(sizes[order[:k]].square().sum().sqrt()) for k in range(1, len(pre) + 1)]
    best = min(range(len(pre)), key=lambda k: (abs(lengths[k] - goal), k))
    return {int(i) for i in order[: best + 1] if float(pre[i]) > 0}


@pytest.mark.parametrize(("latents", "scale"), [(40, 1.0), (200, 1.0), (200, 6.0), (40, 0.05)])
def test_selects_what_trying_every_count_selects(latents, scale):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(latents, 8, generator=generator, dtype=torch.float64) / 4
    pre = torch.randn(30, latents, generator=generator, dtype=torch.float64)
    x = scale * torch.randn(30, 8, generator=generator, dtype=torch.float64)
    offset = torch.randn(8, generator=generator, dtype=torch.float64)
    codes = TopAFA()(pre, Batch(x, atoms, offset))
    counts = set()
    for row in range(30):
        kept = set(codes.indices[row][codes.indices[row] >= 0].tolist())
        assert kept == brute(pre[row], atoms, float((x[row] - offset).norm()))
        counts.add(len(kept))
    if scale == 1.0:
        assert len(counts) > 1


def test_values_are_the_pre_activations_and_differentiable():
    pre = torch.tensor([[3.0, 1.0, -2.0, 2.0]], requires_grad=True)
    batch = Batch(torch.tensor([[3.6, 0.0]]), torch.ones(4, 2) / 2**0.5, torch.zeros(2))
    codes = TopAFA()(pre, batch)
    # sqrt(9 + 4) = 3.606 is the closest to 3.6.
    assert codes.indices.tolist() == [[0, 3]]
    codes.values.sum().backward()
    assert pre.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_rows_that_are_silent_keep_nothing():
    codes = TopAFA()(-torch.ones(2, 40), Batch(torch.ones(2, 3), torch.ones(40, 3), torch.zeros(3)))
    assert not bool((codes.values != 0).any())
    assert bool((codes.indices == -1).all())


def test_the_penalty_by_hand():
    made = Dictionary.random(6, 24, TopAFA(gamma=0.5), seed=0)
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made.b_dec.fill_(0.1)
    none = torch.empty(0, dtype=torch.int64)
    terms = objective(made, x, aux_k=0, aux_coefficient=0.0, dead=none)
    with torch.no_grad():
        length = terms.codes.values.norm(dim=1)
        penalty = 0.5 * 6 * (length - (x - made.b_dec).norm(dim=1)).square().sum()
        spread = (x - x.mean(0)).square().sum()
        wanted = ((x - made(x)).square().sum() + penalty) / spread
    assert terms.loss.item() == pytest.approx(float(wanted), rel=1e-5)


def test_a_negative_weight_is_refused():
    with pytest.raises(GossamerError, match="gamma"):
        TopAFA(-1.0)
