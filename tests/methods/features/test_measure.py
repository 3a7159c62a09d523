import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.measure import matched_cosine, score_rows
from gossamer.methods.features.rules import ReLU, TopK
from gossamer.methods.features.toy import Superposition


def constant(value: float, width: int = 4) -> Dictionary:
    """A dictionary that never fires and always answers one value."""
    made = Dictionary(width, 8, TopK(1))
    with torch.no_grad():
        made.b_enc.fill_(-1.0)
        made.b_dec.fill_(value)
    return made


def test_variance_is_about_the_mean_of_all_rows():
    x = 50.0 + torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    score = score_rows(constant(50.0), x.split(100))
    # About zero it would come out near 0.0004: the constant would seem a fine dictionary.
    assert score.fvu == pytest.approx(1.0, abs=0.02)
    assert (score.l0, score.dead, score.rows) == (0.0, 1.0, 1000)


def test_batches_do_not_matter():
    made = Dictionary.random(8, 32, TopK(4), seed=0)
    x = 3.0 + torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    whole, parts = score_rows(made, [x]), score_rows(made, [x[:7], x[7:150], x[150:]])
    assert whole.fvu == pytest.approx(parts.fvu, rel=1e-6)
    assert (whole.l0, whole.dead) == (parts.l0, parts.dead)
    with torch.no_grad():
        error = (x - made(x)).double().square().sum()
    assert whole.fvu == pytest.approx(float(error / (x - x.mean(0)).double().square().sum()))


def test_a_perfect_dictionary():
    made = Dictionary(2, 4, ReLU())
    with torch.no_grad():
        made.W_dec.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        made.W_enc.copy_(made.W_dec.T)
    x = torch.tensor([[1.0, 2.0], [-3.0, 1.0], [2.0, 0.0]])
    score = score_rows(made, [x])
    assert score.fvu == pytest.approx(0.0, abs=1e-12)
    assert score.shrinkage == pytest.approx(1.0)
    assert score.l0 == pytest.approx(5 / 3)
    assert score.dead == pytest.approx(1 / 4)


def test_rows_that_do_not_vary_are_refused():
    for rows in ([], [torch.ones(5, 4)]):
        with pytest.raises(GossamerError, match="do not vary"):
            score_rows(constant(0.0), rows)


def test_matching_ignores_order_sign_and_length():
    true = Superposition(d_in=8, atoms=12).true_atoms()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found = torch.cat([true[order] * -3.0, torch.randn(4, 8)])
    assert matched_cosine(found, true) == pytest.approx(1.0)
    # One atom found twelve times is one atom found.
    same = true[:1].expand(12, 8)
    assert matched_cosine(same, true) < 0.5


def test_toy_rows_have_the_promised_statistics():
    bed = Superposition(d_in=16, atoms=48, active=4.0, noise=0.0)
    assert float(bed.rates().sum()) == pytest.approx(4.0, rel=1e-4)
    assert float(bed.rates().max()) <= 1.0
    torch.testing.assert_close(bed.true_atoms().norm(dim=1), torch.ones(48))
    first, again = next(bed.batches(32, seed=1)), next(bed.batches(32, seed=1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next(bed.batches(32, seed=2)))
    assert not torch.equal(Superposition(seed=1).true_atoms(), Superposition().true_atoms())


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_seeds_do_not_hand_the_answer_to_a_fresh_dictionary(seed):
    bed = Superposition(seed=seed)
    fresh = Dictionary.random(bed.d_in, 2 * bed.atoms, TopK(1), seed=seed)
    assert matched_cosine(fresh.W_dec, bed.true_atoms()) < 0.6
