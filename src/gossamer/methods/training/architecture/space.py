"""Search spaces: places in a network where one of several operations is to be chosen.

A space is any network that holds :class:`MixedOp` modules. Shapes: N samples, W width of a cell.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, unknown
from gossamer.methods.training.architecture.masked import SparseConv2d, SparseLinear

__all__ = [
    "Cell",
    "MixedOp",
    "Zero",
    "conv_choices",
    "conv_space",
    "decided",
    "linear_choices",
    "linear_space",
    "mixed_ops",
]

Choices = Mapping[str, Callable[[], nn.Module]]


class Zero(nn.Module):
    """No connection: zeros of the input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) to (...)."""
        return torch.zeros_like(x)


class MixedOp(nn.Module):
    """All operations of a place at once, weighted by the softmax of the architecture's parameters.

    Parameters
    ----------
    choices : name of an operation to what makes one; all must map alike shapes to alike shapes.

    Examples
    --------
    >>> place = MixedOp({"linear": lambda: nn.Linear(8, 8), "identity": nn.Identity, "none": Zero})
    >>> place.chances()
    {'linear': 0.333..., 'identity': 0.333..., 'none': 0.333...}

    Source: arXiv 1806.09055 (DARTS), eq. 2.
    """

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        if not choices:
            raise GossamerError("a MixedOp has nothing to choose from; give at least one operation")
        if not isinstance(choices, Mapping) or not all(map(callable, choices.values())):
            raise GossamerError(
                f"a MixedOp's choices are {choices!r}; give a dict of name to what makes a module"
            )
        self.choices = dict(choices)
        # A list: names such as "half" or "type" are those of methods of every module.
        self.options = nn.ModuleList(make() for make in choices.values())
        self.alpha = nn.Parameter(torch.zeros(len(self.options)))

    def forward(self, x: Tensor) -> Tensor:
        """What the operations make of an input, mixed."""
        shares = self.alpha.softmax(0)
        found = [share * op(x) for share, op in zip(shares, self.options, strict=True)]
        return torch.stack(found).sum(0)

    def chances(self) -> dict[str, float]:
        """Softmax of the architecture's parameters, by operation."""
        shares: list[float] = self.alpha.detach().double().softmax(0).tolist()
        return dict(zip(self.choices, shares, strict=True))

    def best(self) -> str:
        """The operation of the largest parameter, the first among equals; no :class:`Zero`.

        The share of doing nothing says how little a place should add to the mix, not that it can
        be left out. Source: arXiv 1806.09055 (DARTS), §2.4.
        """
        shares = self.chances()
        nothing = [isinstance(op, Zero) for op in self.options]
        real = [n for n, zero in zip(shares, nothing, strict=True) if not zero] or list(shares)
        return max(real, key=lambda name: shares[name])


class Cell(nn.Module):
    """A small graph: node by node, the sum of an operation on every earlier node.

    The output is the input plus the mean of the nodes, so that an operation adds to what there is,
    while it is one of several and when it is alone.

    Parameters
    ----------
    choices : of every edge. nodes : beside the input.
    """

    def __init__(self, choices: Choices, nodes: int = 2) -> None:
        super().__init__()
        self.edges = nn.ModuleDict(
            {f"{i}_{j}": MixedOp(choices) for j in range(1, nodes + 1) for i in range(j)}
        )
        self.nodes = nodes

    def forward(self, x: Tensor) -> Tensor:
        """A tensor to one of its shape."""
        values = [x]
        for j in range(1, self.nodes + 1):
            parts = [self.edges[f"{i}_{j}"](values[i]) for i in range(j)]
            values.append(torch.stack(parts).sum(0))
        return x + torch.stack(values[1:]).mean(0)


def linear_choices(width: int) -> Choices:
    """Of vectors (N, W): ReLU and a linear layer, dense or sparse; identity; none."""
    return {
        "linear": lambda: nn.Sequential(nn.ReLU(), nn.Linear(width, width)),
        "sparse_linear": lambda: nn.Sequential(nn.ReLU(), SparseLinear(width, width)),
        "identity": nn.Identity,
        "none": Zero,
    }


def conv_choices(channels: int) -> Choices:
    """Of images (N, C, H, W): ReLU and a 3 x 3 convolution, dense or sparse; identity; none."""
    return {
        "conv": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)),
        "sparse_conv": lambda: nn.Sequential(
            nn.ReLU(), SparseConv2d(channels, channels, 3, padding=1)
        ),
        "identity": nn.Identity,
        "none": Zero,
    }


def _only(choices: Choices, names: tuple[str, ...]) -> Choices:
    for name in names:
        if name not in choices:
            raise unknown("operation", name, tuple(choices))
    return {name: choices[name] for name in names} if names else choices


def linear_space(
    inputs: int, classes: int, *, width: int = 64, cells: int = 1, nodes: int = 2, ops: str = ""
) -> nn.Sequential:
    """A perceptron to be searched: a sparse layer, cells, and a sparse layer of classes.

    Parameters
    ----------
    ops : names of :func:`linear_choices`, separated by commas; all by default.

    Examples
    --------
    >>> print(linear_space(64, 10)(torch.zeros(2, 64)).shape)
    torch.Size([2, 10])
    """
    choices = _only(linear_choices(width), _names(ops))
    return nn.Sequential(
        nn.Flatten(),
        SparseLinear(inputs, width),
        *(Cell(choices, nodes) for _ in range(cells)),
        nn.ReLU(),
        SparseLinear(width, classes),
    )


def conv_space(
    colours: int, classes: int, *, channels: int = 8, cells: int = 1, nodes: int = 2, ops: str = ""
) -> nn.Sequential:
    """A small convolutional network to be searched; the mean over the image goes to the classes.

    Parameters
    ----------
    ops : names of :func:`conv_choices`, separated by commas; all by default.
    """
    choices = _only(conv_choices(channels), _names(ops))
    return nn.Sequential(
        SparseConv2d(colours, channels, 3, padding=1),
        *(Cell(choices, nodes) for _ in range(cells)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SparseLinear(channels, classes),
    )


def _names(ops: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in ops.split(",") if word.strip())


def mixed_ops(model: nn.Module) -> dict[str, MixedOp]:
    """The places where a network is to be searched, by name.

    Raises
    ------
    GossamerError
        If there are none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, MixedOp)}
    if not found or "" in found:
        raise GossamerError(
            f"{type(model).__name__} holds nothing to search: put a MixedOp of some operations "
            "where one is to be chosen, or take linear_space or conv_space"
        )
    return found


def decided(model: nn.Module, architecture: Mapping[str, str]) -> nn.Module:
    """A copy of a space with fresh operations of an architecture in their places.

    Weights outside of these places are drawn anew as well, where a module knows how.

    Parameters
    ----------
    architecture : place to the name of its operation.

    Raises
    ------
    GossamerError
        If it does not fit the space.
    """
    places = mixed_ops(model)
    if set(places) != set(architecture):
        odd = sorted(set(places) ^ set(architecture))
        raise GossamerError(f"the architecture does not fit this space: {', '.join(odd[:3])}")
    found = deepcopy(model)
    for name, op in architecture.items():
        choices = places[name].choices
        if op not in choices:
            raise unknown(f"operation of {name}", op, tuple(choices))
        parent, _, child = name.rpartition(".")
        setattr(found.get_submodule(parent), child, choices[op]())
    for module in found.modules():
        renew = getattr(module, "reset_parameters", None)
        if callable(renew):
            renew()
    return found
