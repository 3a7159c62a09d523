"""Monarch matrices: a dense matrix as two block-diagonal ones with a permutation between them.

Rows are read as pairs (l, j) and columns as pairs (k, i); for every (k, j) the (L, I) slice of the
matrix has rank b. The left factor maps each of the K input blocks, the right factor each of the J
output blocks; here K = J = ``nblocks``.
Shapes: O = out = L * J, I_all = in = K * I (both padded up to multiples of nblocks), b = rank,
N = rows of the input.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gossamer.core import GossamerError, check_count, check_sparsity

__all__ = ["MonarchLinear", "MonarchShape", "multiply_out", "project"]


@dataclass(frozen=True)
class MonarchShape:
    """The sizes of a Monarch matrix.

    Parameters
    ----------
    in_features, out_features : of the dense matrix it stands for.
    nblocks : blocks of each factor, K = J.
    rank : b, the rank of every slice; at most the smaller side of a slice.

    Raises
    ------
    GossamerError
        If a number is below 1, there are more blocks than features, or the rank is too large.
    """

    in_features: int
    out_features: int
    nblocks: int
    rank: int

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "nblocks", "rank"):
            check_count(name, getattr(self, name), 1)
        if self.nblocks > min(self.in_features, self.out_features):
            raise GossamerError(
                f"nblocks is {self.nblocks}, the layer is {self.out_features} x "
                f"{self.in_features}; give at most {min(self.in_features, self.out_features)}"
            )
        if self.rank > self.full_rank:
            raise GossamerError(
                f"rank is {self.rank}, slices are {self.rows} x {self.columns}; "
                f"give at most {self.full_rank}"
            )

    @classmethod
    def choose(
        cls,
        in_features: int,
        out_features: int,
        nblocks: int,
        *,
        rank: int | None = None,
        sparsity: float | None = None,
    ) -> "MonarchShape":
        """The shape with this rank, or the largest rank that removes this share of parameters.

        With neither, every inner block is square: rank = smaller side of a slice / nblocks, and a
        square matrix keeps 2 / nblocks of its parameters. The rank is at least 1.

        Raises
        ------
        GossamerError
            If both are given.
        """
        if rank is not None and sparsity is not None:
            raise GossamerError("rank and sparsity both fix the parameters; give one of them")
        if rank is None:
            thin = cls(in_features, out_features, nblocks, 1)
            if sparsity is None:
                rank = max(1, thin.full_rank // nblocks)
            else:
                share = (1.0 - check_sparsity(sparsity)) * in_features * out_features
                # The small slack takes 0.75 * 64 / 4 for the 12 it is.
                rank = max(1, min(thin.full_rank, int(share / thin.parameters + 1e-9)))
        return cls(in_features, out_features, nblocks, rank)

    @property
    def columns(self) -> int:
        """I, input features of a block."""
        return -(-self.in_features // self.nblocks)

    @property
    def rows(self) -> int:
        """L, output features of a block."""
        return -(-self.out_features // self.nblocks)

    @property
    def full_rank(self) -> int:
        """Rank at which every matrix is a Monarch matrix."""
        return min(self.rows, self.columns)

    @property
    def left(self) -> tuple[int, int, int]:
        """(K, J * b, I)."""
        return self.nblocks, self.nblocks * self.rank, self.columns

    @property
    def right(self) -> tuple[int, int, int]:
        """(J, L, K * b)."""
        return self.nblocks, self.rows, self.nblocks * self.rank

    @property
    def parameters(self) -> int:
        """Numbers in both factors, padding included."""
        return self.nblocks**2 * self.rank * (self.rows + self.columns)

    @property
    def sparsity(self) -> float:
        """Share of the dense matrix's parameters that is gone; negative where there are more."""
        return 1.0 - self.parameters / (self.in_features * self.out_features)


def _sliced(weight: Tensor, shape: MonarchShape) -> Tensor:
    """(J, K, L, I) slices of a padded (out, in) matrix, as a view."""
    J = K = shape.nblocks
    missing = (
        0,
        K * shape.columns - shape.in_features,
        0,
        J * shape.rows - shape.out_features,
    )
    if any(missing):
        weight = pad(weight, missing)
    return weight.reshape(shape.rows, J, K, shape.columns).permute(1, 2, 0, 3)


