"""G2GNet: modular wiring is no worse than random wiring, and correlated units get connected."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.threads import one_thread
from gossamer.claims.training.digits import mlp, trained
from gossamer.methods.training.g2gnet import G2GNet
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.sparsifier.flops import updates_within

__all__ = ["CLAIMS"]

_INPUTS, _HIDDEN = 24, 24


@one_thread()
def _planted(seed: int) -> Figures:
    """Share of grown connections that join a planted pair, by how they grew.

    Inputs come in groups of three that carry one signal. A unit reads one input, so it fires with
    the two others of that group, to which it is not connected.
    """
    pairs = torch.arange(_HIDDEN)[:, None] // 3 == torch.arange(_INPUTS)[None, :] // 3
    shares: dict[str, float] = {}
    for growth in ("correlation", "random", "gradient"):
        generator = torch.Generator().manual_seed(seed)
        net = mlp(seed, (_INPUTS, _HIDDEN, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        # Kept: a connection of every unit to one input, and as many idle ones elsewhere.
        method = G2GNet(
            steps=40,
            every=20,
            watch=10,
            groups=4,
            exchange=0.5,
            growth=growth,
            skip="2",
            sparsity=1.0 - 2 * _HIDDEN / (_INPUTS * _HIDDEN),
            elsewhere=0.0,
            seed=seed,
        )
        sparsifier = method.attach(net, optimizer)
        mask = sparsifier.held["0.weight"].mask
        weight = sparsifier.held["0.weight"].weight
        with torch.no_grad():
            mask.copy_(torch.eye(_HIDDEN, dtype=torch.bool))
            idle = torch.rand(pairs.shape, generator=generator).masked_fill(pairs, -1.0)
            mask.view(-1)[idle.flatten().topk(_HIDDEN).indices] = True
            weight.copy_(torch.eye(_HIDDEN) + 1e-4 * mask)
        start = mask.clone()
        for _ in range(20):
            signal = torch.randn(64, _INPUTS // 3, generator=generator)
            noise = torch.randn(64, _INPUTS, generator=generator)
            x = signal.repeat_interleave(3, 1) + 0.5 * noise
            y = torch.randint(0, 4, (64,), generator=generator)
            cross_entropy(net(x), y).backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
        grown = mask & ~start
        shares[growth] = float((grown & pairs).sum() / grown.sum().clamp_min(1))
        sparsifier.remove()
    return shares


def _planted_check(runs: Sequence[Figures]) -> Verdict:
    if any(f["correlation"] < 0.95 for f in runs):
        return Verdict.FAILS
    return Verdict.HOLDS if all(f["random"] < 0.5 for f in runs) else Verdict.FAILS


@one_thread()
def _wiring(seed: int, steps: int, every: int) -> Figures:
    """Accuracy with rewiring, with fixed wiring, random and dense; the first three as dear."""
    moving = trained(G2GNet(steps=steps, every=every, watch=2, seed=seed), seed, steps)
    per_update = 3.0 * (1.0 - 0.75)
    longer = updates_within(3.0 * steps * moving["flops"], per_update)
    still = trained(G2GNet(steps=longer, exchange=0.0, seed=seed), seed, longer)
    chance = RandomPruning(sparsity=0.75, allocation="uniform", steps=longer, seed=seed)
    random = trained(chance, seed, longer)
    dense = trained(None, seed, steps)
    return {
        "hebbian": moving["accuracy"],
        "static": still["accuracy"],
        "random": random["accuracy"],
        "dense": dense["accuracy"],
        "ratio": moving["total"] / still["total"],
        "flops": moving["flops"],
        "longer": float(longer),
    }


def _wiring_check(runs: Sequence[Figures]) -> Verdict:
    if any(abs(f["ratio"] - 1.0) > 0.01 for f in runs):
        return Verdict.FAILS
    hebbian, static, random = (mean(runs, name) for name in ("hebbian", "static", "random"))
    if hebbian >= static >= random - 0.5:
        return Verdict.HOLDS
    return Verdict.WEAKER if min(hebbian, static) >= random - 0.5 else Verdict.FAILS


CLAIMS = (
    Claim(
        name="fires together, wires together",
        sentence="New connections join units whose activities are correlated.",
        paper="no figure; the rewiring rule is in the abstract",
        experiment="24 units that each read one of three inputs with one signal, 20 updates, half "
        "of 48 connections replaced: share of new ones to the two other inputs of the signal",
        run=_planted,
        check=_planted_check,
        ours="{correlation:.0%} of new connections by correlation, {random:.0%} at random, "
        "{gradient:.0%} by gradient",
    ),
    Claim(
        name="modular wiring learns as well as random",
        sentence="With 75 % of the connections gone, modular wiring with Hebbian rewiring is at "
        "least as good as without, and that no worse than random wiring, at equal training FLOPs.",
        paper="up to +4.3 % over dense on Fashion-MNIST, CIFAR-10 and CIFAR-100, up to 75 % sparse",
        experiment="digits, 64-300-100-10 at 75 % in every layer, 1500 updates of SGD with a "
        "change every 50, the others for as many operations: accuracy; static may be 0.5 points "
        "below random",
        run=lambda seed: _wiring(seed, 1500, 50),
        check=_wiring_check,
        ours="accuracy: rewired {hebbian:.2f} %, static {static:.2f} %, random {random:.2f} %, at "
        "{flops:.1%} of the operations of dense ({dense:.2f} %)",
        tier="small",
        seeds=(0, 1, 2, 3, 4),
    ),
)
