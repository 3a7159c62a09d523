"""The masked adapter: exact counts in every pattern, what folds, what it stores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import NM, GossamerError, Unstructured, kept_count
from gossamer.methods.tuning.masked.adapter import Masked, quota
from gossamer.methods.tuning.masked.linear import Scales
from gossamer.methods.tuning.tuner.adapter import load_tensors, tensors_of


def adapter(weight, seed=0, scales=None):
    generator = torch.Generator().manual_seed(seed)
    scales = scales or Scales()
    return Masked(weight, "w", rank=2, score_rank=3, scales=scales, generator=generator)


def learned(weight, seed=0):
    one = adapter(weight, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return one


def test_it_starts_as_the_matrix_itself_with_magnitude_for_its_score():
    weight = torch.randn(6, 8)
    one, x = adapter(weight), torch.randn(4, 8)
    assert torch.equal(one.folded(weight), weight)
    assert torch.allclose(one(x, weight, None), x @ weight.T, atol=1e-6)
    one.choose(weight, Unstructured("layer"), 0.5)
    largest = weight.abs().flatten().argsort(descending=True)[:24]
    assert one.mask.flatten()[largest].all()
    assert one.selection.kept == 24
    assert one.u.abs().sum() > 0
    assert one.a.abs().sum() > 0


@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.floats(0, 0.999),
    st.sampled_from(["layer", "row"]),
    st.integers(0, 9),
)
def test_counts_are_exact_and_no_group_is_empty(rows, columns, sparsity, per, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    one = learned(weight, seed)
    one.choose(weight, Unstructured(per), sparsity)
    group = columns if per == "row" else rows * columns
    wanted = max(1, kept_count(group, sparsity))
    counts = one.mask.sum(1) if per == "row" else one.mask.sum()[None]
    assert (counts == wanted).all()
    assert not one.folded(weight)[~one.mask].any()


@pytest.mark.parametrize(("sparsity", "keep"), [(0.0, 4), (0.3, 3), (0.5, 2)])
def test_the_number_of_an_n_m_pattern_follows_the_schedule(sparsity, keep):
    weight = torch.randn(4, 16)
    one = learned(weight)
    one.choose(weight, NM(2, 4), sparsity)
    assert (one.mask.view(-1, 4).sum(1) == keep).all()
    assert quota((4, 16), NM(2, 4), 0.9)[1].keep == 1


def test_the_score_moves_the_mask_away_from_magnitude():
    weight = torch.tensor([[3.0, 2.0, 1.0]])
    one = adapter(weight)
    with torch.no_grad():
        one.column.copy_(torch.tensor([0.0, 0.0, 5.0]))
    one.choose(weight, Unstructured("layer"), 2 / 3)
    assert one.mask.tolist() == [[False, False, True]]
    assert one.folded(weight).tolist() == [[0.0, 0.0, 1.0]]


def test_folding_gives_the_same_outputs_and_plain_zeros():
    weight, x = torch.randn(12, 20), torch.randn(5, 20)
    one = learned(weight)
    one.choose(weight, Unstructured("layer"), 0.75)
    folded = one.folded(weight)
    assert torch.equal(one(x, weight, None), torch.nn.functional.linear(x, folded))
    assert int(folded.count_nonzero()) == 60
    assert not torch.signbit(folded[folded == 0]).any()


def test_parts_without_a_factor_are_not_there():
    weight = torch.randn(6, 8)
    full = sum(p.numel() for p in adapter(weight).parameters())
    assert full == (2 + 3 + 1) * (6 + 8)
    plain = adapter(weight, scales=Scales(alpha1=0.0, alpha2=0.0))
    assert sum(p.numel() for p in plain.parameters()) == 2 * (6 + 8)


def test_stored_tensors_come_back_and_strange_ones_are_refused():
    weight = torch.randn(6, 8)
    one = learned(weight)
    one.choose(weight, Unstructured("layer"), 0.5)
    stored = tensors_of(one)
    assert stored["mask"].dtype == torch.uint8
    assert stored["mask"].numel() == 6
    again = adapter(weight, seed=5)
    load_tensors(again, stored, "w")
    assert torch.equal(again.mask, one.mask)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), one.parameters(), strict=True))
    with pytest.raises(GossamerError, match="of w do not fit this method \\(u\\)"):
        load_tensors(again, {k: v for k, v in stored.items() if k != "u"}, "w")
    with pytest.raises(GossamerError, match="stored v of w has shape"):
        load_tensors(again, {**stored, "v": torch.zeros(3, 8)}, "w")


def test_scores_without_order_are_refused_by_name():
    weight = torch.randn(6, 8)
    one = adapter(weight)
    with torch.no_grad():
        one.row[0] = torch.nan
    with pytest.raises(GossamerError, match=r"^w: score holds 8 NaN"):
        one.choose(weight, Unstructured("layer"), 0.5)
