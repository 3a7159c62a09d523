import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.dark import pursuit
from gossamer.methods.features.dark.pursuit import pursue
from gossamer.methods.features.rules import TopK


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(atoms, x, count):
    """The definition, a row at a time."""
    z, support = torch.zeros(len(atoms), dtype=x.dtype), []
    for _ in range(count):
        r = x - atoms.T @ z
        scores = atoms @ r
        scores[support] = -torch.inf
        support.append(int(scores.argmax()))
        on = torch.zeros(len(atoms), dtype=x.dtype)
        on[support] = 1
        g = (atoms @ r) * on
        c = atoms.T @ g
        step = (c @ r) / (c @ c) if c @ c > 0 else 0.0
        z = (z + step * g).clamp_min(0)
    return z


@pytest.mark.parametrize("gram", [1 << 13, 1])
def test_agrees_with_the_definition(monkeypatch, gram):
    monkeypatch.setattr(pursuit, "_GRAM", gram)
    made = Dictionary.random(6, 20, TopK(4), seed=0).double()
    with torch.no_grad():
        made.b_dec.copy_(normal(6, seed=4))
    x, counts = normal(12, 6, seed=1).double(), torch.arange(12) % 5
    found = pursue(made, x, counts)
    dense = torch.zeros(12, 20, dtype=torch.float64)
    real = found.indices >= 0
    dense[real.nonzero()[:, 0], found.indices[real]] = found.values[real]
    for row in range(12):
        wanted = slow(made.W_dec.detach(), x[row] - made.b_dec.detach(), int(counts[row]))
        torch.testing.assert_close(dense[row], wanted)
    assert (real.sum(1) <= counts).all()


def test_orthogonal_atoms_are_solved_exactly():
    made = Dictionary(4, 4, TopK(4)).eval().requires_grad_(False)
    made.W_dec.copy_(torch.eye(4))
    x = torch.tensor([[3.0, 1.0, 2.0, -1.0]])
    # One step length serves the whole support, and each step mends what the last one left.
    found = made.decode(pursue(made, x, 3))
    torch.testing.assert_close(found, torch.tensor([[3.0, 1.0, 2.0, 0.0]]))


def test_impossible_questions_are_refused():
    made = Dictionary.random(6, 20, TopK(4), seed=0)
    with pytest.raises(GossamerError, match="counts run from 21 to 21"):
        pursue(made, normal(2, 6), 21)
    with pytest.raises(GossamerError, match="hold NaN"):
        pursue(made, torch.full((1, 6), torch.nan), 2)
    with pytest.raises(GossamerError, match="transcoder"):
        pursue(Dictionary.random(6, 20, TopK(4), seed=0, d_out=6), normal(2, 6), 2)
