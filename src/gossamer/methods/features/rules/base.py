"""The protocol of selection rules: what a rule sees of a batch, and what it gives back.

A rule turns pre-activations into codes and may add terms to the loss. It is an ``nn.Module``, so
that thresholds it learns or tracks are trained and stored with the dictionary.
Shapes: R = rows, M = latents, K = entries a padded row of codes has room for, D = input width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.core import Budget, GossamerError, Unstructured
from gossamer.kernels.sparse_code import decode, top_rows

__all__ = [
    "Batch",
    "Codes",
    "Rule",
    "Step",
    "check_k",
    "combine",
    "pack",
    "places",
    "read",
    "rectified",
    "top_batch",
    "top_rows",
]


class Codes(NamedTuple):
    """Sparse codes in padded form; the M-wide code is never made.

    Parameters
    ----------
    values : (R, K), differentiable; 0 where padded.
    indices : int64, (R, K); -1 where padded.
    """

    values: Tensor
    indices: Tensor

    def fired(self) -> Tensor:
        """Latents of all entries that are not zero, with repeats; a negative value fires too."""
        return self.indices[(self.indices >= 0) & (self.values != 0)]


class Batch(NamedTuple):
    """What a rule may look at beside the pre-activations.

    Parameters
    ----------
    rows : (R, D), as the encoder reads them. atoms : (M, D_out). offset : (D_out,), ``b_dec``.
    gradient : (R, D_out), of the model's loss by the rows; None where nobody measured it.
    at : differentiable pre-activations at (R, K) places, 0 at -1; rules that gather read values
        through it alone, so that the encoder's gradient touches only the latents they name.
    """

    rows: Tensor
    atoms: Tensor
    offset: Tensor
    gradient: Tensor | None = None
    at: Callable[[Tensor], Tensor] | None = None


class Step(NamedTuple):
    """A batch after encoding and decoding, as the loss sees it.

    Parameters
    ----------
    pre : (R, M). codes : what the rule kept. error : (R, D_out), target minus reconstruction.
    """

    batch: Batch
    pre: Tensor
    codes: Codes
    error: Tensor


def check_k(k: object) -> int:
    """``k`` where it is a whole number of latents, at least 1."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise GossamerError(f"k is {k!r}; give a whole number of latents, at least 1")
    return k


def top_batch(score: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest entries of a whole (R, M) batch, in one competition."""
    columns = score.shape[1]
    if keep > score.numel():
        most = f"a code of {columns} latents keeps 1 to {columns}"
        raise GossamerError(f"k is {keep // max(1, len(score))}; {most}")
    if bool(score.sum().isnan()) and bool(score.isnan().any()):
        raise GossamerError("activations hold NaN, which has no rank; load the model in float32")
    return Unstructured(per="layer").select(score, Budget(keep=keep)).mask()


def places(keep: Tensor) -> Tensor:
    """The marked columns of each row of (R, M), padded with -1 to the longest row: (R, K)."""
    rows, columns = keep.nonzero(as_tuple=True)
    counts = keep.sum(1)
    width = int(counts.max()) if len(counts) else 0
    slot = torch.arange(len(rows), device=keep.device) - (counts.cumsum(0) - counts)[rows]
    return columns.new_full((len(keep), width), -1).index_put((rows, slot), columns)


def pack(values: Tensor, keep: Tensor) -> Codes:
    """Codes of the marked entries of a dense (R, M) code; differentiable in ``values``."""
    indices = places(keep)
    return read(values, indices)


def read(pre: Tensor, indices: Tensor, batch: Batch | None = None) -> Codes:
    """Codes whose values are the pre-activations at (R, K) places; 0 where padded."""
    if batch is not None and batch.at is not None:
        return Codes(batch.at(indices), indices)
    return Codes(pre.gather(1, indices.clamp_min(0)) * (indices >= 0), indices)


def rectified(codes: Codes) -> Codes:
    """The positive entries; the others become padding."""
    values = codes.values.relu()
    return Codes(values, codes.indices.masked_fill(values.detach() <= 0, -1))


def combine(codes: Codes, atoms: Tensor) -> Tensor:
    """Sum of the named atoms, each times its value: (R, K) codes and (M, D) atoms to (R, D)."""
    values, at = codes.values.to(atoms.dtype), codes.indices
    if not values.shape[1]:
        return values.new_zeros(len(values), atoms.shape[1])
    # Measured on CPU: reading the named atoms wins by 3x at K / M = 1/40 and 30x at 1/256; a
    # row that names much of the dictionary is cheaper as a matrix product.
    if 4 * values.shape[1] >= atoms.shape[0]:
        dense = values.new_zeros(len(values), atoms.shape[0])
        return dense.scatter_add(1, at.clamp_min(0), values) @ atoms
    return decode(values, at, atoms)


class Rule(nn.Module, ABC):
    """Decides which latents of a row stay. ``forward`` maps (R, M) pre-activations to codes.

    In training mode a rule may let the rows of a batch compete, and keeps its running figures;
    in eval mode the code of a row depends on that row alone.
    """

    architecture: ClassVar[str]
    """Name of the rule in files, as SAELens spells it where it has the rule."""
    encoder_bias: ClassVar[bool] = True
    """Whether the encoder has a bias of its own; without one ``b_enc`` stays zero."""
    gathers: ClassVar[bool] = False
    """Whether values are read through :attr:`Batch.at` alone, after selecting without a graph."""
    wants_gradient: ClassVar[bool] = False
    """Whether training reads the gradient of the model's loss beside the activations."""

    @property
    def budget(self) -> int | None:
        """Most entries a row may keep, or a batch on average; None where no count is set."""
        return None

    @abstractmethod
    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        """Codes of a batch."""

    def fit_loss(self, step: Step) -> Tensor:
        """How badly the codes reconstruct the batch, summed over rows and channels."""
        return step.error.square().sum()

    def penalty(self, step: Step) -> Tensor | None:
        """What the loss adds for a batch, in units of squared error, or None."""
        return None

    def underused(self, dead: Tensor) -> Tensor:
        """Latents that the auxiliary loss brings back, given those that are dead."""
        return dead

    def revive(self, pre: Tensor, pool: Tensor, keep: int, batch: Batch | None = None) -> Codes:
        """The codes with which underused latents, ``pool`` (U,), model the error of the others."""
        return rectified(read(pre, pool[top_rows(pre.detach()[:, pool], keep)], batch))

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Divide what is in units of the codes by the scale, as the dictionary's biases are."""

    def inference(self, latents: int) -> "Rule":
        """The rule that says in eval mode, without a batch, what this one learned."""
        return self

    def config(self) -> dict[str, Any]:
        """The rule's own fields in a file's configuration."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Rule":
        """The rule whose fields a file's configuration holds."""
        return cls()
