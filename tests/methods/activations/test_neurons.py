"""Gates on neurons: CATS, CHESS and the invariant score, and the identities between them."""

import pytest
import torch

from gossamer.core import QuantileSketch
from gossamer.methods.activations.cats import CATS
from gossamer.methods.activations.chess import CHESS
from gossamer.methods.activations.gates import Tap
from gossamer.methods.activations.invariant import Invariant
from gossamer.methods.activations.neurons import NEURONS, neuron_taps
from gossamer.models import Tokens, find_sites
from tests.models.tiny import tiny_model

torch.set_num_threads(1)
KINDS = (CATS, Invariant, CHESS)


def _tokens(rows: int = 6, length: int = 24, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (rows, length), generator=generator))


@pytest.mark.parametrize(
    ("name", "role", "size"),
    [
        ("llama", NEURONS, 2 * 32 * 64),
        ("phi3", NEURONS, 2 * 32 * 64),
        ("gpt2", "mlp.down", 4 * 32 * 32),
        ("opt", "mlp.down", 32 * 64),
        ("mixtral", "experts.neurons", 2 * 2 * 32 * 64),
    ],
)
def test_a_neuron_saves_its_up_row_and_its_down_column(name: str, role: str, size: int) -> None:
    model = tiny_model(name)
    sites = find_sites(model)
    active = 0.5 if name == "mixtral" else 1.0
    (tap,) = neuron_taps(model, sites.in_block(1), active)
    assert (tap.role, tap.size, tap.block) == (role, size, 1)
    assert bool(tap.ups) == (role != "mlp.down")


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_masked_neurons_are_masked_products(name: str) -> None:
    """The whole MLP, by hand: W_d (mask(phi(W_g x)) * W_u x)."""
    model, data = tiny_model(name), _tokens()
    work = CATS(sparsity=0.5, dense_prefix=0).apply(model, data)
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 24, 32)
    work._gates.positions.begin(shape=(1, 24))
    found = mlp(x)
    cut = next(iter(work.gates.values())).cut
    work.restore()
    if name == "phi3":
        gate, up = mlp.gate_up_proj(x).chunk(2, -1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    value = torch.nn.functional.silu(gate)
    expected = mlp.down_proj(value.masked_fill(value.abs() <= cut, 0) * up)
    torch.testing.assert_close(found, expected)
    assert 0.2 < float((value.abs() <= cut).float().mean()) < 0.8


def test_the_threshold_is_the_quantile_of_the_activated_gate_not_of_its_input() -> None:
    model, data = tiny_model("llama"), _tokens()
    seen: list[torch.Tensor] = []
    act = model.model.layers[0].mlp.act_fn
    handle = act.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    model(data.input_ids)
    handle.remove()
    with CATS(sparsity=0.3).apply(model, data) as work:
        cut = float(next(iter(work.gates.values())).cut)
    assert cut == pytest.approx(float(seen[0].abs().quantile(0.3)), rel=3e-3)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_chess_weighs_by_the_root_mean_square_of_up(name: str) -> None:
    model, data = tiny_model(name), _tokens()
    with CHESS(sparsity=0.4, attention=False).apply(model, data) as work:
        cuts = [g.cut for g in work.gates.values()]
    with CATS(sparsity=0.4).apply(model, data) as work:
        plain = [g.cut for g in work.gates.values()]
    assert all(c.numel() == 64 for c in cuts)
    assert all(c.numel() == 1 for c in plain)
    if name == "mixtral":
        return
    seen: list[torch.Tensor] = []
    mlp = model.model.layers[0].mlp
    up = mlp.up_proj if name == "llama" else mlp.gate_up_proj
    handle = up.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    model(data.input_ids)
    handle.remove()
    rows = seen[0] if name == "llama" else seen[0].chunk(2, -1)[1]
    rms = rows.double().square().mean((0, 1)).sqrt().float()
    product = cuts[0] * rms
    torch.testing.assert_close(product, product.mean().expand(64), rtol=1e-4, atol=0)


def test_chess_with_equal_up_outputs_is_cats() -> None:
    """m_j = 1 everywhere: the weighted quantile and cut are CATS' to the sketch's precision."""
    value = torch.randn(500, 16)
    plain = Tap("n", NEURONS, 0, "n", 1, 16, ())
    weighted = Tap("n", NEURONS, 0, "n", 1, 16, (), torch.ones(16))
    sketch = QuantileSketch(16)
    sketch.update(value)
    ours, cats = weighted.gate(0.5, sketch), plain.gate(0.5, sketch)
    assert torch.equal(ours.removes(value), cats.removes(value))
    # Without a gate matrix nothing multiplies, so the two methods coincide on whole models.
    model, data = tiny_model("gpt2"), _tokens()
    with CHESS(sparsity=0.5, attention=False).apply(model, data) as work:
        ours_cuts = [g.cut for g in work.gates.values()]
    with CATS(sparsity=0.5).apply(model, data) as work:
        assert all(
            torch.equal(a, b.cut) for a, b in zip(ours_cuts, work.gates.values(), strict=True)
        )


def test_chess_gates_q_and_o_only() -> None:
    with CHESS().apply(tiny_model("llama"), _tokens()) as work:
        roles = {gate.role for gate in work.gates.values()}
    assert roles == {"attention.q", "attention.o", NEURONS}
    with CHESS().apply(tiny_model("phi3"), _tokens()) as work:
        assert {gate.role for gate in work.gates.values()} == {"attention.o", NEURONS}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_invariant_score_ignores_both_kinds_of_scale(kind: type) -> None:
    model, data = tiny_model("llama"), _tokens()
    method = kind(sparsity=0.5) if kind is not CHESS else CHESS(sparsity=0.5, attention=False)

    def removed() -> torch.Tensor:
        with method.apply(model, data), torch.no_grad():
            return model(data.input_ids).logits

    before = removed()
    mlp = model.model.layers[0].mlp
    scale = 2.0 ** torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(0))
    mlp.up_proj.weight.data *= scale[:, None]
    mlp.down_proj.weight.data /= scale
    after = removed()
    if kind is CHESS:
        assert not torch.allclose(before, after, atol=1e-2)
    else:
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_stored_and_taken_up_again(kind: type, name: str) -> None:
    model, data = tiny_model(name), _tokens()
    method = kind(sparsity=0.5)
    with method.apply(model, data) as work:
        state, masked = work.state(), model(data.input_ids).logits
    fresh = tiny_model(name)
    with method.reattach(fresh, state.meta, state.tensors):
        assert torch.equal(fresh(data.input_ids).logits, masked)


def test_bytes_count_what_is_always_read() -> None:
    model = tiny_model("llama")
    with CATS(sparsity=0.5).apply(model, _tokens()) as work:
        mlp = 2 * 3 * 32 * 64 * 4
        assert work.weight_bytes_saved() == mlp / 3
        assert work.report().size == mlp / 4 * 2 / 3
