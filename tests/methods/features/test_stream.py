from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.features.stream import Stream


class Numbers:
    """Rows that are their own number, in pieces of uneven size."""

    def __init__(self, sizes, *, resident=False, buffer=8, seed=0):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.blocks = [
            torch.arange(start, start + size).float()[:, None]
            for start, size in zip(starts, sizes, strict=True)
        ]
        self.seed, self.buffer, self.name, self.kept = seed, buffer, "numbers", resident
        self.asked = []

    def resident(self):
        return torch.cat(self.blocks) if self.kept else None

    def items(self):
        return len(self.blocks)

    def pieces(self):
        return len(self.blocks)

    def piece(self, order, turn, number):
        self.asked.append((turn, number))
        return self.blocks[int(order[number])]


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda s: sum(s) > 0)


@given(sizes=SIZES, size=st.integers(1, 12), resident=st.booleans(), skip=st.integers(0, 9))
def test_a_stream_goes_on_from_its_place(sizes, size, resident, skip):
    stream = Stream(Numbers(sizes, resident=resident), size)
    for _ in range(skip):
        next(stream)
    state = {name: tensor.clone() for name, tensor in stream.state().items()}
    wanted = torch.stack(list(islice(stream, 5)))
    other = Stream(Numbers(sizes, resident=resident), size)
    other.load(state)
    assert torch.equal(torch.stack(list(islice(other, 5))), wanted)


@given(sizes=SIZES, size=st.integers(1, 12), resident=st.booleans())
def test_looking_ahead_changes_nothing(sizes, size, resident):
    stream = Stream(Numbers(sizes, resident=resident), size)
    plain = Stream(Numbers(sizes, resident=resident), size)
    seen = stream.peek(2)
    batches = list(islice(stream, 4))
    assert torch.equal(torch.stack(batches), torch.stack(list(islice(plain, 4))))
    assert torch.equal(seen, torch.cat(batches)[: len(seen)])
    assert len(seen) >= size


@pytest.mark.parametrize("resident", [True, False])
def test_every_row_comes_about_as_often_as_any_other(resident):
    numbers = Numbers([5, 3, 7, 1, 4], resident=resident)
    rows = torch.cat(list(islice(Stream(numbers, 4), 100)))[:, 0].long()
    counts = torch.bincount(rows, minlength=20)
    # 400 rows drawn of 20: 20 of each, give or take what waits in the buffer.
    assert int(counts.min()) >= 18
    assert int(counts.max()) <= 22


def test_orders_differ_between_passes_and_seeds():
    def order(seed):
        return [int(x) for x in torch.cat(list(islice(Stream(Numbers([1] * 9, seed=seed), 1), 40)))]

    assert order(0) == order(0) != order(1)
    numbers = Numbers([1] * 9, resident=True)
    first, second = torch.cat(list(islice(Stream(numbers, 9), 2))).split(9)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


@pytest.mark.parametrize("resident", [True, False])
def test_no_rows_are_one_line(resident):
    numbers = Numbers([0, 0], resident=resident)
    with pytest.raises(GossamerError, match="no rows of 'numbers'"):
        next(Stream(numbers, 2))
