import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.objective import objective
from gossamer.methods.features.rules import (
    BatchTopK,
    FeatureChoice,
    Matryoshka,
    MutualChoice,
    zipf_counts,
)

NONE = torch.empty(0, dtype=torch.int64)


def rows(count=64, wide=8, seed=1):
    return torch.randn(count, wide, generator=torch.Generator().manual_seed(seed))


def trained(rule, batches=5):
    made = Dictionary.random(8, 32, rule, seed=0).train()
    with torch.no_grad():
        for seed in range(batches):
            made.codes(rows(seed=seed))
    return made.eval()


def test_batch_topk_keeps_k_a_row_on_average_and_not_in_each():
    codes = BatchTopK(2).train()(torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 0.5, -1.0, 0.2]]))
    assert codes.indices.tolist() == [[0, 1, 2, 3], [-1, -1, -1, -1]]
    few = BatchTopK(3).train()(torch.tensor([[1.0, -1.0, -2.0]]))
    assert few.indices.tolist() == [[0]]


def test_the_threshold_is_the_running_mean_of_the_smallest_value_kept():
    rule = BatchTopK(1).train()
    rule(torch.tensor([[4.0, 1.0], [3.0, 2.0]]))
    assert float(rule.running_threshold) == 3.0
    rule(torch.tensor([[9.0, 1.0], [1.0, 5.0]]))
    assert float(rule.running_threshold) == 4.0
    assert rule.inference(2).threshold.tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    "rule", [BatchTopK(3), Matryoshka(3), MutualChoice(3, 32), FeatureChoice(3, 32)]
)
def test_after_training_a_code_does_not_depend_on_its_batch(rule):
    made = trained(rule)
    x = rows(seed=9)
    whole = made.encode(x).to_dense()
    alone = torch.cat([made.encode(row[None]).to_dense() for row in x])
    assert torch.equal(whole > 0, alone > 0)
    torch.testing.assert_close(whole, alone)
    assert len(set((whole > 0).sum(1).tolist())) > 1


@pytest.mark.parametrize("rule", [BatchTopK(3), FeatureChoice(3, 32)])
def test_files_hold_thresholds_that_any_jumprelu_reader_knows(rule, tmp_path):
    made = trained(rule)
    made.fold_input_scale(3.0)
    assert made.config()["architecture"] == "jumprelu"
    assert made.tensors()["threshold"].shape == (32,)
    assert not [name for name in made.tensors() if name.startswith("running")]
    back = Dictionary.load(made.save(tmp_path / "sae")).eval()
    x = rows(seed=9)
    with torch.no_grad():
        assert torch.equal(back(x), made(x))


def test_a_threshold_that_was_never_trained_is_refused():
    """A default would silently keep everything, or nothing."""
    made = Dictionary.random(8, 32, BatchTopK(3), seed=0).eval()
    with pytest.raises(GossamerError, match="never trained"):
        made.encode(rows())


def test_matryoshka_selects_once_and_asks_every_prefix_to_reconstruct():
    rule = Matryoshka(2, (0.25, 0.25, 0.5))
    assert rule.edges(8) == [0, 2, 4, 8]
    made = Dictionary.random(8, 8, rule, seed=0).train()
    x = rows(16)
    terms = objective(made, x, aux_k=0, aux_coefficient=0.0, dead=NONE)
    flat = BatchTopK(2).train()
    with torch.no_grad():
        codes = flat(made.pre_activations(x))
        assert torch.equal(codes.indices, terms.codes.indices)
        dense = torch.zeros(16, 8).scatter_add(1, codes.indices.clamp_min(0), codes.values)
        prefixes = [(x - dense[:, :m] @ made.W_dec[:m] - made.b_dec) for m in (2, 4, 8)]
        wanted = sum(float(e.square().sum()) for e in prefixes) / 3
        spread = float((x - x.mean(0)).square().sum())
    assert terms.loss.item() == pytest.approx(wanted / spread, rel=1e-5)
    assert terms.fvu.item() == pytest.approx(float(prefixes[-1].square().sum()) / spread, rel=1e-5)