def project(weight: Tensor, shape: MonarchShape) -> tuple[Tensor, Tensor]:
    """The Monarch matrix nearest to a dense one in Frobenius norm.

    The slices share no parameter, so each takes its own truncated singular value decomposition;
    the squared error is the sum over all slices of the squared singular values beyond the first b.
    Singular values are shared out evenly between the factors.

    Parameters
    ----------
    weight : (out, in), real or complex. Half precision is computed in float32.

    Returns
    -------
    (Tensor, Tensor)
        left (K, J * b, I) and right (J, L, K * b), in the weight's dtype.

    Raises
    ------
    GossamerError
        If the weight has another shape or holds NaN or infinity.

    Source: arXiv 2204.00595, Theorem 1 and Algorithm 1, for ranks above 1 slice by slice.
    """
    if tuple(weight.shape) != (shape.out_features, shape.in_features):
        raise GossamerError(
            f"the weight is {tuple(weight.shape)}, the Monarch shape "
            f"{(shape.out_features, shape.in_features)}"
        )
    if not torch.isfinite(weight).all():
        raise GossamerError("the weight holds NaN or infinity; it cannot be projected")
    precise = weight if weight.dtype.itemsize > 2 else weight.float()
    slices = _sliced(precise, shape)
    J = K = shape.nblocks
    b = shape.rank
    left = precise.new_empty(K, J, b, shape.columns)
    right = precise.new_empty(J, shape.rows, K, b)
    for j in range(J):
        U, S, Vh = torch.linalg.svd(slices[j], full_matrices=False)
        root = S[:, :b].sqrt()
        left[:, j] = root[:, :, None] * Vh[:, :b]
        right[j] = (U[:, :, :b] * root[:, None, :]).transpose(0, 1)
    return (
        left.reshape(shape.left).to(weight.dtype),
        right.reshape(shape.right).to(weight.dtype),
    )


def multiply_out(left: Tensor, right: Tensor, shape: MonarchShape) -> Tensor:
    """The dense (out, in) matrix of two factors."""
    J = K = shape.nblocks
    slices = torch.einsum(
        "jlkb,kjbi->ljki",
        right.view(J, shape.rows, K, shape.rank),
        left.view(K, J, shape.rank, shape.columns),
    )
    dense = slices.reshape(J * shape.rows, K * shape.columns)
    return dense[: shape.out_features, : shape.in_features]


class MonarchLinear(nn.Module):
    """A drop-in for ``nn.Linear`` that multiplies by a Monarch matrix.

    Two batched products over blocks, with one regrouping between them and one after: 2 / nblocks
    of the dense multiply-adds at the default rank. Small layers are slower than dense all the
    same; ``benchmarks/monarch.py`` shows from where on it pays.

    Parameters
    ----------
    nblocks : blocks of each factor. rank : of every slice; None: square inner blocks.

    Source: arXiv 2204.00595, §3.1; initialisation as Kaiming-uniform with a = sqrt(5) per block.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        nblocks: int = 4,
        rank: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shape = MonarchShape.choose(in_features, out_features, nblocks, rank=rank)
        options = {"device": device, "dtype": dtype}
        self.left = nn.Parameter(torch.empty(self.shape.left, **options))
        self.right = nn.Parameter(torch.empty(self.shape.right, **options))
        self.bias = nn.Parameter(torch.empty(out_features, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new factors from +-1 / sqrt(inputs of a block), the bias as ``nn.Linear`` does."""
        for factor in (self.left, self.right):
            bound = 1.0 / sqrt(factor.shape[-1])
            nn.init.uniform_(factor, -bound, bound)
        if self.bias is not None:
            bound = 1.0 / sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None, *, nblocks: int = 4, rank: int | None = None
    ) -> "MonarchLinear":
        """The layer nearest to a dense one, see :func:`project`.

        Parameters
        ----------
        weight : (out, in). bias : (out,) or None; copied.
        """
        shape = MonarchShape.choose(weight.shape[1], weight.shape[0], nblocks, rank=rank)
        return cls.from_factors(shape, *project(weight.detach(), shape), bias)

    @classmethod
    def from_factors(
        cls, shape: MonarchShape, left: Tensor, right: Tensor, bias: Tensor | None
    ) -> "MonarchLinear":
        """The layer with these factors (taken as they are) and a copy of this bias.

        Raises
        ------
        GossamerError
            If a factor has another shape.
        """
        for name, factor, size in (("left", left, shape.left), ("right", right, shape.right)):
            if tuple(factor.shape) != size:
                raise GossamerError(f"{name} is {tuple(factor.shape)}; the shape asks for {size}")
        sizes = shape.in_features, shape.out_features
        # On meta nothing is drawn, so no random number is used up.
        layer = cls(*sizes, False, nblocks=shape.nblocks, rank=shape.rank, device="meta")
        layer.left, layer.right = nn.Parameter(left), nn.Parameter(right)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        J = K = shape.nblocks
        b = shape.rank
        rows = x.reshape(-1, self.in_features)
        if K * shape.columns != self.in_features:
            rows = pad(rows, (0, K * shape.columns - self.in_features))
        N = rows.shape[0]
        blocks = rows.view(N, K, shape.columns).transpose(0, 1)
        z = torch.bmm(blocks, self.left.transpose(1, 2))
        # (K, N, J b) to (J, N, K b): every output block reads one part of every input block.
        z = z.view(K, N, J, b).permute(2, 1, 0, 3).reshape(J, N, K * b)
        y = torch.bmm(z, self.right.transpose(1, 2))
        # (J, N, L) to (N, L J): j runs fastest in the output.
        y = y.permute(1, 2, 0).reshape(N, shape.rows * J)[:, : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """The (out, in) matrix multiplied out, in the factors' dtype."""
        wide = self.left.dtype if self.left.dtype.itemsize > 2 else torch.float32
        made = multiply_out(self.left.detach().to(wide), self.right.detach().to(wide), self.shape)
        return made.to(self.left.dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The same function as a dense layer: how training goes on after reverse sparsification."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.dense())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nblocks={self.shape.nblocks}, rank={self.shape.rank}"
        )
