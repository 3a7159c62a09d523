"""Reprogramming: a prompt makes a frozen network do another task; is a ticket worse at it?"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.methods.training.imp import IMP
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.reprogramming import Reprogramming
from gossamer.methods.training.tickets.rounds import find_ticket

__all__ = ["CLAIMS"]

_CANVAS = 16
_STEPS = 400
# A random mask of this small network learns nothing at first; a tenth of the operations each.
_RANDOM_STEPS = 2500
Pair = tuple[Tensor, Tensor]
Attach = Callable[[nn.Module, torch.optim.Optimizer], Any]


@cache
def _digits(first: int) -> tuple[Pair, Pair]:
    """(8, 8) images of five digits from the first on, to train on and to test on."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0
    y = torch.tensor(labels) - first
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    wanted = order[(y[order] >= 0) & (y[order] < 5)]
    half = len(wanted) // 2
    return (x[wanted[:half]], y[wanted[:half]]), (x[wanted[half:]], y[wanted[half:]])


@cache
def _upscaled() -> tuple[Pair, Pair]:
    """The digits 0 to 4 at the size of the canvas."""
    (x, y), (tx, ty) = _digits(0)
    size = (_CANVAS, _CANVAS)
    large, tested = (interpolate(i, size, mode="bilinear", align_corners=False) for i in (x, tx))
    return (large, y), (tested, ty)


def _convolutions(seed: int) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (_CANVAS // 4) ** 2, 32),
            nn.ReLU(),
            nn.Linear(32, 5),
        )


def _perceptron(seed: int) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(_CANVAS**2, 64), nn.ReLU(), nn.Linear(64, 5))


def _train(net: nn.Module, seed: int, attach: Attach | None = None, steps: int = _STEPS) -> None:
    """SGD on the upscaled digits 0 to 4, its rate falling to 0."""
    (x, y), _ = _upscaled()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    sparsifier = None if attach is None else attach(net, optimizer)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        if sparsifier is not None and step < sparsifier.updates:
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1.0 - step / steps)
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
        optimizer.zero_grad()


@torch.no_grad()
def _upstream(net: nn.Module) -> float:
    """Accuracy on the digits 0 to 4, in percent."""
    _, (x, y) = _upscaled()
    return 100.0 * float((net(x).argmax(1) == y).double().mean())


def _on_others(
    net: nn.Module, seed: int, adapter: Literal["prompt", "probe"] = "prompt", **values: Any
) -> Figures:
    """Accuracy in percent and calibration error on the digits 5 to 9."""
    train, test = _digits(5)
    method = Reprogramming(adapter=adapter, canvas=_CANVAS, seed=seed, **values)
    with method.apply(net, train) as work:
        found = work.quality(test)
    return {"accuracy": 100.0 * found["accuracy"], "ece": found["ece"]}


def _prompted(seed: int) -> Figures:
    """Accuracy on the digits 5 to 9: trained prompt, no map, no training, probe."""
    net = _perceptron(seed)
    _train(net, seed, steps=200)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    epochs = 30
    figures = {
        "prompt": _on_others(net, seed, epochs=epochs, lr=0.05)["accuracy"],
        "unmapped": _on_others(net, seed, epochs=epochs, lr=0.05, remap_every=0)["accuracy"],
        # A rate at which nothing is learned leaves the label map of the untrained frame.
        "map": _on_others(net, seed, epochs=1, lr=1e-12)["accuracy"],
        "probe": _on_others(net, seed, "probe", epochs=epochs)["accuracy"],
        "upstream": _upstream(net),
    }
    changed = [not torch.equal(value, before[name]) for name, value in net.state_dict().items()]
    return {**figures, "changed": float(sum(changed))}


def _prompted_check(runs: Sequence[Figures]) -> Verdict:
    if any(f["changed"] for f in runs):
        return Verdict.FAILS
    prompt, untrained, probe = (mean(runs, name) for name in ("prompt", "map", "probe"))
    if not 20.0 < untrained < prompt or probe <= 50.0:
        return Verdict.FAILS
    return Verdict.HOLDS if prompt > mean(runs, "unmapped") else Verdict.WEAKER


