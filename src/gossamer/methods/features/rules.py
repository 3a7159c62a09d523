"""Selection rules: which latents of a row stay, as small plug-ins over one encoder.

A rule turns pre-activations into codes and may add a penalty to the loss. It is an
``nn.Module``, so that thresholds it learns or tracks are trained and stored with the dictionary.
Shapes: R = rows, M = latents, K = entries a padded row of codes has room for, D = input width.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.core import Budget, GossamerError, Unstructured, unknown

__all__ = ["RULES", "Codes", "ReLU", "Rule", "TopK", "combine", "rule_from_config", "top_rows"]


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


def top_rows(score: Tensor, keep: int) -> Tensor:
    """The columns that ``Unstructured("row").select(score, Budget(keep=keep))`` keeps.

    ``torch.topk`` finds them several times faster than a mask does, but leaves open which of two
    equal scores wins; rows with a tie at the edge are decided by ``select`` itself.

    Parameters
    ----------
    score : (R, M), no NaN. keep : at most M.

    Returns
    -------
    int64, (R, keep), best first.
    """
    rows, columns = score.shape
    if not 0 < keep <= columns:
        raise GossamerError(f"k is {keep}; a code of {columns} latents keeps 1 to {columns}")
    values, indices = score.topk(min(keep + 1, columns), dim=1)
    if rows and bool(values[:, 0].isnan().any()):
        raise GossamerError("activations hold NaN, which has no rank; load the model in float32")
    indices = indices[:, :keep]
    if keep < columns:
        tied = (values[:, keep] == values[:, keep - 1]).nonzero()[:, 0]
        if len(tied):
            kept = Unstructured(per="row").select(score[tied], Budget(keep=keep))
            lower = kept.indices()[1].view(-1, keep)
            order = score[tied].gather(1, lower).argsort(dim=1, descending=True, stable=True)
            indices = indices.index_copy(0, tied, lower.gather(1, order))
    return indices


def combine(codes: Codes, atoms: Tensor) -> Tensor:
    """Sum of the named atoms, each times its value: (R, K) codes and (M, D) atoms to (R, D)."""
    values, at = codes.values.to(atoms.dtype), codes.indices.clamp_min(0)
    # Measured on CPU: reading the named atoms wins by 3x at K / M = 1/40 and 30x at 1/256; a
    # row that names much of the dictionary is cheaper as a matrix product.
    if 4 * values.shape[1] >= atoms.shape[0]:
        dense = values.new_zeros(len(values), atoms.shape[0])
        return dense.scatter_add(1, at, values) @ atoms
    return nn.functional.embedding_bag(at, atoms, per_sample_weights=values, mode="sum")


class Rule(nn.Module, ABC):
    """Decides which latents of a row stay. ``forward`` maps (R, M) pre-activations to codes."""

    architecture: ClassVar[str]
    """Name of the rule in files, as SAELens spells it."""

    @property
    def budget(self) -> int | None:
        """Most entries a row may keep; None where the rule sets no count."""
        return None

    @abstractmethod
    def forward(self, pre: Tensor) -> Codes:
        """Codes of a batch; in training mode a rule may let the rows of a batch compete."""

    def penalty(self, codes: Codes, norms: Tensor) -> Tensor | None:
        """What the loss adds for a batch, in units of squared error, or None.

        Parameters
        ----------
        norms : (M,), L2 norm of each atom.
        """
        return None

    def config(self) -> dict[str, Any]:
        """The rule's own fields in a file's configuration."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Rule":
        """The rule whose fields a file's configuration holds."""
        return cls()


class TopK(Rule):
    """The k largest pre-activations of each row, where positive: at most k, never more.

    Source: arXiv 2406.04093, §2.3.
    """

    architecture = "topk"

    def __init__(self, k: int) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise GossamerError(f"k is {k!r}; give a whole number of latents, at least 1")
        self.k = k

    @property
    def budget(self) -> int:
        return self.k

    def forward(self, pre: Tensor) -> Codes:
        indices = top_rows(pre.detach(), self.k)
        values = pre.gather(1, indices).relu()
        return Codes(values, indices.masked_fill(values.detach() <= 0, -1))

    def config(self) -> dict[str, Any]:
        return {"k": self.k}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TopK":
        return cls(config["k"])


class ReLU(Rule):
    """Every positive pre-activation stays; an L1 penalty on the codes makes them few.

    Parameters
    ----------
    coefficient : weight of sum_i z_i ‖d_i‖ beside the squared error (summed over D), for inputs
        scaled to a mean norm of sqrt(D); only training reads it.

    Source: arXiv 2309.08600.
    """

    architecture = "standard"

    def __init__(self, coefficient: float = 0.0) -> None:
        super().__init__()
        self.coefficient = coefficient

    def forward(self, pre: Tensor) -> Codes:
        values = pre.relu()
        at = torch.arange(pre.shape[1], device=pre.device).expand(pre.shape)
        return Codes(values, at.masked_fill(values.detach() <= 0, -1))

    def penalty(self, codes: Codes, norms: Tensor) -> Tensor:
        weights = norms[codes.indices.clamp_min(0)]
        return self.coefficient * (codes.values * weights).sum()


RULES: dict[str, type[Rule]] = {rule.architecture: rule for rule in (TopK, ReLU)}


def rule_from_config(config: dict[str, Any]) -> Rule:
    """The rule that a file's configuration names.

    Raises
    ------
    GossamerError
        If the architecture is none of :data:`RULES`.
    """
    name = config.get("architecture")
    if name not in RULES:
        raise unknown("dictionary architecture", name, tuple(RULES))
    return RULES[name].from_config(config)
