"""Crosscoder: one code for several layers at once.

Latents read and write several places of the residual stream; one that lives at both is one
latent, and how its atom's norm is shared between the places says where it lives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.rules import BatchTopK, Rule
from gossamer.methods.features.source import ActivationSource
from gossamer.models import find_sites

__all__ = ["Crosscoder", "ownership"]


@dataclass(frozen=True, kw_only=True)
class Crosscoder(CountedMethod):
    """Learn one dictionary of several modules' activations, k latents of a token on average.

    The activations of the sites, each scaled to the same mean norm, are read side by side and
    reconstructed side by side. At work, the reconstruction takes the place of the last site's
    output alone: changing an earlier site would change what the later ones give to read.

    Parameters
    ----------
    sites : paths of the modules in the order they run, at least 2; none: the middle block and
        the one before.
    hook : the last of the sites, when given.
    k : mean number of latents of a token, 1 <= k <= width.

    Source: Lindsey et al. 2024 (Transformer Circuits). Departs from the paper: BatchTopK in place
    of an L1 penalty on summed norms, which calls shared latents private by shrinking them; atoms
    have norm 1 over all sites together; ``b_dec`` is subtracted before encoding.
    """

    card: ClassVar[Card] = Card(
        title="Sparse Crosscoders for Cross-Layer Features and Model Diffing",
        year=2024,
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="outputs of several modules, jointly",
        score="pre-activation of a latent",
        pattern="unstructured per batch",
        budget="k latents of a token on average",
        schedule="constant",
        update="learned dictionary",
        kernel="sparse_code",
        departs="BatchTopK instead of an L1 penalty on summed norms; spliced in at the last site",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}

    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sites) == 1 or len(set(self.sites)) < len(self.sites):
            raise GossamerError(f"sites are {self.sites}; give at least 2 different modules")
        if self.sites and self.hook not in (None, self.sites[-1]):
            raise GossamerError(f"hook is {self.hook!r}; it is the last site, {self.sites[-1]!r}")

    def paths(self, model: nn.Module) -> tuple[str, ...]:
        """The sites."""
        if self.sites:
            return self.sites
        blocks = find_sites(model).blocks
        middle = len(blocks) // 2
        if self.hook is not None or middle < 1:
            raise GossamerError("a crosscoder reads several modules; name them with sites")
        return blocks[middle - 1], blocks[middle]

    def options(self, source: ActivationSource) -> dict[str, Any]:
        return {"sites": source.columns}

    def facts(self, source: ActivationSource) -> dict[str, Any]:
        last = source.width - source.columns[-1]
        return {
            "reads": list(source.paths),
            "writes": [last, source.width],
            "columns": list(source.columns),
            "hook_name": source.paths[-1],
        }

    def resolved(self, source: ActivationSource) -> Self:
        return replace(super().resolved(source), sites=source.paths)

    def rule(self) -> Rule:
        return BatchTopK(self.k)


@torch.no_grad()
def ownership(dictionary: Dictionary, columns: tuple[int, int]) -> Tensor:
    """Where each latent of a crosscoder of two sites lives: 0 at the first, 1 at the second.

    ½ (1 + (‖d²‖ - ‖d¹‖) / max(‖d¹‖, ‖d²‖)), (M,); ½ is shared by both.

    Parameters
    ----------
    columns : widths of the sites, D¹ and D².
    """
    first, second = (part.norm(dim=1) for part in dictionary.W_dec.split(columns, dim=1))
    return 0.5 * (1 + (second - first) / torch.maximum(first, second).clamp_min(1e-12))
