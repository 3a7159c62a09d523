"""The activated gate of an MLP: one number per neuron that decides whether the neuron is read.

With v = phi(W_g x), neuron j contributes v_j (W_u x)_j W_d[:, j], so where v_j is zero neither row
j of W_u nor column j of W_d is needed. The gate matrix itself is always read: CATS' two thirds of
the MLP. Without a gate matrix, phi(W_u x) is the input of W_d, and only its columns are saved.
Shapes: F = neurons.
"""

from collections.abc import Iterable

from torch import nn

from gossamer.core import GossamerError, Site
from gossamer.methods.activations.gates import Tap, input_taps

__all__ = ["NEURONS", "neuron_taps"]

NEURONS = "mlp.neurons"
"""Role that stands for the neurons of every MLP of a block, experts included."""

_HOMES = ("torch.nn.modules.activation", "transformers.activations")


def neuron_taps(model: nn.Module, sites: Iterable[Site], active: float = 1.0) -> tuple[Tap, ...]:
    """A tap at the activated gate of every MLP of a block.

    Parameters
    ----------
    sites : of one block. active : share of a layer's experts that run for a token.

    Raises
    ------
    GossamerError
        If a gated MLP computes its activation without a module of its own.
    """
    sites = tuple(sites)
    named = {site.name: site for site in sites}
    taps = []
    for tap in input_taps(sites, ("mlp.down", "experts.down"), active):
        mates = [[named[n] for n in down.coupled if n in named] for down in tap.sites]
        gated = any(s.role in ("mlp.gate", "mlp.gate_up", "experts.gate_up") for s in mates[0])
        ups = tuple(
            next(s for s in own if s.role in ("mlp.up", "mlp.gate_up", "experts.gate_up"))
            for own in mates
            if gated
        )
        taps.append(_neurons(model, tap, ups) if gated else tap)
    return tuple(taps)


def _neurons(model: nn.Module, tap: Tap, ups: tuple[Site, ...]) -> Tap:
    """The tap of a gated MLP, from that of its down projection."""
    home, role, module = tap.module.rpartition(".")[0], NEURONS, tap.module
    if tap.sites[0].expert is not None:
        home, role = tap.module, "experts.neurons"
    else:
        module = _activation(model, home)
    return Tap(
        name=f"{home}.neurons",
        role=role,
        block=tap.block,
        module=module,
        # A column of W_d and a row of W_u, of equal length.
        size=2 * tap.size,
        features=tap.features,
        sites=tap.sites,
        ups=ups,
    )


def _activation(model: nn.Module, home: str) -> str:
    """Path of the one activation function beside the MLP's matrices."""
    found = [
        f"{home}.{name}"
        for name, module in model.get_submodule(home).named_children()
        if type(module).__module__.startswith(_HOMES)
        or (not any(True for _ in module.parameters()) and "act" in name.lower())
    ]
    if len(found) != 1:
        raise GossamerError(
            f"{home} has {len(found)} activation functions as modules, one is needed to gate its "
            "neurons; gate the inputs of its matrices instead, for example with teal"
        )
    return found[0]
