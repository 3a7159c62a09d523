"""Gates at the neurons of an MLP, a count per token, low-rank repair: what runs where."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gossamer.methods.activations.cats import CATS
from gossamer.methods.activations.coreinfer import CoreInfer
from gossamer.methods.activations.gated import GatedModel
from gossamer.methods.activations.gates import Gate, LowRank
from gossamer.methods.activations.teal import TEAL
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.models import Tokens, find_sites
from tests.models.tiny import tiny_model

torch.set_num_threads(1)


@torch.no_grad()
def _decode(model, ids: Tensor, start: int) -> Tensor:
    output = model(input_ids=ids[:, :start], use_cache=True)
    found, cache = [], output.past_key_values
    for t in range(start, ids.shape[1]):
        output = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        found.append(output.logits[:, -1])
    return torch.stack(found, 1)


@torch.no_grad()
def _median(model, module: str, *, output: bool, ids: Tensor) -> Tensor:
    """Median size of what enters or leaves a module."""
    seen: list[Tensor] = []
    target = model.get_submodule(module)
    handle = target.register_forward_hook(
        lambda m, given, out: seen.append(out if output else given[0])
    )
    model(input_ids=ids)
    handle.remove()
    return seen[0].abs().flatten().median().reshape(1)


def _gates(model, roles: tuple[str, ...], ids: Tensor) -> list[Gate]:
    gates = []
    for block in range(2):
        home = f"model.layers.{block}"
        for role in roles:
            if role == "mlp.neurons":
                name, module = f"{home}.mlp.neurons", f"{home}.mlp.act_fn"
            else:
                kind, part = role.split(".")
                name = module = f"{home}.{'self_attn' if kind == 'attention' else kind}.{part}_proj"
            cut = _median(model, module, output=role == "mlp.neurons", ids=ids)
            gates.append(Gate(name, role, block, module, 4096, 0.5, cut))
    return gates


def _ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(seed))


def _most_agree(found: Tensor, masked: Tensor) -> None:
    off = (found - masked).abs().amax(-1).flatten()
    # A value that lies at its threshold may fall either way; that is seen at single tokens.
    assert float(off.kthvalue(max(1, int(0.8 * len(off)))).values) < 1e-4


@pytest.mark.parametrize(
    ("roles", "whole"),
    [
        (("mlp.neurons",), True),
        (("mlp.neurons", "mlp.gate", "mlp.down", "attention.q", "attention.o"), True),
        (("mlp.neurons", "mlp.up"), False),  # the native step has no threshold for both
    ],
)
def test_neurons(roles: tuple[str, ...], whole: bool) -> None:
    model = tiny_model("llama")
    applied = GatedModel(TEAL(), model, find_sites(model), _gates(model, roles, _ids()), 1)
    masked = _decode(model, _ids(1), 6)
    table = applied.accelerate(choice="axpy")
    execution = applied._execution
    assert execution is not None
    assert execution.whole is whole
    assert not applied.simulated
    _most_agree(_decode(model, _ids(1), 6), masked)
    if whole:
        assert "dot" in {row.chosen for row in table if "neurons" in row.layer}
        assert execution.program is not None
        read = execution.program.counters[: len(execution.program.names)]
        assert bool((read[:, 0] < read[:, 1]).all())
    applied.restore()
    assert torch.isfinite(_decode(model, _ids(1), 6)).all()


@pytest.mark.parametrize("kind", ["keep", "low rank"])
def test_counts_and_repairs_run_layer_by_layer(kind: str) -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    gates = _gates(model, ("mlp.down", "attention.q"), _ids())
    named = {site.name: site for site in sites.sites}
    if kind == "keep":
        gates = [replace(g, keep=named[g.name].shape[1] // 2, cut=torch.ones(1)) for g in gates]
    else:
        generator = torch.Generator().manual_seed(0)
        gates = [
            replace(
                g,
                low_rank=LowRank(
                    torch.randn(named[g.name].shape[0], 2, generator=generator) / 5,
                    torch.randn(2, named[g.name].shape[1], generator=generator) / 5,
                ),
            )
            for g in gates
        ]
    applied = GatedModel(TEAL(), model, sites, gates, 1)
    masked = _decode(model, _ids(1), 6)
    applied.accelerate(choice="axpy")
    assert applied._execution is not None
    assert not applied._execution.whole
    assert not applied.simulated
    torch.testing.assert_close(_decode(model, _ids(1), 6), masked, atol=1e-4, rtol=1e-4)
    applied.restore()


def test_a_method_that_joins_later_is_not_passed_by() -> None:
    """The native step knows the hooks that were there when it was tried; others end it."""
    model = tiny_model("llama")
    first = GatedModel(TEAL(), model, find_sites(model), _gates(model, ("mlp.down",), _ids()), 1)
    first.accelerate(choice="axpy")
    alone = _decode(model, _ids(1), 6)
    second = GatedModel(TEAL(), model, find_sites(model), _gates(model, ("mlp.up",), _ids()), 1)
    both = _decode(model, _ids(1), 6)
    second.restore()
    assert not torch.allclose(alone, both, atol=1e-3)
    assert torch.equal(_decode(model, _ids(1), 6), alone)
    first.restore()


@pytest.mark.parametrize("other", [CoreInfer(prompt=8), CATS()])
def test_a_method_that_was_there_before_is_not_passed_by(other) -> None:
    model, ids = tiny_model("llama"), _ids(1)
    first = other.apply(model, Tokens(_ids(), torch.ones_like(_ids())))
    second = GatedModel(TEAL(), model, find_sites(model), _gates(model, ("mlp.down",), _ids()), 1)
    masked = _decode(model, ids, 12)
    second.accelerate(choice="axpy")
    assert second._execution is not None
    assert not second._execution.whole
    assert second._execution.active == isinstance(other, CATS)
    torch.testing.assert_close(_decode(model, ids, 12), masked, atol=1e-4, rtol=1e-4)
    second.restore()
    first.restore()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_weights_that_change_later_are_read(name: str) -> None:
    model, ids = tiny_model(name), _ids(1)
    applied = GatedModel(TEAL(), model, find_sites(model), _gates(model, ("mlp.down",), _ids()), 1)
    applied.accelerate(choice="axpy")
    pruned = Magnitude(sparsity=0.7).apply(model)
    found = _decode(model, ids, 6)
    applied.decelerate()
    torch.testing.assert_close(found, _decode(model, ids, 6), atol=1e-4, rtol=1e-4)
    pruned.restore()
    applied.restore()


@pytest.mark.parametrize("roles", [("mlp.down",), ("mlp.neurons", "mlp.up")])
def test_a_method_of_another_kind_that_joins_later_decelerates(roles, caplog) -> None:
    """Smaller matrices and other weights are nothing the kernels were made for."""
    model, ids = tiny_model("llama"), _ids(1)
    data = Tokens(_ids(), torch.ones_like(_ids()))
    gated = GatedModel(TEAL(), model, find_sites(model), _gates(model, roles, _ids()), 1)
    alone = _decode(model, ids, 12)
    with CoreInfer(prompt=8).apply(model, data):
        masked = _decode(model, ids, 12)
    gated.accelerate(1, choice="axpy")
    with CoreInfer(prompt=8).apply(model, data):
        assert "coreinfer joins" in caplog.text
        assert gated.simulated
        assert torch.equal(_decode(model, ids, 12), masked)
    assert not torch.allclose(masked, alone, atol=1e-3)
    assert torch.equal(_decode(model, ids, 12), alone)
    gated.restore()
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_input_of_another_width_goes_to_the_module_itself() -> None:
    model = tiny_model("llama")
    gates = _gates(model, ("mlp.neurons", "mlp.up"), _ids())
    gated = GatedModel(TEAL(), model, find_sites(model), gates, 1)
    gated.accelerate(choice="axpy")
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    assert "forward" in vars(up)
    for width in (31, 33):
        with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            up(torch.ones(1, 1, width))
    gated.restore()
