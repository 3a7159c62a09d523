"""Positions: real tokens are counted from the start of each row, through padding and cache."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.activations.positions import Positions, logical_positions


def _mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows])


def test_without_padding_positions_follow_the_cache() -> None:
    assert logical_positions(3).tolist() == [[0, 1, 2]]
    assert logical_positions(2, past=5).tolist() == [[5, 6]]


def test_padding_on_either_side_is_not_counted() -> None:
    mask = _mask("0011", "1110")
    at = logical_positions(4, mask=mask)
    assert at[0, 2:].tolist() == [0, 1]
    assert at[1, :3].tolist() == [0, 1, 2]


def test_chunks_of_a_padded_text_continue_the_count() -> None:
    mask = _mask("000111", "111111")
    whole = logical_positions(6, mask=mask)
    parts = [logical_positions(2, past=p, mask=mask[:, : p + 2]) for p in (0, 2, 4)]
    real = mask.bool()
    assert torch.equal(torch.cat(parts, 1)[real], whole[real])


def test_a_mask_made_longer_than_the_tokens_seen_is_read_up_to_them() -> None:
    mask = _mask("01111111")
    assert logical_positions(2, past=2, mask=mask).tolist() == [[1, 2]]


def test_a_mask_of_this_pass_only_continues_behind_the_cache() -> None:
    assert logical_positions(2, past=3, mask=_mask("11")).tolist() == [[3, 4]]


def test_position_ids_are_believed_without_a_flat_mask() -> None:
    ids = torch.tensor([[4, 5]])
    assert torch.equal(logical_positions(2, past=9, position_ids=ids), ids)
    four = torch.zeros(1, 1, 2, 2)
    assert torch.equal(logical_positions(2, mask=four, position_ids=ids), ids)


def test_dense_and_counted_rows_in_both_layouts() -> None:
    positions = Positions(dense_prefix=1)
    positions.begin(mask=_mask("0111", "1110"), shape=(2, 4))
    x = torch.zeros(2, 4, 3)
    dense = positions.dense(x)
    assert dense is not None
    assert dense.shape == (2, 4, 1)
    assert dense[0, 1, 0]
    assert dense[1, 0, 0]
    assert positions.counted(x).tolist() == [
        [False, False, True, True],
        [False, True, True, False],
    ]
    flat = positions.dense(x.reshape(8, 3))
    assert flat is not None
    assert torch.equal(flat, dense.reshape(8, 1))


def test_a_decoded_token_behind_the_prefix_has_no_dense_row() -> None:
    positions = Positions(dense_prefix=2)
    positions.begin(past=2, shape=(1, 1))
    assert positions.dense(torch.zeros(1, 1, 4)) is None


def test_rows_that_are_not_the_tokens_are_refused() -> None:
    positions = Positions(dense_prefix=1)
    positions.begin(shape=(2, 4))
    with pytest.raises(GossamerError, match="5 rows of a pass with 8 tokens"):
        positions.dense(torch.zeros(5, 3))
