import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.methods.attention.eviction.ragged import Ragged, from_right


def example():
    tensor = torch.arange(2 * 2 * 4 * 3.0).view(2, 2, 4, 3)
    kept = torch.tensor([[[1, 0, 1, 0], [0, 0, 0, 1]], [[1, 1, 1, 0], [0, 0, 0, 0]]]).bool()
    return tensor, kept


def test_rows_are_held_back_to_back():
    tensor, kept = example()
    held = Ragged.gather(tensor, kept)
    assert held.counts.tolist() == [[2, 1], [3, 0]]
    assert held.flat.shape == (6, 3)
    assert held.most == 3
    assert not held.equal
    assert held.nbytes == 6 * 3 * 4 + 4 * 8
    assert torch.equal(held.flat[2], tensor[0, 1, 3])


def test_padded_puts_rows_at_the_right():
    tensor, kept = example()
    out = Ragged.gather(tensor, kept).padded(extra=1)
    assert out.shape == (2, 2, 4, 3)
    assert torch.equal(out[0, 0, 1:3], tensor[0, 0, [0, 2]])
    assert torch.equal(out[0, 1, 2], tensor[0, 1, 3])
    assert torch.equal(out[1, 0, :3], tensor[1, 0, :3])
    assert (out[1, 1] == 0).all()
    assert (out[:, :, 3] == 0).all()


def test_equal_heads_are_a_view():
    tensor = torch.randn(2, 3, 5, 4)
    kept = torch.zeros(2, 3, 5, dtype=torch.bool)
    kept[..., 1:4] = True
    held = Ragged.gather(tensor, kept)
    assert held.equal
    assert held.padded().data_ptr() == held.flat.data_ptr()
    assert torch.equal(held.padded(), tensor[:, :, 1:4])
    assert torch.equal(held.padded(extra=2)[:, :, :3], tensor[:, :, 1:4])


@given(st.integers(0, 10_000), st.lists(st.integers(0, 2), min_size=0, max_size=5))
def test_rows_are_rows_of_the_tensor(seed, chosen):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(3, 2, 6, 2, generator=generator)
    kept = torch.rand(3, 2, 6, generator=generator) < 0.5
    rows = torch.tensor(chosen, dtype=torch.long)
    got = Ragged.gather(tensor, kept).rows(rows)
    want = Ragged.gather(tensor[rows], kept[rows])
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.flat, want.flat)


def test_from_right():
    assert from_right(torch.tensor([[2, 0]]), 3).tolist() == [
        [[False, True, True], [False, False, False]]
    ]
