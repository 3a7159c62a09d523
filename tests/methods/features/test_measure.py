import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.measure import (
    Interval,
    antiparallel,
    bootstrap,
    matched_cosine,
    norm_match,
    score_rows,
)
from gossamer.methods.features.objective import Layout
from gossamer.methods.features.rules import AbsTopK, ReLU, TopAFA, TopK
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


def test_negative_values_count_and_keep_a_latent_alive():
    """Counting z > 0 would report L0 0.5 and call the second latent dead."""
    made = Dictionary(2, 2, AbsTopK(1))
    with torch.no_grad():
        made.W_dec.copy_(torch.eye(2))
        made.W_enc.copy_(torch.eye(2))
    score = score_rows(made, [torch.tensor([[2.0, 0.0], [0.0, -3.0]])])
    assert (score.l0, score.dead) == (1.0, 0.0)
    assert score.ev == pytest.approx(1.0)


def test_explained_variance_of_a_constant_is_zero_however_large_the_mean():
    x = 50.0 + torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    assert score_rows(constant(50.0), [x]).ev == pytest.approx(0.0, abs=0.02)


def test_dead_is_known_to_a_resolution_of_the_rows():
    made = Dictionary.random(8, 32, TopK(4), seed=0)
    assert score_rows(made, [torch.randn(300, 8)]).resolution == pytest.approx(0.01)
    assert score_rows(made, [torch.randn(2, 8)]).resolution == 1.0


def test_transcoders_are_scored_on_their_target_and_gradients_are_not_read():
    made = Dictionary.random(8, 32, TopK(4), seed=0, d_out=5, skip=True).requires_grad_(False)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    score = score_rows(made, torch.cat([x, y], 1).split(20), Layout(8, 5))
    wanted = (y - made(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert score.fvu == pytest.approx(float(wanted), rel=1e-5)
    plain = Dictionary.random(8, 32, TopK(4), seed=0).requires_grad_(False)
    both = score_rows(plain, [torch.cat([x, 9 * x], 1)], Layout(8, 0, 8))
    assert both == score_rows(plain, [x])


def test_antiparallel_atoms_are_counted():
    atoms = torch.tensor([[1.0, 0.0], [-2.0, 0.1], [0.0, 1.0], [0.6, 0.8]])
    assert antiparallel(atoms) == 0.5
    assert antiparallel(torch.eye(3)) == 0.0


def documents(count=20, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    return [
        spread * torch.randn(1, 8, generator=generator) + torch.randn(30, 8, generator=generator)
        for _ in range(count)
    ]


def test_bootstrap_holds_the_figures_of_the_whole_and_resamples_documents():
    made = Dictionary.random(8, 32, TopK(4), seed=0).requires_grad_(False)
    texts = documents()
    whole = score_rows(made, texts)
    found = bootstrap(made, texts, draws=400)
    assert found["ev"].value == pytest.approx(whole.ev, rel=1e-6)
    assert found["l0"].value == pytest.approx(whole.l0)
    assert found["ev"].low < whole.ev < found["ev"].high
    assert bootstrap(made, texts, draws=400)["ev"] == found["ev"]
    assert bootstrap(made, texts, draws=400, seed=1)["ev"] != found["ev"]


def test_documents_alike_inside_give_wider_intervals_than_their_tokens_would():
    made = Dictionary.random(8, 32, TopK(4), seed=0).requires_grad_(False)
    texts = documents(spread=5.0)
    by_document = bootstrap(made, texts)["ev"]
    by_token = bootstrap(made, list(torch.cat(texts).split(1)))["ev"]
    assert by_token.value == pytest.approx(by_document.value, rel=1e-6)
    assert by_document.high - by_document.low > 2 * (by_token.high - by_token.low)


def test_bootstrap_agrees_with_resampling_by_hand():
    made = Dictionary.random(8, 32, TopK(4), seed=0).requires_grad_(False)
    texts = [100.0 + part for part in documents(4)]
    generator = torch.Generator().manual_seed(7)
    chosen = torch.randint(4, (50, 4), generator=generator)
    drawn = [score_rows(made, [torch.cat([texts[i] for i in row])]).ev for row in chosen.tolist()]
    wanted = Interval.of(0.0, torch.tensor(drawn))
    found = bootstrap(made, texts, draws=50, seed=7)["ev"]
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-6)


def test_one_document_cannot_be_resampled():
    with pytest.raises(GossamerError, match="1 documents cannot be resampled"):
        bootstrap(constant(0.0), [torch.randn(5, 4), torch.empty(0, 4)])


def test_norms_match_where_atoms_are_orthogonal():
    made = Dictionary(4, 4, ReLU())
    with torch.no_grad():
        made.W_dec.copy_(torch.eye(4))
        made.W_enc.copy_(torch.eye(4))
    x = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    found = norm_match(made, torch.cat([x, torch.zeros(1, 4)]))
    assert len(found.inputs) == 50
    torch.testing.assert_close(found.codes, found.inputs)
    assert found.mismatch == pytest.approx(0.0, abs=1e-6)
    assert float(found.bound.max()) < 1e-6
    assert float(found.error.max()) < 1e-10


def test_the_bound_by_hand():
    made = Dictionary(2, 3, TopAFA())
    with torch.no_grad():
        made.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        made.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.1, 0.1]]))
        made.b_dec.copy_(torch.tensor([0.0, 1.0]))
    # x - b = (3, 0): codes 3, 0, 0; f = (6, 0, 0, |b| = 1), so ‖f‖² = 37 and ‖x‖² = 10.
    found = norm_match(made, torch.tensor([[3.0, 1.0]]))
    assert found.codes.item() == pytest.approx(37**0.5)
    assert found.bound.item() == pytest.approx(27 / (2 * 37))
    assert found.error.item() == pytest.approx(9 / 10)
