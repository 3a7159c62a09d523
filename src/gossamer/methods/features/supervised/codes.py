"""Supervised codes: one atom for every value of every attribute; an activation is their sum.

Shapes: R = rows, D = width, A = attributes, V = values of an attribute.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from gossamer.core import GossamerError, unknown

__all__ = ["SupervisedCodes"]

Kind = Literal["mse", "mean"]


@dataclass(frozen=True, eq=False)
class SupervisedCodes:
    """x is about mean + sum over attributes of the atom of the attribute's value.

    Parameters
    ----------
    mean : (D,). atoms : attribute to (V, D).
    """

    mean: Tensor
    atoms: Mapping[str, Tensor]

    @classmethod
    def fit(cls, rows: Tensor, attributes: Mapping[str, Tensor], kind: Kind = "mse") -> Self:
        """Read atoms off rows (R, D) whose attributes (R,) are known.

        Parameters
        ----------
        kind : ``mean``: the mean of the rows with a value, less the mean of all; ``mse``: least
            squares of the rows on all values at once, of smallest norm, so that attributes that
            go together are told apart.

        Raises
        ------
        GossamerError
            Without attributes.
        """
        if not attributes:
            raise GossamerError("no attribute is given; name at least one")
        rows = rows.double()
        mean = rows.mean(0)
        sizes = {name: int(codes.max()) + 1 for name, codes in attributes.items()}
        hot = [
            torch.nn.functional.one_hot(codes, sizes[name]).double()
            for name, codes in attributes.items()
        ]
        if kind == "mean":
            found = torch.cat([h.T @ (rows - mean) / h.sum(0)[:, None].clamp_min(1) for h in hot])
        else:
            found = torch.linalg.pinv(torch.cat(hot, 1)) @ (rows - mean)
        parts = found.float().split(list(sizes.values()))
        return cls(mean.float(), dict(zip(sizes, parts, strict=True)))

    def reconstruct(self, attributes: Mapping[str, Tensor]) -> Tensor:
        """(R, D) activations that attributes (R,) stand for."""
        made = self.mean
        for name, atoms in self.atoms.items():
            made = made + atoms[attributes[name]]
        return made

    def edit(self, attribute: str, source: Tensor | int | None, target: Tensor | int) -> Tensor:
        """What turns one value into another: its atom taken off, the other's added.

        Parameters
        ----------
        source, target : numbers of values, one or (R,); without a source nothing is taken off.
        """
        if attribute not in self.atoms:
            raise unknown("attribute", attribute, tuple(self.atoms))
        atoms = self.atoms[attribute]
        return atoms[target] if source is None else atoms[target] - atoms[source]
