"""Analysis: planted properties are found, chance is not."""

import math

import pytest
import torch

from gossamer.core import GossamerError, SparseRows
from gossamer.methods.features.embeddings import (
    Embeddings,
    associations,
    clusters,
    differences,
    retrieve,
    weights_from_examples,
    weights_from_words,
)


def noise(count=200, latents=30, rate=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(count, latents, generator=generator) < rate
    return on * (0.5 + torch.rand(count, latents, generator=generator))


def embedded(dense, **values):
    return Embeddings(SparseRows.from_dense(dense), **values)


def test_differences_name_the_planted_latent_and_little_else():
    first, second = noise(seed=0), noise(seed=1)
    first[:, 7] = (torch.arange(200) % 5 == 0).float()
    second[:, 7] = (torch.arange(200) % 20 == 0).float()
    found = differences(embedded(first, labels={7: "kite"}), embedded(second), by="ratio")
    assert (found[0].latent, found[0].label) == (7, "kite")
    assert (found[0].first, found[0].second) == (0.2, 0.05)
    assert found[0].gap == pytest.approx(0.15)
    assert [d.latent for d in found if d.fdr < 0.05] == [7]


def test_latents_of_all_documents_and_of_none_are_left_out():
    dense = noise(50, 3)
    dense[:, 0], dense[:, 1] = 1.0, 0.0
    assert [d.latent for d in differences(embedded(dense), embedded(dense))] == [2]


def test_npmi_by_hand():
    dense = torch.zeros(100, 2)
    dense[:20, 0] = dense[10:40, 1] = 1
    (pair,) = associations(embedded(dense))
    expected = math.log(0.1 / (0.2 * 0.3)) / -math.log(0.1)
    assert pair.npmi == pytest.approx(expected)
    assert pair.together == 10


def test_planted_pairs_come_first_unless_they_are_alike():
    dense = noise(seed=3)
    dense[:, 4] = dense[:, 9] * 2
    found = associations(embedded(dense))
    assert {found[0].first, found[0].second} == {4, 9}
    assert [p for p in found if p.fdr < 0.05] == found[:1]
    vectors = torch.eye(30)
    vectors[4] = vectors[9]
    kept = associations(embedded(dense), vectors=vectors)
    assert {4, 9} not in [{p.first, p.second} for p in kept]
    assert len(kept) == len(found) - 1


@pytest.mark.parametrize("by", ["spectral", "k-means"])
def test_clusters_follow_the_latents_chosen_and_name_themselves(by):
    dense = noise(120, 12, 0.5)
    dense[:, :6] = 0
    kind, other = torch.arange(120) % 3, torch.arange(120) // 40
    dense[torch.arange(120), kind] = 1
    dense[torch.arange(120), 3 + other] = 1
    for axis, truth in (((0, 1, 2), kind), ((3, 4, 5), other)):
        found = clusters(embedded(dense), 3, latents=axis, by=by)
        assert len(set(zip(found.groups.tolist(), truth.tolist(), strict=True))) == 3
        assert {names[0].latent for names in found.names} == set(axis)
    with pytest.raises(GossamerError, match="telling latents"):
        clusters(embedded(dense), 3, latents=())


def test_examples_and_words_ask_for_the_right_latents():
    dense = noise()
    wanted = torch.arange(200) % 4 == 0
    dense[:, 5] = wanted.float()
    documents = embedded(dense, labels={5: "red kite", 6: "lamp"})
    asked = weights_from_examples(documents, wanted)
    assert set(asked) == {5}
    assert asked[5] > 3
    assert weights_from_words(documents, "Kite!") == {5: 0.5}
    with pytest.raises(GossamerError, match="not all"):
        weights_from_examples(documents, torch.ones(200, dtype=torch.bool))


def test_retrieval_ranks_by_weighted_sum_and_tests_it():
    dense = noise(rate=0.1)
    dense[17, :5] = 1.5
    hits = retrieve(embedded(dense), dict.fromkeys(range(5), 1.0))
    assert hits[0].document == 17
    assert hits[0].score == pytest.approx(float((dense[17, :5] / dense[:, :5].amax(0)).sum()))
    assert hits[0].fdr < 0.05
    assert hits[1].fdr > 0.05
    assert hits[-1].p == 1
    with pytest.raises(GossamerError, match="no latent"):
        retrieve(embedded(dense), {})
    for latent in (-1, dense.shape[1]):
        with pytest.raises(GossamerError, match=f"names latent {latent}; there are"):
            retrieve(embedded(dense), {0: 1.0, latent: 1.0})
