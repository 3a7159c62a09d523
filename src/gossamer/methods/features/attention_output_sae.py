"""Attention-output SAE: latents of what the heads hand over, traced back to head and token.

The dictionary reads the heads' outputs side by side, before the output projection mixes them. A
latent's atom then says which heads it lives in, and its value is a sum over heads and tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError
from gossamer.methods.features.attribution.direct import Attribution, direct, head_shares
from gossamer.methods.features.attribution.view import views
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.circuits.heads import head_count, output_sites
from gossamer.methods.features.rules import ReLU, Rule
from gossamer.methods.features.splicing import SplicedModel
from gossamer.methods.features.training import Recipe
from gossamer.models import Progress, Report

__all__ = ["AttentionOutputModel", "AttentionOutputSAE"]


@dataclass(frozen=True, kw_only=True)
class AttentionOutputSAE(DictionaryMethod):
    """Learn a dictionary of the heads' outputs, whose latents can be traced back exactly.

    What it returns answers two questions: :meth:`AttentionOutputModel.attribute` splits a
    latent's value over heads and source tokens, and ``attribution.trace.trace`` goes on from
    there through the residual stream to earlier blocks. Both check their sums at every call.

    Parameters
    ----------
    hook : path of an attention output projection with ``:in``; None: the middle block's.
    coefficient : weight of sum_i z_i ‖d_i‖ beside the squared error of a token (summed over
        channels), for activations scaled to a mean norm of sqrt(width).

    Source: arXiv 2406.17759, §2 and §4. Departs from the paper: dead latents are not resampled;
    the schedule is that of this package's ReLU SAE.
    """

    card: ClassVar[Card] = Card(
        title="Interpreting Attention Layer Outputs with Sparse Autoencoders",
        year=2024,
        arxiv="2406.17759",
        system="attention_output_sae",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="input of an attention's output projection",
        score="pre-activation of a latent",
        pattern="unstructured per token",
        budget="emergent: an L1 penalty on the codes",
        schedule="penalty rises over the first 5 % of the run",
        update="learned dictionary",
        kernel="sparse_code",
        departs="no resampling of dead latents; schedule of the package's ReLU SAE",
    )
    example: ClassVar[Mapping[str, Any]] = {"width": 64}

    coefficient: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ReLU(self.coefficient)
        if self.hook is not None and not self.hook.endswith(":in"):
            raise GossamerError(
                f"hook is {self.hook!r}; behind the output projection the heads are mixed: give "
                "the projection's path with ':in'"
            )

    def paths(self, model: nn.Module) -> str:
        """The input of the middle block's output projection."""
        if self.hook is not None:
            return self.hook
        sites = output_sites(model)
        return f"{sites[len(sites) // 2].module}:in"

    def rule(self) -> Rule:
        return ReLU(self.coefficient, self.warmup_rows)

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        return replace(super().recipe(steps, batch_size), aux_k=0)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        keep_error: bool = False,
        progress: Progress | None = None,
    ) -> "AttentionOutputModel":
        """Fit a dictionary, then put its reconstruction in place of what the heads hand over.

        Parameters
        ----------
        keep_error : add back what the dictionary misses, so that the model is unchanged.
        """
        work = super().apply(model, data, keep_error=True, progress=progress)
        work.restore()
        return AttentionOutputModel.of(work, keep_error)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "AttentionOutputModel":
        """Splice in a stored dictionary again."""
        work = super().reattach(model, meta, tensors)
        work.restore()
        return AttentionOutputModel.of(work, work.keep_error)


class AttentionOutputModel(SplicedModel):
    """A dictionary at work on what a block's heads hand over."""

    @classmethod
    def of(cls, work: SplicedModel, keep_error: bool) -> "AttentionOutputModel":
        """The same dictionary at the same place."""
        return cls(
            work.method, work.model, work.dictionary, work.hook, work.score, keep_error=keep_error
        )

    @property
    def block(self) -> int:
        """Index of the dictionary's block.

        Raises
        ------
        GossamerError
            If the hook is no attention output projection.
        """
        for site in output_sites(self.model):
            if f"{site.module}:in" == self.hook:
                return site.block
        raise GossamerError(f"{self.hook!r} is no attention output projection's input")

    def attribute(
        self,
        inputs: Mapping[str, Tensor],
        latents: Sequence[int] | Tensor,
        rows: Sequence[int] | Tensor,
        at: Sequence[int] | Tensor,
    ) -> Attribution:
        """Split latents' pre-activations over heads and source tokens, in the unspliced model.

        Parameters
        ----------
        inputs : keyword arguments of the model. latents, rows, at : (N,), which latent, in which
            window, at which token.

        Raises
        ------
        GossamerError
            If the sum is not exact.
        """
        device = self.dictionary.W_dec.device
        asked = (torch.as_tensor(part, device=device) for part in (latents, rows, at))
        with self._splice.paused():
            view = views(self.model, inputs, (self.block,))[self.block]
        return direct(view, self.dictionary, *asked)

    def report(self) -> Report:
        plain = super().report()
        try:
            shares = head_shares(self.dictionary, head_count(self.model))
        except (GossamerError, RuntimeError):
            return plain  # Another hook than a projection's: its channels are no heads.
        own = torch.bincount(shares.argmax(1), minlength=shares.shape[1]).tolist()
        said = ", ".join(f"{head}: {count}" for head, count in enumerate(own))
        lone = float((shares.amax(1) > 0.5).double().mean())
        note = f"latents by the head that holds most of their atom: {said}; over half in {lone:.0%}"
        return replace(plain, notes=(*plain.notes, note))
