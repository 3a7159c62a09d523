"""Sparse codes against dense float64 autograd.

On a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``) where triton is installed, the Triton
kernels run; elsewhere the torch definitions, which are the fast path of CPUs.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import Budget, GossamerError, Unstructured
from gossamer.kernels.sparse_code import decode, encode_at, top_rows
from gossamer.kernels.sparse_code import reference as plain
from gossamer.kernels.sparse_code.op import usable
from gossamer.kernels.sparse_code.segments import PIECE, Segments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = usable(DEVICE)
DTYPES = [torch.float32] if DEVICE.type == "cpu" else [torch.float32, torch.bfloat16]


def random(*shape, seed=0, dtype=torch.float32):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, dtype)


def codes(rows, width, atoms, seed=0):
    """Indices without repeats in a row, a few of them padding, one atom in almost every row."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.rand(rows, atoms, generator=generator).argsort(1)[:, :width]
    at[:-1, 0] = torch.where((at[:-1] == 2).any(1), at[:-1, 0], 2)
    at[torch.rand(rows, width, generator=generator) < 0.1] = -1
    return at.to(DEVICE)


def dense(values, indices, atoms):
    wide = values.new_zeros(len(values), atoms)
    return wide.scatter_add(1, indices.clamp_min(0), values * (indices >= 0))


def near(got, wanted, dtype=torch.float32):
    got, wanted = got.detach(), wanted.detach()
    error = float((got.double() - wanted.double()).norm())
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert error <= limit * float(wanted.double().norm()) + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "atoms", "D"), [(9, 3, 20, 8), (300, 5, 40, 33)])
def test_decode_and_its_gradients(rows, width, atoms, D, dtype):
    values = random(rows, width, dtype=dtype).requires_grad_()
    weight = random(atoms, D, seed=1, dtype=dtype).requires_grad_()
    at, outer = codes(rows, width, atoms), random(rows, D, seed=2)
    made = decode(values, at, weight)
    assert made.dtype == torch.float32
    (made * outer).sum().backward()
    v, w = (t.detach().double().requires_grad_() for t in (values, weight))
    wanted = dense(v, at, atoms) @ w
    (wanted * outer.double()).sum().backward()
    near(made, wanted, dtype)
    near(values.grad, v.grad, dtype)
    near(weight.grad, w.grad, dtype)
    assert not bool(values.grad[at < 0].any())
    unnamed = torch.ones(atoms, dtype=torch.bool, device=DEVICE)
    unnamed[at[at >= 0]] = False
    assert not bool(weight.grad[unnamed].any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("latent_first", [True, False])
def test_encoding_at_places_and_its_gradients(offset, latent_first, dtype):
    rows, width, atoms, D = 70, 4, 30, 12
    x, outer = random(rows, D, dtype=dtype), random(rows, width, seed=3, dtype=dtype)
    W = random(atoms, D, seed=1, dtype=dtype).T if latent_first else random(D, atoms, dtype=dtype)
    W, b = W.requires_grad_(), random(atoms, seed=2).requires_grad_()
    shift = random(D, seed=4).requires_grad_()
    at = codes(rows, width, atoms)
    with torch.no_grad():
        read = (x - shift if offset else x).to(dtype)
        pre = read @ W + b.to(dtype)
    if not offset:
        read = read.requires_grad_()
    values = encode_at(read, W, b, pre, at, shift if offset else None)
    assert torch.equal(values[at < 0], torch.zeros_like(values[at < 0]))
    (values * outer).sum().backward()
    Y, V, c, s = (t.detach().double().requires_grad_() for t in (x, W, b, shift))
    wanted = ((Y - s if offset else Y) @ V + c).gather(1, at.clamp_min(0)) * (at >= 0)
    (wanted * outer.double()).sum().backward()
    near(values, wanted, dtype)
    near(W.grad, V.grad, dtype)
    near(b.grad, c.grad, dtype)
    if offset:
        near(shift.grad, s.grad, dtype)
    else:
        near(read.grad, Y.grad, dtype)


def test_equal_inputs_give_equal_bits():
    at, x = codes(400, 6, 15), random(400, 20)

    def gradients():
        values = random(400, 6, seed=1).requires_grad_()
        weight = random(15, 20, seed=2).requires_grad_()
        (decode(values, at, weight) * x).sum().backward()
        return values.grad, weight.grad

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


def chosen(score, keep):
    return Unstructured(per="row").select(score, Budget(keep=keep)).mask()


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 90),
    part=st.floats(0, 1),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_chosen_are_those_of_select(rows, columns, part, coarse, seed):
    keep = max(1, round(part * columns))
    score = random(rows, columns, seed=seed)
    score = (2 * score).round() if coarse else score
    if KERNELS and DEVICE.type == "cpu" and columns % 3:
        return  # the interpreter is slow
    got = torch.zeros_like(score, dtype=torch.bool).scatter(1, top_rows(score, keep), True)
    assert torch.equal(got.cpu(), chosen(score.cpu(), keep))


@pytest.mark.skipif(not KERNELS, reason="needs Triton on a GPU or in its interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_are_chosen_from_chunk_by_chunk(dtype):
    columns = (1 << 14) + 77
    for keep, coarse in ((1, True), (64, True), (64, False), (200, True)):
        score = random(2, columns, seed=keep)
        score = (score * 8).round().to(dtype) if coarse else score.to(dtype)
        score[1] = -score[1].abs()
        score[0, ::2] = -0.0
        got = top_rows(score, keep).sort(1).values
        assert torch.equal(got, plain.top_rows_reference(score, keep).sort(1).values)


def test_a_k_that_does_not_fit_and_nan_are_refused():
    for keep in (0, 6):
        with pytest.raises(GossamerError, match="keeps 1 to 5"):
            top_rows(random(2, 5), keep)
    if not KERNELS:
        bad = random(3, 5)
        bad[1, 2] = float("nan")
        with pytest.raises(GossamerError, match="NaN"):
            top_rows(bad, 2)


def test_entries_are_turned_by_atom():
    indices = torch.tensor([[2, 0], [-1, 2], [2, -1]])
    made = Segments.of(indices, 4)
    assert made.start.tolist() == [0, 1, 1, 4, 4]
    assert made.order[:4].tolist() == [1, 0, 3, 4]
    assert made.tokens[:4].tolist() == [0, 0, 1, 2]
    assert len(made.owner) == 0


def test_a_common_atom_is_summed_in_pieces():
    rows = 3 * PIECE + 5
    indices = torch.tensor([[1, 3]]).repeat(rows, 1)
    indices[: 2 * PIECE, 1] = 0
    made = Segments.of(indices, 5)
    # Atom 0 has 2 pieces, so one further; atom 1 four; atom 3 two.
    assert made.before.tolist() == [0, 1, 4, 4, 5, 5]
    assert made.owner.tolist()[:5] == [0, 1, 1, 1, 3]
    assert set(made.owner.tolist()[5:]) <= {5}
    values, x = random(rows, 2), random(rows, 7, seed=1)
    weight = torch.zeros(5, 7, device=DEVICE, requires_grad=True)
    (decode(values, indices.to(DEVICE), weight) * x).sum().backward()
    wanted = dense(values.double(), indices.to(DEVICE), 5).T @ x.double()
    near(weight.grad, wanted)
