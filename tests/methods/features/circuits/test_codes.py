import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.circuits.codes import (
    SILENT,
    edge_scores,
    fit_codes,
    head_codes,
    head_scores,
)
from gossamer.methods.features.rules import ReLU

GOOD = torch.tensor([[1, 4, 7], [2, 4, 8], [2, 5, 9]])
BAD = torch.tensor([[1, 4, 9], [3, 5, 9], [1, 4, 6]])


def test_scores_count_codes_of_solvable_examples_alone():
    assert head_scores(GOOD, BAD).tolist() == [1, 0, 2]
    assert head_scores(GOOD, BAD, share=True).tolist() == [1 / 3, 0, 2 / 4]


def test_edges_count_pairs_of_codes():
    found = edge_scores(GOOD, BAD)
    # Of (1,4) (2,4) (2,5), the corrupted examples show (1,4).
    assert found[0, 1] == 2
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), head_scores(GOOD, BAD))


codes = st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=1, max_size=8)


@given(codes, codes)
def test_shares_lie_between_none_and_all(one, other):
    good, bad = torch.tensor(one), torch.tensor(other)
    shares = head_scores(good, bad, share=True)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert head_scores(good, good).tolist() == [0, 0]
    assert (edge_scores(good, bad)[0, 1] >= head_scores(good, bad).max()).item()


def test_a_silent_head_has_a_code_of_its_own():
    made = Dictionary(2, 3, ReLU())
    with torch.no_grad():
        made.W_enc.copy_(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    outputs = torch.tensor([[[1.0, 0.0], [-2.0, 1.0]], [[0.0, -1.0], [0.5, 3.0]]])
    assert head_codes(made, outputs).tolist() == [[0, 1], [SILENT, 2]]


def test_equal_outputs_get_equal_codes_and_distant_ones_others():
    generator = torch.Generator().manual_seed(0)
    kinds = 3 * torch.randn(4, 16, generator=generator)
    which = torch.arange(12).view(6, 2) % 4
    outputs = kinds[which] + 0.01 * torch.randn(6, 2, 16, generator=generator)
    made = fit_codes(outputs, latents=40, steps=100, lr=5e-3, penalty=0.5)
    found = head_codes(made, outputs)
    for kind in range(4):
        assert len(found[which == kind].unique()) == 1
    assert len(found.unique()) == 4