def _networks(seed: int) -> dict[str, nn.Module]:
    """Dense, and at 90 %: ticket of one pruning, ticket of many rounds, random mask."""
    values = {"sparsity": 0.9, "steps": _STEPS, "seed": seed}

    def random(net: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return RandomPruning(sparsity=0.9, steps=_RANDOM_STEPS, seed=seed).attach(net, optimizer)

    def train(net: nn.Module, attach: Attach) -> None:
        _train(net, seed, attach)

    nets: dict[str, nn.Module] = {
        name: _convolutions(seed) for name in ("dense", "magnitude", "imp", "random")
    }
    _train(nets["dense"], seed)
    _train(nets["random"], seed, random, _RANDOM_STEPS)
    find_ticket(IMP(**values, prune=0.9, rewind=0.05), nets["magnitude"], train, undo=False)
    find_ticket(IMP(**values, rewind=0.05), nets["imp"], train, undo=False)
    return nets


def _tickets(seed: int) -> Figures:
    """Upstream accuracy, and accuracy and calibration error of prompts and probes."""
    figures: dict[str, float] = {}
    for name, net in _networks(seed).items():
        figures[f"{name}_upstream"] = _upstream(net)
        for short, adapter in (("vp", "prompt"), ("lp", "probe")):
            found = _on_others(net, seed, adapter)  # type: ignore[arg-type]
            figures |= {f"{name}_{short}_{key}": value for key, value in found.items()}
    return figures


def _tickets_check(runs: Sequence[Figures]) -> Verdict:
    """Of either ticket, in at least 4 of 5 seeds, where upstream accuracies match."""
    verdicts: list[Verdict] = []
    for name in ("magnitude", "imp"):
        matched = [f for f in runs if abs(f[f"{name}_upstream"] - f["dense_upstream"]) <= 1.0]
        if len(matched) < len(runs) - 1:
            verdicts.append(Verdict.NOT_TESTABLE)
            continue
        both = [
            f[f"{name}_vp_accuracy"] < f["dense_vp_accuracy"]
            and f[f"{name}_vp_ece"] >= f["dense_vp_ece"]
            for f in matched
        ]
        verdicts.append(Verdict.HOLDS if sum(both) >= 4 else Verdict.FAILS)
    if all(v is Verdict.NOT_TESTABLE for v in verdicts):
        return Verdict.NOT_TESTABLE
    if all(v is Verdict.HOLDS for v in verdicts):
        return Verdict.HOLDS
    return Verdict.WEAKER if Verdict.HOLDS in verdicts else Verdict.FAILS


CLAIMS = (
    Claim(
        name="a prompt reprograms a frozen network",
        sentence="A learned frame around the images, with a label map that follows it, makes a "
        "frozen network tell classes it has never seen; not a bit of the network changes.",
        paper="§3: visual prompting by iterative label mapping, and linear probing",
        experiment="perceptron 256-64-5 trained on the digits 0 to 4 upscaled to 16 x 16, then the "
        "digits 5 to 9 in a frame 2 wide, 30 epochs: accuracy with the trained frame, the same "
        "with classes in their order, with a label map and no training, and of a linear probe",
        run=_prompted,
        check=_prompted_check,
        ours="accuracy {prompt:.1f} %, classes in their order {unmapped:.1f} %, no training "
        "{map:.1f} %, probe {probe:.1f} %; on its own task {upstream:.1f} %",
    ),
    Claim(
        name="tickets are worse reprogrammers",
        sentence="A ticket as accurate on its own task as the dense network is less accurate "
        "behind a visual prompt, and no better calibrated, in 4 of 5 seeds.",
        paper="abstract: tickets are not universal, their accuracy drops on some targets under "
        "visual prompts; dense networks are better calibrated",
        experiment="convolutions 8 and 16, linear 32 and 5, trained on the digits 0 to 4 upscaled "
        "to 16 x 16 for 400 updates; tickets at 90 % of one magnitude pruning and of 11 rounds, "
        "both rewound; a random mask trained 2500 updates; target digits 5 to 9, frame 2 wide, 100 "
        "epochs; own accuracies within a point",
        run=_tickets,
        check=_tickets_check,
        ours="prompt: accuracy dense {dense_vp_accuracy:.1f} %, magnitude ticket "
        "{magnitude_vp_accuracy:.1f} %, IMP {imp_vp_accuracy:.1f} %, random "
        "{random_vp_accuracy:.1f} %; ECE {dense_vp_ece:.3f}, {magnitude_vp_ece:.3f}, "
        "{imp_vp_ece:.3f}, {random_vp_ece:.3f}; probe: {dense_lp_accuracy:.1f} %, "
        "{magnitude_lp_accuracy:.1f} %, {imp_lp_accuracy:.1f} %, {random_lp_accuracy:.1f} %; ECE "
        "{dense_lp_ece:.3f}, {magnitude_lp_ece:.3f}, {imp_lp_ece:.3f}, {random_lp_ece:.3f}; own "
        "task {dense_upstream:.1f} %, {magnitude_upstream:.1f} %, {imp_upstream:.1f} %, "
        "{random_upstream:.1f} %",
        tier="small",
        seeds=(0, 1, 2, 3, 4),
    ),
)
