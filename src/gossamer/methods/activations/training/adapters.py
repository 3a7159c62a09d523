"""Low-rank updates of frozen matrices: y = W x + s B A x while training, merged afterwards.

A plain small module instead of a library: what is trained is two thin matrices a site.
Shapes: O and I sides of a matrix, r = rank.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from math import sqrt

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Site, check_count

__all__ = ["LowRank"]


class LowRank(nn.Module):
    """Trainable low-rank updates at work on a model as hooks; a context manager.

    B starts at zero, so that the model is unchanged until the first update.

    Parameters
    ----------
    sites : matrices to update; those of stacked experts are refused.
    rank : r. scale : s. seed : of A.

    Source: arXiv 2106.09685, §4.1.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        *,
        rank: int = 8,
        scale: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("rank", rank, 1)
        self.sites = tuple(sites)
        if any(site.expert is not None for site in self.sites):
            raise GossamerError("low-rank updates of stacked experts are not supported")
        if not self.sites:
            raise GossamerError("no matrix has one of the roles given; choose other roles")
        self.scale = scale
        # Not a submodule: the model's parameters are not this module's.
        object.__setattr__(self, "model", model)
        generator = torch.Generator().manual_seed(seed)
        down, up = [], []
        for site in self.sites:
            weight = site.weight(model)
            noise = (torch.rand(rank, site.shape[1], generator=generator) * 2 - 1) / sqrt(
                site.shape[1]
            )
            down.append(nn.Parameter(noise.to(weight)))
            up.append(nn.Parameter(weight.new_zeros(site.shape[0], rank)))
        self.down, self.up = nn.ParameterList(down), nn.ParameterList(up)

    def update(self, index: int) -> Tensor:
        """s B A of a site, (O, I)."""
        return self.scale * self.up[index] @ self.down[index]

    def __enter__(self) -> "LowRank":
        with ExitStack() as stack:
            for site, down, up in zip(self.sites, self.down, self.up, strict=True):
                owner = site.owner(self.model)
                stack.callback(owner.register_forward_hook(self._hook(down, up)).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _hook(self, down: Tensor, up: Tensor):
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + self.scale * (args[0] @ down.T) @ up.T

        return add

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates to the weights; take the hooks off before using the model."""
        for index, site in enumerate(self.sites):
            weight = site.weight(self.model)
            weight += self.update(index).to(weight)
