"""R-Sparse: the budget, the low-rank path, the search, and the score it shares with WINA."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.activations.r_sparse import ALPHAS, RSparse, low_rank, search, split_budget
from gossamer.methods.activations.teal import TEAL
from gossamer.methods.activations.wina import WINA
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

torch.set_num_threads(1)


def _tokens(rows: int = 4, length: int = 24, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (rows, length), generator=generator))


@given(
    st.tuples(st.integers(4, 300), st.integers(4, 300)), st.floats(0.0, 0.95), st.floats(0.0, 1.0)
)
def test_the_budget_is_met_exactly(shape, sparsity: float, alpha: float) -> None:
    kept, rank = split_budget(shape, sparsity, alpha)
    rows, columns = shape
    read = kept * rows * columns + rank * (rows + columns)
    assert read == pytest.approx((1 - sparsity) * rows * columns)
    assert -1e-9 <= kept <= 1
    assert (rank == 0) or alpha < 1


def test_the_factors_are_the_best_of_their_rank() -> None:
    weight = torch.randn(12, 20)
    factors = low_rank(weight, 5)
    s = torch.linalg.svdvals(weight.double())
    off = weight.double() - factors.left.double() @ factors.right.double()
    assert float(off.norm()) == pytest.approx(float(s[5:].norm()), rel=1e-5)
    x = torch.randn(3, 20)
    torch.testing.assert_close(factors(x), x @ factors.right.T @ factors.left.T)


def test_removed_channels_and_only_those_go_through_the_low_rank_path() -> None:
    """y = W (m * x) + U S V^T ((1 - m) * x), by hand on one layer."""
    model, data = tiny_model("llama"), _tokens()
    work = RSparse(sparsity=0.3, alpha=0.6, dense_prefix=0).apply(model, data)
    name = "model.layers.0.mlp.down_proj"
    layer, gate = model.get_submodule(name), work.gates[name]
    x = torch.randn(1, 24, 64)
    work._gates.positions.begin(shape=(1, 24))
    found = layer(x)
    work.restore()
    assert gate.low_rank is not None
    removed = x.abs() <= gate.cut
    expected = layer(x.masked_fill(removed, 0)) + gate.low_rank(x.masked_fill(~removed, 0))
    torch.testing.assert_close(found, expected)
    assert 0 < int(removed.sum()) < removed.numel()


def test_the_score_is_winas() -> None:
    model, data = tiny_model("llama"), _tokens()
    with RSparse(sparsity=0.3, alpha=0.6).apply(model, data) as work:
        ours = dict(work.gates)
    with WINA(sparsity=0.3, policy="quantile").apply(model, data) as work:
        for name, gate in work.gates.items():
            # The same weights, thresholds at other quantiles: the cuts are proportional.
            ratio = ours[name].cut / gate.cut
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


def test_share_one_is_teal() -> None:
    model, data = tiny_model("llama"), _tokens()
    with RSparse(sparsity=0.5, alpha=1.0).apply(model, data) as work:
        ours = {name: gate.cut for name, gate in work.gates.items()}
        assert all(gate.low_rank is None for gate in work.gates.values())
    with TEAL(sparsity=0.5).apply(model, data) as work:
        assert all(torch.equal(ours[name], gate.cut) for name, gate in work.gates.items())


def test_factors_are_counted_and_stored() -> None:
    model, data = tiny_model("llama"), _tokens()
    with RSparse(sparsity=0.25, alpha=0.5).apply(model, data) as work:
        ranks = [gate.low_rank.right.shape[0] for gate in work.gates.values()]
        (fact,) = (note for note in work.report().notes if note.startswith("alpha, given"))
        # Ranks are whole, so the low-rank path gets at most its half.
        assert "alpha, given: 0.5" in fact
        assert f"of rank {min(ranks)} to {max(ranks)}" in fact
        assert work.report().sparsity == pytest.approx(0.25, abs=1e-6)
        read = sum(g.low_rank.size for g in work.gates.values() if g.low_rank is not None)
        assert read > 0
        skipped = sum(g.sparsity * g.size for g in work.gates.values())
        assert work.weight_bytes_saved() == pytest.approx(4 * (skipped - read), abs=1)
        state, masked = work.state(), model(data.input_ids).logits
    fresh = tiny_model("llama")
    with RSparse(sparsity=0.25, alpha=0.5).reattach(fresh, state.meta, state.tensors):
        assert torch.equal(fresh(data.input_ids).logits, masked)


def test_the_search_takes_the_least_error_and_tries_channels_alone() -> None:
    names, tried = ["a", "b", "c"], []

    def error(alphas) -> float:
        tried.append(dict(alphas))
        return abs(alphas["a"] - 0.7) + abs(alphas["b"] - 0.95)

    found = search(names, error, 20)
    assert len(tried) == 20
    assert tried[0] == dict.fromkeys(names, 1.0)
    assert error(found) == min(map(error, tried[:20]))
    # No equal share is as good: children of two shares are.
    assert error(found) < min(error(dict.fromkeys(names, a)) for a in ALPHAS)


def test_the_search_gives_the_same_gates_again() -> None:
    data = _tokens()
    found = []
    for _ in range(2):
        with RSparse(sparsity=0.25, evaluations=8).apply(tiny_model("llama"), data) as work:
            found.append({name: gate.cut for name, gate in work.gates.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"evaluations": 0}, "evaluations"),
        ({"policy": "topk"}, "policy is 'topk'"),
    ],
)
def test_impossible_parameters_are_refused(values: dict, message: str) -> None:
    with pytest.raises(GossamerError, match=message):
        RSparse(**values)
