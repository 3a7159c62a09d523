"""Counts per token, masking protocols, allocation across blocks, and whose plan it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError, kept_count
from gossamer.methods.activations.across import across, grid_of, hull, refined
from gossamer.methods.activations.fingerprint import fingerprint
from gossamer.methods.activations.gates import drop_all_but
from gossamer.methods.activations.invariant import Invariant
from gossamer.methods.activations.positions import Positions
from gossamer.methods.activations.r_sparse import RSparse
from gossamer.methods.activations.teal import TEAL
from gossamer.methods.activations.wina import WINA
from gossamer.models import Tokens, find_sites
from tests.models.tiny import tiny_model

torch.set_num_threads(1)


def _tokens(rows: int = 4, length: int = 24, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (rows, length), generator=generator))


def test_a_count_keeps_the_largest_scores_and_lower_channels_of_equals() -> None:
    x = torch.tensor([[3.0, -4.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert drop_all_but(x, 2, torch.ones(1)).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    # Cuts are relative: dividing by 1 / c_j is weighing by c_j.
    weighed = drop_all_but(x[:1], 2, 1 / torch.tensor([1.0, 0.1, 5.0, 5.0]))
    assert weighed.int().tolist() == [[1, 1, 0, 0]]
    assert not drop_all_but(torch.tensor([[1.0, torch.nan]]), 1, torch.ones(1))[0, 1]


@given(st.integers(2, 40), st.floats(0.0, 0.99))
@settings(max_examples=30)
def test_a_count_is_exact_for_every_row(width: int, sparsity: float) -> None:
    rows = torch.randn(5, width).bfloat16()
    keep = kept_count(width, sparsity)
    assert (~drop_all_but(rows, keep, torch.ones(1))).sum(1).tolist() == [keep] * 5


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_counts_are_measured_exactly_on_any_text(name: str) -> None:
    model = tiny_model(name)
    with TEAL(sparsity=0.5, policy="topk").apply(model, _tokens()) as work:
        assert set(work.measure(_tokens(seed=5)).values()) == {0.5}
        state = work.state()
        masked = model(_tokens().input_ids).logits
    assert all(gate["keep"] for gate in state.meta["gates"])
    fresh = tiny_model(name)
    method = TEAL(sparsity=0.5, policy="topk")
    with method.reattach(fresh, state.meta, state.tensors):
        assert torch.equal(fresh(_tokens().input_ids).logits, masked)


@pytest.mark.parametrize(
    ("method", "dense"),
    [
        (TEAL(protocol="paper"), 12),
        (WINA(protocol="paper"), 0),
        (RSparse(protocol="paper", alpha=1.0), 21),
    ],
)
def test_the_papers_mask_their_own_tokens(method, dense: int) -> None:
    model, data = tiny_model("llama"), _tokens()
    plain = model(data.input_ids).logits
    with method.apply(model, data):
        masked = model(data.input_ids).logits
    assert torch.equal(masked[:, :dense], plain[:, :dense])
    assert not torch.allclose(masked[:, dense], plain[:, dense], atol=1e-3)


def test_a_share_counts_the_real_tokens_of_each_row() -> None:
    positions = Positions(0, 0.5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions.begin(mask=mask, shape=(2, 6))
    dense = positions.dense(torch.zeros(2, 6, 1))
    assert dense is not None
    real = dense[..., 0] & mask.bool()
    assert real.int().tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    # A decoded token is behind any share of what came before it.
    positions.begin(past=9, shape=(1, 1))
    dense = positions.dense(torch.zeros(1, 1, 1))
    assert dense is not None
    assert not bool(dense)


def test_a_score_without_a_paper_has_no_protocol_of_one() -> None:
    with pytest.raises(GossamerError, match="no masking protocol"):
        Invariant(protocol="paper")
    with pytest.raises(GossamerError, match="protocol is 'own'"):
        TEAL(protocol="own")
    with pytest.raises(GossamerError, match="policy is 'most'"):
        TEAL(policy="most")


def test_the_hull_drops_points_above_a_chord() -> None:
    points = [(0.0, 0.0), (0.5, 3.0), (0.2, 0.1), (1.0, 4.0)]
    assert hull(points) == [(0.0, 0.0), (0.2, 0.1), (1.0, 4.0)]


def test_the_budget_goes_where_it_is_cheap() -> None:
    curves = {0: [(0.5, 0.1), (1.0, 0.2)], 1: [(0.5, 10.0), (1.0, 20.0)]}
    assert across(curves, {0: 1.0, 1: 1.0}, 0.5) == pytest.approx({0: 1.0, 1: 0.0})
    assert across(curves, {0: 1.0, 1: 1.0}, 0.6) == pytest.approx({0: 1.0, 1: 0.2})


def test_between_points_errors_follow_a_power() -> None:
    points = refined([(0.2, 0.04), (0.4, 0.16), (0.8, 1.28)], 0.1)
    assert points[0] == (0.0, 0.0)
    found = {round(s, 3): e for s, e in points}
    expected = {0.1: 0.01, 0.2: 0.04, 0.3: 0.09, 0.4: 0.16, 0.6: 0.54, 0.8: 1.28}
    assert {s: found[s] for s in expected} == pytest.approx(expected)


def test_two_blocks_are_evened_where_their_slopes_meet() -> None:
    # Errors s^2 and 3 s^2: slopes meet at shares in the proportion 3 to 1.
    curves = {b: [(s, k * s * s) for s in (0.25, 0.5, 0.75)] for b, k in ((0, 1.0), (1, 3.0))}
    found = across(curves, {0: 1.0, 1: 1.0}, 0.4)
    assert found == pytest.approx({0: 0.6, 1: 0.2}, abs=0.02)


@given(
    errors=st.lists(st.floats(0.0, 9.0), min_size=8, max_size=8),
    sizes=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    sparsity=st.floats(0.01, 0.95),
)
def test_the_mean_over_blocks_is_met(errors, sizes, sparsity: float) -> None:
    grid = grid_of(sparsity)
    curves = {b: list(zip(grid, errors[4 * b : 4 * b + len(grid)], strict=True)) for b in (0, 1)}
    shares = across(curves, dict(enumerate(map(float, sizes))), sparsity)
    mean = sum(shares[b] * sizes[b] for b in (0, 1)) / sum(sizes)
    assert mean == pytest.approx(sparsity)
    assert all(-1e-12 <= share <= 1 + 1e-12 for share in shares.values())


def test_allocation_across_blocks_meets_the_target_on_a_model() -> None:
    model = tiny_model("llama")
    method = TEAL(sparsity=0.5, allocation="global", step=0.5)
    with method.apply(model, _tokens(4, 32)) as work:
        assert work.report().sparsity == pytest.approx(0.5)


def test_a_plan_for_other_weights_of_the_same_shapes_is_refused() -> None:
    model, data = tiny_model("llama"), _tokens()
    with TEAL().apply(model, data) as work:
        state = work.state()
    other = tiny_model("llama", seed=1)
    ours = fingerprint(model, find_sites(model))
    theirs = fingerprint(other, find_sites(other))
    with pytest.raises(GossamerError, match=f"{ours}.*{theirs}"):
        TEAL().reattach(other, state.meta, state.tensors)
    # Another dtype is the same model.
    with TEAL().reattach(tiny_model("llama").bfloat16(), state.meta, state.tensors):
        pass


def test_tokens_that_surprise_the_model_are_reported() -> None:
    # A random model predicts nothing, as any model does with another one's tokens.
    with TEAL().apply(tiny_model("llama"), _tokens()) as work:
        (warning,) = work.report().warnings
    assert "tokenizer" in warning


@pytest.mark.parametrize("change", ["embedding", "head", "norm", "scale", "shape"])
def test_a_plan_is_refused_wherever_the_model_differs(change: str) -> None:
    with TEAL().apply(tiny_model("llama"), _tokens()) as work:
        state = work.state()
        ours = fingerprint(work.model, work.sites)
    other = tiny_model("gpt2" if change == "shape" else "llama")
    with torch.no_grad():
        if change == "embedding":
            other.model.embed_tokens.weight.mul_(1.5)
        elif change == "head":
            other.lm_head.weight.copy_(other.lm_head.weight.roll(1, 0))
        elif change == "norm":
            other.model.layers[1].input_layernorm.weight.mul_(1.5)
        elif change == "scale":
            for parameter in other.parameters():
                parameter.mul_(3)
    theirs = fingerprint(other, find_sites(other))
    with pytest.raises(GossamerError, match=f"{ours}.*{theirs}"):
        TEAL().reattach(other, state.meta, state.tensors)
    if change != "shape":
        # Plans from before there were fingerprints stay readable.
        old = {name: value for name, value in state.meta.items() if name != "model"}
        with TEAL().reattach(other, old, state.tensors):
            pass


def test_a_cast_of_a_bfloat16_checkpoint_keeps_the_fingerprint() -> None:
    model = tiny_model("llama").bfloat16()
    found = set()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        model = model.to(dtype)
        found.add(fingerprint(model, find_sites(model)))
    assert len(found) == 1