@settings(max_examples=40)
@given(
    st.integers(1, 40), st.integers(1, 30), st.floats(0, 2), st.floats(0, 5), st.floats(0.02, 1.0)
)
def test_zipf_counts_are_whole_descending_and_of_the_exact_total(n, latents, power, offset, share):
    total = max(1, round(share * n * latents))
    counts = zipf_counts(total, latents, n, power, offset)
    assert int(counts.sum()) == total
    assert int(counts.max()) <= n
    assert bool((counts.diff() <= 0).all())
    if total >= latents:
        assert int(counts.min()) >= 1


def test_zipf_counts_by_hand():
    # 1 : 1/2 : 1/3 : 1/4 of 25 is 12 : 6 : 4 : 3.
    assert zipf_counts(25, 4, 100, 1.0, 0.0).tolist() == [12, 6, 4, 3]
    assert zipf_counts(20, 4, 100, 0.0, 0.0).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("prior", ["zipf", "uniform"])
def test_every_latent_chooses_exactly_its_count(prior):
    rule = FeatureChoice(3, 32, prior=prior).train()
    score = torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    rule(score)
    kept = rule.choose(score)
    assert torch.equal(kept.sum(0), rule.counts(64))
    assert int(kept.sum()) == 3 * 64
    for latent in range(32):
        inside, outside = score[kept[:, latent], latent], score[~kept[:, latent], latent]
        assert not len(outside) or float(inside.min()) >= float(outside.max())
    if prior == "uniform":
        assert set(kept.sum(0).tolist()) == {6}


def test_counts_follow_the_density_and_thresholds_are_each_latents_own():
    rule = FeatureChoice(1, 3).train()
    rule.running_density.copy_(torch.tensor([0.1, 0.6, 0.3]))
    rule.running_steps.fill_(1000)
    assert rule.counts(11).tolist() == [2, 6, 3]
    score = torch.arange(33.0).view(11, 3) + 1
    rule(score)
    # Column 0 keeps 31 and 28, column 1 its six largest down to 17, column 2 27 and above.
    assert rule.running_threshold.tolist() == [28.0, 17.0, 27.0]


def test_a_latent_that_never_kept_anything_never_fires():
    rule = FeatureChoice(1, 3).train()
    rule(torch.tensor([[1.0, 2.0, -1.0], [2.0, 1.0, -1.0], [2.0, 1.0, -1.0]]))
    assert rule.inference(3).threshold[2] == float("inf")


def test_underused_latents_are_those_far_below_zipfs_law_and_the_dead():
    rule = MutualChoice(1, 4, tau=0.5)
    # Zipf gives 0.48, 0.24, 0.16, 0.12 of the tokens.
    rule.running_density.copy_(torch.tensor([0.9, 0.09, 0.10, 0.03]))
    assert rule.underused(NONE).tolist() == [2, 3]
    assert rule.underused(torch.tensor([0])).tolist() == [0, 2, 3]
    only = MutualChoice(1, 4, tau=0.0)
    only.running_density.copy_(rule.running_density)
    assert only.underused(NONE).tolist() == []
    assert only.underused(torch.tensor([1])).tolist() == [1]


def test_mutual_choice_selects_as_batch_topk_does():
    score = rows(16, 32)
    first, second = MutualChoice(3, 32).train()(score), BatchTopK(3).train()(score)
    assert torch.equal(first.indices, second.indices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MutualChoice(9, 8), "k is 9"),
        (lambda: MutualChoice(2, 8, tau=1.5), "tau"),
        (lambda: FeatureChoice(2, 8, prior="flat"), "unknown prior"),
        (lambda: Matryoshka(2, (0.5, 0.4)), "sum to 1"),
        (lambda: zipf_counts(41, 4, 10, 1.0, 0.0), "keeps 1 to"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(GossamerError, match=message):
        make()


def test_windows_of_tokens_are_rows_of_one_batch():
    made = trained(BatchTopK(3))
    x = rows(seed=9)
    with torch.no_grad():
        torch.testing.assert_close(made(x.view(4, 16, 8)).view(64, 8), made(x))
    assert torch.equal(made.encode(x.view(4, 16, 8)).to_dense(), made.encode(x).to_dense())
