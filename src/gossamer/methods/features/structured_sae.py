"""Structured sparse autoencoder: concepts depend on one another, and codes may say so.

If a model's features are the log-odds of concepts given the context, and concepts are dependent,
a sparse code alone cannot be them. Here every latent adds to its own sparse answer a share of few
answers common to all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.measure import DictionaryScore, score_rows
from gossamer.methods.features.rules import Rule, Structured
from gossamer.methods.features.splicing import SplicedModel
from gossamer.methods.features.training import Recipe
from gossamer.models import Progress

__all__ = ["StructuredSAE"]

_SCORED_ROWS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class StructuredSAE(DictionaryMethod):
    """Learn a dictionary whose codes are a sparse part plus a low-rank part.

    The report's L0 and sparsity are those of the sparse part; with the low-rank part every latent
    has a value. How well latents match concepts is measured by
    :func:`gossamer.methods.features.concepts.concept_match`.

    Parameters
    ----------
    rank : of the part that latents share, 1 <= rank <= width.
    coefficient : weight of the sparsity penalty beside the squared error of a token (summed over
        channels), for activations scaled to a mean norm of sqrt(width).
    nuclear : weight of the bound on the low-rank part's nuclear norm, in the same units.
    last_power : the exponent p of the penalty Σ s^p falls from 1 to this over the run.

    Source: arXiv 2503.08980, §5. Departs from the paper: the split of a code into both parts,
    with the low-rank part a linear function of the pre-activations, is our reading; its nuclear
    norm is bounded by those of two factors; the weight of the penalty is rescaled in every batch.
    """

    card: ClassVar[Card] = Card(
        title="I Predict Therefore I Am: Is Next Token Prediction Enough to Learn "
        "Human-Interpretable Concepts from Data?",
        year=2025,
        arxiv="2503.08980",
        system="structured_sae",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation of a latent",
        pattern="unstructured per token, plus a part of low rank",
        budget="emergent: an annealed penalty on the sparse part, a nuclear norm on the other",
        schedule="the penalty's exponent falls from 1 over the run",
        update="learned dictionary",
        kernel="none",
        departs="how sparse and low-rank parts combine is our reading; nuclear norm by factors",
    )

    example: ClassVar[Mapping[str, Any]] = {"rank": 4}

    rank: int = 8
    coefficient: float = 2.0
    nuclear: float = 0.1
    last_power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rule(self.width or self.rank)

    def _rule(self, latents: int) -> Structured:
        return Structured(
            latents,
            rank=self.rank,
            coefficient=self.coefficient,
            nuclear=self.nuclear,
            last_power=self.last_power,
            rows=self.tokens or 1,
        )

    def rule(self) -> Rule:
        assert self.width is not None
        return self._rule(self.width)

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        return replace(super().recipe(steps, batch_size), aux_k=0)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        keep_error: bool = False,
        progress: Progress | None = None,
    ) -> SplicedModel:
        """Fit a dictionary, then put its reconstruction in place of the module's output.

        Parameters
        ----------
        keep_error : add back what the dictionary misses, so that the model is unchanged.
        """
        source = self.source(model, data)
        method, made = self._fit(model, source, progress)
        score = _scored(made, list(source.head(_SCORED_ROWS)))
        made.metadata["score"] = vars(score)
        assert method.hook is not None
        return SplicedModel(method, model, made, method.hook, score, keep_error=keep_error)


@torch.no_grad()
def _scored(made: Dictionary, batches: Iterable[Tensor]) -> DictionaryScore:
    """Figures of a dictionary, with L0 and the dead counted on the sparse part."""
    batches = list(batches)
    assert isinstance(made.rule, Structured)
    on = torch.cat([made.pre_activations(x.to(made.W_enc.dtype)) > 0 for x in batches])
    score = score_rows(made, batches)
    dead = float((~on.any(0)).double().mean())
    return replace(score, l0=float(on.double().sum(1).mean()), dead=dead)
