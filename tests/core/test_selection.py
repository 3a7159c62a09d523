import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError, Selection, pack_bits, unpack_bits


def random_mask(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4


@given(st.integers(1, 9), st.integers(1, 17), st.integers(0, 99))
def test_mask_to_indices_and_back(rows: int, columns: int, seed: int):
    mask = random_mask(rows, columns, seed)
    indptr, indices = Selection.from_mask(mask).indices()
    for row in range(rows):
        assert indices[indptr[row] : indptr[row + 1]].tolist() == mask[row].nonzero()[:, 0].tolist()
    back = Selection.from_indices(indptr, indices, (rows, columns))
    assert torch.equal(back.mask(), mask)
    assert back == Selection.from_mask(mask)
    assert back.kept == int(mask.sum())


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))
def test_blocks_to_mask_and_back_with_cut_edges(high: int, wide: int, rows: int, columns: int):
    blocks = random_mask(-(-rows // high), -(-columns // wide), seed=rows)
    selection = Selection.from_blocks(blocks, (high, wide), (rows, columns))
    mask = selection.mask()
    assert mask.shape == (rows, columns)
    assert selection.kept == int(mask.sum())
    for r in range(rows):
        for c in range(columns):
            assert bool(mask[r, c]) == bool(blocks[r // high, c // wide])
    assert torch.equal(Selection.from_mask(mask).blocks((high, wide)), blocks)


def test_a_selection_without_block_form_says_so():
    mask = torch.tensor([[True, False], [True, True]])
    with pytest.raises(GossamerError, match="in part"):
        Selection.from_mask(mask).blocks((2, 2))
    with pytest.raises(GossamerError, match="matrix"):
        Selection.from_mask(mask[0]).blocks((1, 2))


def test_what_it_knows_of_itself():
    selection = Selection.from_mask(torch.tensor([[True, False, False, True]]))
    assert (selection.kept, selection.total) == (2, 4)
    assert selection.density == selection.sparsity == 0.5
    assert repr(selection) == "Selection(1x4, kept 2 of 4, sparsity 0.5000, mask)"
    assert Selection.everything((3, 2)).sparsity == 0.0
    assert Selection.from_mask(torch.zeros(0, 4, dtype=torch.bool)).density == 1.0
    assert selection != Selection.everything((1, 4))
    assert selection != "mask"


def test_higher_axes_are_flattened_behind_the_first():
    mask = torch.tensor([[[True, False], [False, True]]])
    indptr, indices = Selection.from_mask(mask).indices()
    assert (indptr.tolist(), indices.tolist()) == ([0, 2], [0, 3])


def test_apply_zeroes_in_place_and_checks_the_shape():
    selection = Selection.from_mask(torch.tensor([[True, False]]))
    weight = torch.tensor([[3.0, float("nan")]], dtype=torch.bfloat16)
    assert selection.apply_(weight) is weight
    assert weight.tolist() == [[3.0, 0.0]]
    with pytest.raises(GossamerError, match="meets a tensor of shape"):
        selection.apply_(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("indptr", "indices", "complaint"),
    [
        ([0, 1], [0], "entries"),
        ([0, 2, 1], [0], "never decreases"),
        ([0, 1, 2], [0, 4], "outside"),
        ([0, 0, 2], [1, 1], "ascend"),
        ([0, 0, 2], [2, 1], "ascend"),
    ],
)
def test_indices_that_are_no_selection_are_refused(
    indptr: list[int], indices: list[int], complaint: str
):
    with pytest.raises(GossamerError, match=complaint):
        Selection.from_indices(torch.tensor(indptr), torch.tensor(indices), (2, 4))


def test_masks_are_bool_and_blocks_fit():
    with pytest.raises(GossamerError, match="dtype bool"):
        Selection.from_mask(torch.ones(2, 2))
    with pytest.raises(GossamerError, match="blocks"):
        Selection.from_blocks(torch.ones(2, 2, dtype=torch.bool), (2, 2), (2, 2))


def test_bits_are_stored_least_significant_first():
    mask = torch.tensor([True, False, False, False, False, False, False, True, False, True])
    packed = pack_bits(mask)
    assert packed.tolist() == [0b1000_0001, 0b0000_0010]
    assert torch.equal(unpack_bits(packed, (10,)), mask)


@given(st.integers(0, 9), st.integers(0, 17))
def test_packing_round_trips_at_one_bit_an_entry(rows: int, columns: int):
    mask = random_mask(rows, columns)
    packed = pack_bits(mask)
    assert packed.numel() == (rows * columns + 7) // 8
    assert torch.equal(unpack_bits(packed, (rows, columns)), mask)


def test_packed_bytes_of_another_size_are_refused():
    with pytest.raises(GossamerError, match="takes 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), (3, 3))
