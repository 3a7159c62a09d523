"""Small tensors that train beside an N:M weight: scales of its parts, a branch of low rank.

Both change the weight that the network computes with, so their gradients follow from that
weight's; no module is replaced. Shapes: O outputs, I inputs of a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.training.nm.adam import adam_step

__all__ = ["LowRank", "Scale", "Side"]


class Side(ABC):
    """Tensors that train with one layer, by plain Adam.

    Attributes
    ----------
    tensors : by name. states : of Adam, by the same names.
    by_row : names of those with a row for every output, which lie over processes as the weight.
    """

    by_row: ClassVar[frozenset[str]]

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.states: dict[str, dict[str, Any]] = {name: {} for name in tensors}

    @abstractmethod
    def shown(self, weight: Tensor) -> Tensor:
        """The weight (O, I) the network computes with."""

    @abstractmethod
    def gradients(self, weight: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of the tensors from that of the shown weight, which becomes the weight's.

        Parameters
        ----------
        weight : (O, I), what :meth:`shown` was given. gradient : changed in place.
        """

    def size(self, rows: int) -> int:
        """Number of values beside a weight of so many outputs, over all processes."""
        return sum(
            rows * prod(tensor.shape[1:]) if name in self.by_row else tensor.numel()
            for name, tensor in self.tensors.items()
        )

    def update(self, gradients: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
        """One update, at the rate of the layer's weights and without weight decay."""
        values = {
            "lr": group["lr"],
            "betas": group.get("betas", (0.9, 0.999)),
            "eps": group.get("eps", 1e-8),
        }
        for name, gradient in gradients.items():
            adam_step(self.tensors[name], gradient, self.states[name], values)

    def each_row(
        self, values: Mapping[str, Tensor], do: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Values and moments by name, with something done to those with a row for every output."""
        return {
            name: do(value) if value.dim() and name.partition(".")[0] in self.by_row else value
            for name, value in values.items()
        }

    def to_dict(self) -> dict[str, Tensor]:
        """Values and Adam's state."""
        found = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for name, state in self.states.items():
            found |= {f"{name}.{part}": value.clone() for part, value in state.items()}
        return found

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`to_dict`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(values[name])
            self.states[name] = {
                key.removeprefix(f"{name}."): value.clone().to(tensor.device)
                for key, value in values.items()
                if key.startswith(f"{name}.")
            }


class Scale(Side):
    """One factor for every output and each of ``parts`` equal parts of the inputs, at first 1."""

    by_row = frozenset({"scale"})

    def __init__(self, weight: Tensor, parts: int) -> None:
        if weight.shape[1] % parts:
            raise GossamerError(
                f"{parts} scales do not divide {weight.shape[1]} inputs; choose another number"
            )
        self.parts = parts
        super().__init__(scale=weight.new_ones(len(weight), parts))

    def shown(self, weight: Tensor) -> Tensor:
        """w · a, part by part."""
        parts = self._parts(weight)
        return (parts * self.tensors["scale"].unsqueeze(2)).flatten(1)

    def gradients(self, weight: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Each factor's gradient is the part's Σ g · w; the weights' is g · a."""
        found = self._parts(gradient * weight).sum(2)
        gradient.copy_(self.shown(gradient))
        return {"scale": found}

    def _parts(self, weight: Tensor) -> Tensor:
        # Sizes in full: a shard may have no rows, from which none could be inferred.
        return weight.unflatten(1, (self.parts, weight.shape[1] // self.parts))


class LowRank(Side):
    """SLoRB: S P beside the sparse weight; P sums blocks of inputs, S starts at block means.

    Parameters
    ----------
    removed : (O, I), the removed weights, zeros elsewhere. block : inputs of a block, k.
    """

    by_row = frozenset({"spread"})

    def __init__(self, removed: Tensor, block: int) -> None:
        rows, columns = removed.shape
        if columns % block:
            raise GossamerError(
                f"blocks of {block} inputs do not divide {columns}; choose another slorb"
            )
        blocks = columns // block
        project = torch.eye(blocks, device=removed.device, dtype=removed.dtype)
        super().__init__(
            spread=removed.view(rows, blocks, block).mean(2),
            project=project.repeat_interleave(block, dim=1),
        )

    @property
    def product(self) -> Tensor:
        """S P, (O, I)."""
        return self.tensors["spread"] @ self.tensors["project"]

    def shown(self, weight: Tensor) -> Tensor:
        """w + S P."""
        return weight + self.product

    def gradients(self, weight: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """g Pᵀ and Sᵀ g; the weights' gradient stays."""
        return {
            "spread": gradient @ self.tensors["project"].T,
            "project": self.tensors["spread"].T @ gradient,
        }
