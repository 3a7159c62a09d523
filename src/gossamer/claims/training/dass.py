"""DASS: an architecture that is chosen by the loss of the pruned network survives pruning."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.threads import one_thread
from gossamer.claims.training.digits import accuracy, images
from gossamer.methods.training.architecture.masked import SparseLinear, masked_layers, plain, sparse
from gossamer.methods.training.architecture.search import Trainer, batches, train_found
from gossamer.methods.training.architecture.space import MixedOp, decided, linear_space, mixed_ops
from gossamer.methods.training.dass import DASS

__all__ = ["CLAIMS"]

_WIDE, _CLASSES = 32, 4


class _Half(nn.Module):
    """Tells two of four classes apart, whatever is pruned: it has no weights."""

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        found = x @ self.basis
        return torch.cat([found[:, :2], torch.zeros_like(found[:, 2:])], 1)


class _First(nn.Module):
    """The first outputs, as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :_CLASSES]


@one_thread()
def _planted(seed: int) -> Figures:
    """Share that the operation without weights gets: after pruning it is the better one.

    The classes lie along directions that no single input shows. A dense matrix finds them all, one
    of 1 % of the weights finds almost nothing; the other operation always knows half.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(_WIDE, _WIDE, generator=generator)).Q
    y = torch.randint(0, _CLASSES, (512,), generator=generator)
    hidden = torch.randn(512, _WIDE, generator=generator)
    hidden[torch.arange(512), y] += 4.0
    x = hidden @ basis.T
    shares: dict[str, float] = {}
    for objective in ("sparse", "dense"):
        choices = {"matrix": lambda: SparseLinear(_WIDE, _WIDE), "half": lambda: _Half(basis)}
        space = nn.Sequential(MixedOp(choices), _First())
        method = DASS(
            sparsity=0.997,
            search=objective,
            pretrain=40,
            learn=40,
            tune=40,
            alpha_lr=0.05,
            seed=seed,
        )
        shares[objective] = method.find(space, (x, y)).chances["0"]["half"]
    return shares


def _planted_check(runs: Sequence[Figures]) -> Verdict:
    right = all(f["sparse"] > 0.5 > f["dense"] for f in runs)
    return Verdict.HOLDS if right else Verdict.FAILS


@one_thread()
def _masks(seed: int) -> Figures:
    """Accuracy of one perceptron whose masks are learned, largest weights, or absent."""
    space = linear_space(64, 10, width=48, nodes=1, ops="linear")
    architecture = dict.fromkeys(mixed_ops(space), "linear")
    found: dict[str, float] = {}
    for name, sparsity in (("learned", 0.95), ("magnitude", 0.95), ("dense", 0.0)):
        plan = DASS(pretrain=100, learn=100, tune=50, sparsity=sparsity, seed=seed).plan()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            net = decided(space, architecture)
        sparse(net, sparsity)
        for layer in masked_layers(net).values():
            layer.learned = name == "learned"
        generator = torch.Generator().manual_seed(seed)
        Trainer(net, plan).phases(batches(images(), plan.batch_size, generator))
        plain(net)
        found[name] = accuracy(net)["accuracy"]
    return found


def _masks_check(runs: Sequence[Figures]) -> Verdict:
    if mean(runs, "learned") <= mean(runs, "magnitude"):
        return Verdict.FAILS
    return Verdict.HOLDS if all(f["learned"] > f["magnitude"] for f in runs) else Verdict.WEAKER


def _weights(space: nn.Module, architecture: Mapping[str, str]) -> int:
    named = decided(space, architecture).named_parameters()
    return sum(p.numel() for name, p in named if name.endswith("weight"))


@one_thread()
def _searched(seed: int) -> Figures:
    """Accuracy at 95 % of the architectures that three searches find, each trained alike.

    ``_alike`` : the same with as many weights kept as of the sparse search's architecture.
    """
    method = DASS(seed=seed)
    full = linear_space(64, 10)
    # Without pruning a sparse operation is a dense one: it would be there twice.
    others = linear_space(64, 10, ops="linear,identity,none")
    found = {
        "sparse": method.find(full, images()).architecture,
        "dense": replace(method, search="dense").find(others, images()).architecture,
        "random": replace(method, search="random").find(others, images()).architecture,
    }
    kept = 0.05 * _weights(full, found["sparse"])
    figures: dict[str, float] = {}
    for name, architecture in found.items():
        # What was found is pruned layer by layer alike, whatever an operation was called.
        size = _weights(full, architecture)
        figures[f"{name}_weights"] = 0.05 * size
        alike = max(0.0, 1.0 - kept / size)
        for ending, sparsity in (("", 0.95), ("_alike", alike), ("_unpruned", 0.0)):
            if name == "sparse" and ending == "_alike":
                continue
            plan = replace(method, sparsity=sparsity).plan()
            net = train_found(full, architecture, images(), plan)
            plain(net)
            figures[name + ending] = accuracy(net)["accuracy"]
    return figures


def _searched_check(runs: Sequence[Figures]) -> Verdict:
    sparse_, dense, random = (mean(runs, name) for name in ("sparse", "dense", "random"))
    if sparse_ >= dense and sparse_ >= random:
        return Verdict.HOLDS
    return Verdict.WEAKER if sparse_ >= max(dense, random) - 0.5 else Verdict.FAILS


CLAIMS = (
    Claim(
        name="chooses what survives pruning",
        sentence="A search that looks at the pruned network chooses another operation than one "
        "that looks at the dense network: one that pruning does not harm.",
        paper="architectures searched dense lose more when pruned; no figure",
        experiment="planted: a matrix that is right when dense and useless with 3 of its 1024 "
        "weights, and an operation without weights that is half right: softmax share of the latter",
        run=_planted,
        check=_planted_check,
        ours="the operation that survives gets {sparse:.0%} in the sparse search, {dense:.0%} in "
        "the dense one",
    ),
    Claim(
        name="learned scores beat magnitude",
        sentence="Scores learned at the target sparsity keep better weights than the largest ones.",
        paper="no figure of its own; masks after HYDRA (from memory)",
        experiment="digits, 64-48-48-10 at 95 % in every layer, 100 updates dense, 100 of scores, "
        "50 of the weights that stay: accuracy",
        run=_masks,
        check=_masks_check,
        ours="accuracy: learned {learned:.1f} %, largest weights {magnitude:.1f} %, dense "
        "{dense:.1f} %",
    ),
    Claim(
        name="sparse search beats dense search",
        sentence="At high sparsity, an architecture searched on the pruned network is at least as "
        "good as one searched on the dense network and then pruned.",
        paper="sparse MobileNet-v2 73.44 % to 81.35 % on CIFAR-10",
        experiment="digits, one cell of three operations 64 wide (linear, sparse linear, identity, "
        "none), 95 % of every layer removed, 900 updates of what was found: accuracy; beside it "
        "with equally many weights kept, and unpruned",
        run=_searched,
        check=_searched_check,
        ours="accuracy: sparse search {sparse:.1f} % ({sparse_weights:.0f} weights), dense "
        "{dense:.1f} % ({dense_weights:.0f}), random {random:.1f} % ({random_weights:.0f}); with "
        "as many weights as the first: dense {dense_alike:.1f} %, random {random_alike:.1f} %; "
        "unpruned {sparse_unpruned:.1f}, {dense_unpruned:.1f}, {random_unpruned:.1f} %",
        tier="small",
    ),
)
