"""Transcoder: sparse latents between what an MLP reads and what it writes.

An autoencoder explains an activation; a transcoder replaces the computation that makes it, so
that circuits run through latents whose wiring does not depend on the input.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gossamer.core import Card, GossamerError
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.objective import Layout
from gossamer.methods.features.rules import Rule, TopK
from gossamer.methods.features.source import ActivationSource
from gossamer.models import find_sites

__all__ = ["Transcoder"]


@dataclass(frozen=True, kw_only=True)
class Transcoder(CountedMethod):
    """Learn latents that read a module's input and write its output, k of them for a token.

    Parameters
    ----------
    hook : path of the module to stand in for; None: the MLP of the middle block.
    k : latents kept of each token, 1 <= k <= width.
    skip : add a linear map of the input to the output (a skip transcoder), zero at first.

    Source: arXiv 2406.11944, §3; the skip is that of arXiv 2501.18823. Departs from the paper:
    TopK in place of an L1 penalty; atoms start at random with norm 1 instead of at zero.
    """

    card: ClassVar[Card] = Card(
        title="Transcoders Find Interpretable LLM Feature Circuits",
        year=2024,
        arxiv="2406.11944",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="an MLP, from its input to its output",
        score="pre-activation of a latent",
        pattern="unstructured per token",
        budget="k latents of each token",
        schedule="constant",
        update="learned dictionary",
        kernel="sparse_code",
        departs="TopK instead of an L1 penalty; atoms start at random with norm 1, not at zero",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}
    exempt: ClassVar[Mapping[str, str]] = {
        **CountedMethod.exempt,
        "every architecture": "BERT, ViT and OPT have no module that is the MLP and nothing else",
    }

    skip: bool = True

    def paths(self, model: nn.Module) -> tuple[str, ...]:
        """The module's input and its output."""
        hook = _mlp(model) if self.hook is None else self.hook
        return f"{hook}:in", hook

    def layout(self, source: ActivationSource) -> Layout:
        return Layout(*source.columns)

    def options(self, source: ActivationSource) -> dict[str, Any]:
        return {"skip": self.skip}

    def facts(self, source: ActivationSource) -> dict[str, Any]:
        return {"reads": [source.paths[0]], "hook_name": source.paths[-1]}

    def rule(self) -> Rule:
        return TopK(self.k)


def _mlp(model: nn.Module) -> str:
    """Path of the middle block's MLP.

    Raises
    ------
    GossamerError
        If no module of the block is its MLP and nothing else.
    """
    found = find_sites(model)
    middle = len(found.blocks) // 2
    block = found.blocks[middle]
    roles = ("mlp", "experts")
    parts = [site.name for site in found.in_block(middle) if site.role.partition(".")[0] in roles]
    other = [site.name for site in found.in_block(middle) if site.name not in parts]
    stem = parts[0].rpartition(".")[0] if parts else ""
    while len(stem) > len(block):
        if all(p.startswith(f"{stem}.") for p in parts):
            if any(p.startswith(f"{stem}.") for p in other):
                break
            return stem
        stem = stem.rpartition(".")[0]
    raise GossamerError(
        f"no module of {block} is its MLP and nothing else; name the module to stand in for with "
        "hook"
    )
