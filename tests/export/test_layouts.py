"""Every layout gives every bit back, in the bytes its arithmetic says."""

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import NM, GossamerError
from gossamer.export import bitmask, csr, nm
from gossamer.export.layouts import FORMATS, Grouped, Sparse24, SparseBitmask, layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(INTS[a.dtype]), b.view(INTS[b.dtype]))


@st.composite
def matrices(draw, of=None):
    """Any bits at all: NaN payloads, infinities, subnormals, -0.0, rows full and empty."""
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.integers(1, 5))
    columns = draw(st.integers(1, 9 if of else 37)) * (of or 1)
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(INTS[dtype])
    bits = torch.randint(info.min, info.max, (rows, columns), generator=generator)
    if of is None:
        keep = torch.rand(rows, columns, generator=generator) < draw(st.floats(0, 1))
        keep[0] = draw(st.booleans())
        keep[-1] = draw(st.booleans())
    else:
        score = torch.rand(rows, columns // of, of, generator=generator)
        most = draw(st.integers(1, of))
        keep = (score.argsort(2).argsort(2) < most).view(rows, columns)
        keep &= torch.rand(rows, columns, generator=generator) < draw(st.floats(0, 1))
        return (bits * keep).to(INTS[dtype]).view(dtype), NM(most, of)
    return (bits * keep).to(INTS[dtype]).view(dtype)


@given(matrices())
def test_any_matrix_comes_back_bit_for_bit(matrix):
    for name in ("bitmask", "csr", "sparse-bitmask"):
        made = layout(name)
        parts = made.pack(matrix, bitmask.mask_of(matrix))
        assert tuple(parts) == made.parts
        assert same_bits(made.unpack(parts, tuple(matrix.shape)), matrix)


@given(st.sampled_from((2, 3, 4, 8, 16)).flatmap(lambda of: matrices(of)))
def test_any_n_of_m_comes_back_bit_for_bit(case):
    matrix, pattern = case
    made = Grouped(pattern)
    parts = made.pack(matrix, bitmask.mask_of(matrix))
    assert same_bits(made.unpack(parts, tuple(matrix.shape)), matrix)
    groups = matrix.numel() // pattern.of
    width = {2: 1, 3: 2, 4: 2, 8: 3, 16: 4}[pattern.of]
    assert parts["values"].numel() == groups * pattern.keep
    assert parts["indices"].numel() == -(-groups * pattern.keep * width // 8)
    if pattern == NM(2, 4):
        parts = Sparse24().pack(matrix, bitmask.mask_of(matrix))
        assert same_bits(Sparse24().unpack(parts, tuple(matrix.shape)), matrix)


def test_the_bit_mask_of_a_small_matrix():
    matrix = torch.tensor([[0, 1.0, 0, 0, 0, 0, 0, 0, 2.0], [0] * 9, [3.0] + [0] * 7 + [-4.0]])
    parts = layout("sparse-bitmask").pack(matrix, bitmask.mask_of(matrix))
    assert parts["compressed"].tolist() == [1, 2, 3, -4]
    # Column 1 is bit 1 of byte 0, column 8 is bit 0 of byte 1.
    assert parts["bitmask"].tolist() == [[2, 1], [0, 0], [1, 1]]
    assert parts["row_offsets"].tolist() == [0, 2, 2]
    assert parts["shape"].tolist() == [3, 9]
    assert [parts[name].dtype for name in SparseBitmask.parts] == [
        torch.float32,
        torch.uint8,
        torch.int64,
        torch.int64,
    ]


def test_two_of_four_of_a_small_matrix():
    matrix = torch.tensor([[0, 5.0, 0, 6.0, 0, 0, 0, 7.0]])
    parts = layout("nm").pack(matrix, bitmask.mask_of(matrix))
    # The second group has one value: the lowest free place, 0, is filled up.
    assert parts["values"].tolist() == [[5, 6, 0, 7]]
    assert parts["indices"].tolist() == [1 | 3 << 2 | 0 << 4 | 3 << 6]
    parts = layout("sparse-24-bitmask").pack(matrix, bitmask.mask_of(matrix))
    assert parts["compressed"].tolist() == [[5, 6, 0, 7]]
    assert parts["bitmask"].tolist() == [[0b10011010]]
    assert parts["shape"].tolist() == [[1], [8]]


def test_csr_files_are_scipys(tmp_path):
    matrix = torch.tensor([[0, 1.5, 0], [0, 0, 0], [-2.0, 0, 3.0]])
    parts = layout("csr").pack(matrix, bitmask.mask_of(matrix))
    csr.write(tmp_path / "m.npz", parts, (3, 3))
    read = scipy.sparse.load_npz(tmp_path / "m.npz")
    assert np.array_equal(read.toarray(), matrix.numpy())
    half = matrix.bfloat16()
    csr.write(tmp_path / "h.npz", layout("csr").pack(half, half != 0), (3, 3))
    bits = scipy.sparse.load_npz(tmp_path / "h.npz").toarray()
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), half)


