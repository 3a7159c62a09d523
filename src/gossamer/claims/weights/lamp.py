"""LAMP allocates by layer-relative magnitude: better than uniform, and blind to layer scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.core import Budget, Selection, Unstructured
from gossamer.core.scores import lamp, magnitude, uniform_random

__all__ = ["CLAIMS"]

_SPARSITY = 0.95


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data: Any = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1297], order[1297:]
    return x[train], y[train], x[test], y[test]


def _train(
    net: nn.Sequential, x: Tensor, y: Tensor, epochs: int, masks: Mapping[str, Tensor]
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    weights = dict(net.named_parameters())
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name].mul_(mask)


def _select(net: nn.Sequential, rule: str, seed: int) -> dict[str, Selection]:
    weights = {n: p.detach() for n, p in net.named_parameters() if p.dim() == 2}
    budget = Budget(sparsity=_SPARSITY)
    if rule == "lamp":
        return Unstructured("model").select_model({n: lamp(w) for n, w in weights.items()}, budget)
    if rule == "global":
        scores = {n: magnitude(w) for n, w in weights.items()}
        return Unstructured("model").select_model(scores, budget)
    noise = rule == "random"
    return {
        n: Unstructured("layer").select(uniform_random(w, seed) if noise else magnitude(w), budget)
        for n, w in weights.items()
    }


def _run(seed: int) -> Figures:
    torch.manual_seed(seed)
    x, y, x_test, y_test = _digits(seed)
    net = nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    _train(net, x, y, 15, {})
    dense = {k: v.clone() for k, v in net.state_dict().items()}
    figures = {"dense": float((net(x_test).argmax(1) == y_test).float().mean())}
    for rule in ("lamp", "uniform", "random"):
        net.load_state_dict(dense)
        torch.manual_seed(seed)
        kept = _select(net, rule, seed)
        with torch.no_grad():
            for name, selection in kept.items():
                selection.apply_(net.get_parameter(name))
        _train(net, x, y, 3, {n: s.mask() for n, s in kept.items()})
        figures[rule] = float((net(x_test).argmax(1) == y_test).float().mean())
    net.load_state_dict(dense)
    before = {rule: _select(net, rule, seed) for rule in ("lamp", "global")}
    figures["fewest"] = float(min(s.kept for s in before["lamp"].values()))
    with torch.no_grad():
        net.get_parameter("2.weight").mul_(1024.0)
    for rule, held in before.items():
        after = _select(net, rule, seed)
        figures[f"{rule}_changed"] = float(
            sum(int((held[n].mask() != after[n].mask()).sum()) for n in held)
        )
    return figures


def _check(runs: Sequence[Figures]) -> Verdict:
    if any(f["lamp_changed"] or not f["global_changed"] or f["fewest"] < 1 for f in runs):
        return Verdict.FAILS
    gains = mean(runs, "lamp") - mean(runs, "uniform")
    if mean(runs, "lamp") <= mean(runs, "random"):
        return Verdict.FAILS
    return Verdict.HOLDS if gains >= 0 else Verdict.WEAKER if gains > -0.01 else Verdict.FAILS


CLAIMS = (
    Claim(
        name="beats uniform allocation",
        sentence="Layer-adaptive scores beat a uniform sparsity, empty no layer, and ignore the "
        "scale of a layer.",
        paper="better than uniform and global sparsity on CIFAR-10 (quoted from memory)",
        experiment="digits, 64-300-100-10 network, 95 % one shot and 3 epochs of retraining, 3 "
        "seeds; then one layer scaled by 1024",
        run=_run,
        check=_check,
        ours="accuracy dense {dense:.3f}, LAMP {lamp:.3f}, uniform {uniform:.3f}, random "
        "{random:.3f}; fewest weights kept in a layer {fewest:.0f}; masks changed by the scaling: "
        "LAMP {lamp_changed:.0f}, global {global_changed:.0f} weights",
    ),
)
