"""Tensors come back from the file as they were put in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.models.spool import Spool

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float64]


@given(st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES))))
def test_round_trip(kinds: list[tuple[list[int], torch.dtype]]) -> None:
    tensors = [torch.randint(-3, 3, shape).to(dtype) for shape, dtype in kinds]
    with Spool() as spool:
        places = [spool.put(t) for t in tensors]
        assert spool.nbytes == sum(t.numel() * t.element_size() for t in tensors)
        for place, tensor in reversed(list(zip(places, tensors, strict=True))):
            got = spool.read(place)
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor)


def test_broadcast_dimensions_are_stored_once() -> None:
    mask = torch.rand(1, 1, 5, 5)
    with Spool() as spool:
        place = spool.put(mask.expand(8, 3, 5, 5))
        assert spool.nbytes == 4 * 25
        got = spool.read(place)
    assert got.shape == (8, 3, 5, 5)
    assert got.stride() == mask.expand(8, 3, 5, 5).stride()
    assert torch.equal(got, mask.expand(8, 3, 5, 5))


def test_views_are_stored_as_seen() -> None:
    whole = torch.arange(24.0).view(4, 6)
    with Spool() as spool:
        place = spool.put(whole.T[1:, ::2])
        assert torch.equal(spool.read(place), whole.T[1:, ::2])


def test_replace_leaves_the_neighbours_alone() -> None:
    with Spool() as spool:
        places = [spool.put(torch.full((3,), float(i))) for i in range(3)]
        size = spool.nbytes
        spool.replace(places[1], torch.tensor([7.0, 8.0, 9.0]))
        assert spool.nbytes == size
        assert [spool.read(p)[0].item() for p in places] == [0.0, 7.0, 2.0]


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(GossamerError, match=r"cannot be written \(Permission denied\)"):
        Spool()
