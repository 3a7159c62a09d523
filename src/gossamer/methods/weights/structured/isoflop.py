"""Sparse layers that cost what the dense layer they replace costs: Sparse-IFT's four forms.

A larger layer is made so sparse that its multiply-adds per input equal those of the dense one. The
count is theoretical: run with dense kernels, as here, the layers cost their full size.
Shapes: O = out, I = in, K = branches, D = inner width, R = rank, s = sparsity.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.core import GossamerError, check_count, kept_count
from gossamer.methods.weights.structured.masked import MaskedModule, normal, options_of
from gossamer.methods.weights.structured.sizes import (
    doped_rank,
    factorized_width,
    parallel_branches,
    wide_factor,
)

__all__ = [
    "Activation",
    "MaskedLinear",
    "SparseDoped",
    "SparseFactorized",
    "SparseParallel",
    "sparse_wide",
]

Activation = Literal["linear", "relu"]


class MaskedLinear(MaskedModule, nn.Linear):
    """``nn.Linear`` with some weights held at zero: one layer of Sparse Wide.

    Parameters
    ----------
    kept : weights that stay, at random places drawn from ``generator``.
    gain : the output's variance is gain² times the mean square of the inputs: weights are normal
        with variance gain² / (fan-in * (1 - sparsity)).

    Source: arXiv 2303.11525, §3; initialisation §B.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kept: int,
        gain: float = sqrt(2.0),
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        check_count("kept", kept, 1)
        options = options_of(device, dtype, generator)
        self._masked_parameter("weight", (out_features, in_features), kept, options)
        self._add_bias(bias, options)
        self._draw("weight", kept / out_features, gain, generator)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.live("weight"), self.bias)

    def dense(self) -> Tensor:
        return self.live("weight")

    def folded_norm(self) -> Tensor:
        return self.live("weight").square().sum()


def sparse_wide(
    widths: Sequence[int],
    sparsity: float,
    bias: bool = True,
    *,
    gain: float = sqrt(2.0),
    generator: torch.Generator | None = None,
) -> list[MaskedLinear]:
    """The layers of a network whose hidden widths are multiplied by 1 / sqrt(1 - s).

    Every layer keeps exactly as many weights as its dense counterpart has, so it costs the same:
    layers between hidden widths are sparse at s, the first and the last, which grow on one side
    only, at 1 - sqrt(1 - s) (up to the rounding of the widths).

    Parameters
    ----------
    widths : inputs, hidden widths, outputs of the dense network; at least one hidden width.
    """
    if len(widths) < 3:
        raise GossamerError(f"widths are {list(widths)}; Sparse Wide needs a hidden width")
    factor = wide_factor(sparsity)
    wide = [widths[0], *(round(factor * width) for width in widths[1:-1]), widths[-1]]
    sides = zip(wide[:-1], wide[1:], widths[:-1], widths[1:], strict=True)
    return [
        MaskedLinear(i, o, bias, kept=old_i * old_o, gain=gain, generator=generator)
        for i, o, old_i, old_o in sides
    ]


class SparseParallel(MaskedModule):
    """Sum of 1 / (1 - s) sparse layers of the dense one's shape: y = sum over j of phi(W_j x).

    Parameters
    ----------
    activation : phi, ``linear`` or ``relu``. A following batch norm is the network's own affair.

    Source: arXiv 2303.11525, §3. Departs from the released code: no batch norm in a branch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        activation: Activation = "linear",
        gain: float = sqrt(2.0),
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        K = parallel_branches(sparsity)
        kept = kept_count(K * in_features * out_features, sparsity)
        options = options_of(device, dtype, generator)
        self._masked_parameter("weight", (K, out_features, in_features), kept, options)
        self._add_bias(bias, options)
        # Of K branches together every output reads I (1 - s) K = I inputs.
        self._draw("weight", kept / out_features, gain, generator)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.live("weight")
        if self.activation == "linear":
            return linear(x, weight.sum(0), self.bias)
        y = linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2]).relu().sum(-2)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        _linear_only(self.activation)
        return self.live("weight").sum(0)

    def folded_norm(self) -> Tensor:
        weight = self.live("weight")
        return (weight if self.activation != "linear" else weight.sum(0)).square().sum()


class SparseFactorized(MaskedModule):
    """Two sparse factors with a wider inner width: y = V phi(U x), both sparse at s.

    Parameters
    ----------
    activation : phi, ``linear`` or ``relu``.

    Source: arXiv 2303.11525, §3. Departs from the released code: phi has no batch norm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        activation: Activation = "linear",
        gain: float = sqrt(2.0),
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        D = factorized_width(in_features, out_features, sparsity)
        options = options_of(device, dtype, generator)
        inner = 1.0 if activation == "linear" else sqrt(2.0)
        for name, shape, power in (("U", (D, in_features), inner), ("V", (out_features, D), gain)):
            kept = kept_count(shape[0] * shape[1], sparsity)
            self._masked_parameter(name, shape, kept, options)
            self._draw(name, kept / shape[0], power, generator)
        self._add_bias(bias, options)

    def forward(self, x: Tensor) -> Tensor:
        z = linear(x, self.live("U"))
        return linear(z if self.activation == "linear" else z.relu(), self.live("V"), self.bias)

    def dense(self) -> Tensor:
        _linear_only(self.activation)
        return self.live("V") @ self.live("U")

    def folded_norm(self) -> Tensor:
        if self.activation != "linear":
            return self.live("U").square().sum() + self.live("V").square().sum()
        return self.dense().square().sum()


class SparseDoped(MaskedModule):
    """A sparse matrix and a dense low-rank one: y = (M * W) x + V U x.

    Source: arXiv 2303.11525, §3. Half of the output's variance comes from either part at first.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        gain: float = sqrt(2.0),
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        R = doped_rank(in_features, out_features, sparsity)
        kept = kept_count(in_features * out_features, sparsity)
        options = options_of(device, dtype, generator)
        self._masked_parameter("weight", (out_features, in_features), kept, options)
        half = gain / sqrt(2.0) if R else gain
        self._draw("weight", kept / out_features, half, generator)
        for name, shape, fan, power in (
            ("U", (R, in_features), in_features, 1.0),
            ("V", (out_features, R), R, half),
        ):
            value = normal(shape, fan, power, generator).to(options["device"], dtype)
            self.register_parameter(name, nn.Parameter(value))
        self._add_bias(bias, options)

    def forward(self, x: Tensor) -> Tensor:
        low = linear(linear(x, self.get_parameter("U")), self.get_parameter("V"))
        return linear(x, self.live("weight"), self.bias) + low

    def dense(self) -> Tensor:
        return self.live("weight") + self.get_parameter("V") @ self.get_parameter("U")

    def folded_norm(self) -> Tensor:
        product = self.get_parameter("V") @ self.get_parameter("U")
        return product.square().sum() + self.live("weight").square().sum()


def _linear_only(activation: str) -> None:
    if activation != "linear":
        raise GossamerError(
            f"a layer with {activation} inside amounts to no matrix; use activation linear"
        )