def test_long_rows_have_wide_columns():
    matrix = torch.zeros(2, 70_000, dtype=torch.float16)
    matrix[1, 69_999] = 1
    made = layout("csr")
    parts = made.pack(matrix, matrix != 0)
    assert parts["indices"].dtype == torch.int32
    assert same_bits(made.unpack(parts, (2, 70_000)), matrix)
    assert made.limit(16, 0.25, 70_000) == 12
    assert made.limit(16, 0.25, 65_536) == 8


def test_negative_zero_is_a_value_unless_dropped():
    matrix = torch.tensor([[-0.0, 0.0, 1.0, -0.0]])
    made = layout("bitmask")
    parts = made.pack(matrix, bitmask.mask_of(matrix))
    assert parts["compressed"].numel() == 3
    assert same_bits(made.unpack(parts, (1, 4)), matrix)
    assert nm.misfit(bitmask.mask_of(matrix), NM(2, 4)) is not None
    dropped = bitmask.mask_of(matrix, signed_zeros=False)
    assert dropped.tolist() == [[False, False, True, False]]
    back = layout("nm").unpack(layout("nm").pack(matrix, dropped), (1, 4))
    assert same_bits(back, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    nan = torch.tensor([[float("nan"), 0.0]])
    assert bitmask.mask_of(nan, signed_zeros=False).tolist() == [[True, False]]


def test_misfits_are_placed():
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    assert nm.misfit(mask, NM(2, 4)) == "output 0 keeps 3 of inputs 4 to 7"
    assert nm.misfit(mask, NM(3, 4)) is None
    assert "not a multiple of 3" in str(nm.misfit(mask, NM(2, 3)))


def test_bits_a_weight_meet_the_limit():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 512, generator=generator).bfloat16()
    half = dense.clone()
    half[:, ::2] = 0
    tenth = torch.where(torch.arange(512) % 10 == 0, dense, torch.zeros(()).bfloat16())
    for name, matrix, bits in (
        ("bitmask", half, 16 / 2 + 1),
        ("bitmask", dense, 17),
        ("nm", half, 16 / 2 + 1),
        ("csr", tenth, 32 * 52 / 512),
    ):
        made = layout(name)
        kept = float((matrix != 0).float().mean())
        assert made.limit(16, kept, 512) == pytest.approx(bits)
        parts = made.pack(matrix, matrix != 0)
        extra = parts["indptr"].nbytes if name == "csr" else 0
        stored = 8 * (sum(part.nbytes for part in parts.values()) - extra)
        assert stored == pytest.approx(bits * matrix.numel())


def broken(name, change, shape=(2, 8)):
    matrix = torch.tensor([[1.0, 0, 2.0, 0, 0, 0, 0, 3.0], [0, 4.0, 0, 0, 5.0, 0, 0, 6.0]])
    made = layout(name)
    parts = made.pack(matrix, matrix != 0)
    change(parts)
    with pytest.raises(GossamerError):
        made.unpack(parts, shape)


@pytest.mark.parametrize("name", ["bitmask", "nm", "csr", "sparse-bitmask", "sparse-24-bitmask"])
def test_damaged_parts_are_refused(name):
    values = layout(name).parts[0]
    broken(name, lambda parts: parts.update({values: parts[values].reshape(-1)[:-1]}))
    broken(name, lambda parts: None, shape=(3, 8))
    if name != "csr":
        broken(name, lambda parts: None, shape=(2, 20))


def test_damaged_indices_are_refused():
    broken("bitmask", lambda parts: parts["bitmask"].fill_(255))
    broken("bitmask", lambda parts: parts.update(bitmask=parts["bitmask"].int()))
    broken("sparse-bitmask", lambda parts: parts["row_offsets"].zero_())
    broken("nm", lambda parts: parts["indices"].zero_())
    broken("csr", lambda parts: parts["indices"].zero_())
    broken("csr", lambda parts: parts["indptr"].copy_(torch.tensor([0, 7, 6])))
    broken("csr", lambda parts: parts["indptr"].copy_(torch.tensor([1, 3, 6])))
    seven = torch.tensor([[1.0, 0, 2.0, 0, 0, 0, 3.0]])
    parts = layout("bitmask").pack(seven, seven != 0)
    parts["bitmask"] |= 128
    with pytest.raises(GossamerError, match="past its 7 columns"):
        layout("bitmask").unpack(parts, (1, 7))


def test_formats_are_named():
    assert [layout(name).text for name in FORMATS] == [
        "bitmask",
        "2:4",
        "csr",
        "sparse-bitmask",
        "sparse-24-bitmask",
    ]
    assert layout("1:4") == layout("nm", "1:4") == Grouped(NM(1, 4))
    with pytest.raises(GossamerError, match="did you mean bitmask"):
        layout("bitmaks")
    with pytest.raises(GossamerError, match="N:M"):
        layout("nm", "block:4x4")
    with pytest.raises(GossamerError, match="2 to 256"):
        layout("nm", "1:1024")
