"""SparseD: a masked-diffusion model's heads read the same blocks step after step; choose once.

The first denoising steps run full attention. At the last of them every head keeps, for each
block of queries, the key blocks with the largest mean attention, prompt and generation ranked
apart; all later steps read those blocks only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count
from gossamer.methods.attention.diffusion.applied import DiffusionAttention
from gossamer.methods.attention.diffusion.blocks import (
    first_generated,
    keep_isolated,
    tile_means,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import check_backend
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.models import Progress

__all__ = ["SparseD"]


@dataclass(frozen=True, kw_only=True)
class SparseD(Method):
    """Choose each head's key blocks once, early in denoising, and reuse them to the end.

    Parameters
    ----------
    sparsity : share of the key blocks given up; of n blocks 1 + floor((1 - sparsity) n) are kept,
        of the prompt's and of the generation's alike. 0.7 for long texts, 0.5 for short ones with
        ``block`` 32.
    skip : share of the denoising steps that run full attention, 0 up to 1.
    block : queries and keys of a block.
    isolated : rank the blocks of prompt and generation apart (else all together).
    backend : ``auto``, or the name of an executor.

    Source: arXiv 2509.24014, §4; defaults of the official code for long texts.

    Departs from the paper: steps count from 1, so floor(skip S) + 1 of S steps are full and skip
    0 chooses at the very first (the official code counts from 0 and runs one more). Scores are
    scaled as the model scales them (the official code divides by the root of the number of heads
    instead of the head width). One softmax over all keys serves both rankings (the official code
    takes another over the generation's keys alone). A block with a prompt token counts as prompt.

    Examples
    --------
    >>> from gossamer.methods.attention.diffusion.model import DiffusionConfig, MaskedDiffusionLM
    >>> from gossamer.methods.attention.diffusion.sampler import sample
    >>> import torch
    >>> model = MaskedDiffusionLM(DiffusionConfig(vocabulary=10, mask=9))
    >>> with SparseD(block=1, sparsity=0.5).apply(model) as work:
    ...     filled = sample(model, torch.tensor([[1, 2, 3, 4, 9, 9, 9, 9]]), prompt=4, steps=4)
    >>> work.report().sparsity
    0.1875
    """

    card: ClassVar = Card(
        title="SparseD: Sparse Attention for Diffusion Language Models",
        year=2025,
        arxiv="2509.24014",
        system="sparsed",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores of a bidirectional model",
        score="mean attention probability of a tile",
        pattern="key blocks per head and block of queries",
        budget="share of the key blocks, prompt and generation apart",
        schedule="once a generation, after a share of the denoising steps",
        kernel="block-sparse: gathered blocks, fused attention",
        departs="steps count from 1; the model's own softmax scale; one softmax for both rankings; "
        "a block with a prompt token counts as prompt",
    )
    subject: ClassVar[str] = "masked-diffusion language model"
    example: ClassVar[Mapping[str, Any]] = {"block": 4}
    exempt: ClassVar[Mapping[str, str]] = {
        "exact sparsity": "whole blocks: 1 + floor of the share are kept, and early steps are full",
        "every architecture": "it acts by denoising step, which decoders do not have",
    }

    sparsity: float = 0.7
    skip: float = 0.2
    block: int = 128
    isolated: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.skip, int | float) or not (
            isfinite(self.skip) and 0 <= self.skip < 1
        ):
            raise GossamerError(f"skip is {self.skip!r}; give a share of the steps, 0 up to 1")
        check_count("block", self.block, 1)
        if check_backend(self.backend) == "fastest":
            raise GossamerError(
                "backend is 'fastest', which times causal calls; give 'auto' or an executor"
            )

    def dense_steps(self, steps: int) -> int:
        """Full steps at the start of a generation of ``steps``; blocks are chosen at the last."""
        return int(self.skip * steps + 1e-9) + 1

    def choose(self, call: Call, layout: Layout, prompt: int) -> BlockIndex:
        """The blocks that all later steps of one layer read."""
        score = tile_means(call, layout, self.block)
        first = score.shape[-1]
        if self.isolated:
            first = first_generated(prompt, layout.keys, self.block)
        kept = keep_isolated(score, first, 1.0 - self.sparsity)
        return BlockIndex.from_blocks(layout, kept, (self.block, self.block))

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> DiffusionAttention:
        """Put the method to work in a masked-diffusion model, ours or any that calls torch's
        fused attention (LLaDA's and Dream's own code does).

        Parameters
        ----------
        data : not read.
        """
        return DiffusionAttention(self, model, self.choose)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> DiffusionAttention:
        work = self.apply(model)
        work.remember(dict(meta))
        return work
