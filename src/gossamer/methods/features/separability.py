"""Concept separability: which units tell concepts apart, and how to silence one concept with them.

Histograms of a unit's values under each concept are compared; a value is then damped by the
probability that it speaks for the concept to remove (APP), not cut at sight.
Shapes: R = rows, D = channels, M = latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.concepts.densities import Densities, separability
from gossamer.methods.features.editing import (
    Affine,
    Edit,
    Law,
    Plan,
    SteeringMethod,
    middle_block,
)
from gossamer.methods.features.hooks import record
from gossamer.methods.features.topk_sae import TopKSAE
from gossamer.models import Progress, Tokens
from gossamer.models.labelled import Labelled

__all__ = ["Separability", "dense_codes", "labelled_rows"]

Manner = Literal["posterior", "range", "full"]
_TOP = 50


@torch.no_grad()
def labelled_rows(
    model: nn.Module, tokens: Tokens, labels: Tensor, path: str, *, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """(R, D) activations of all real tokens, and the label (R,) of the window of each."""
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    names: list[Tensor] = []
    for start in range(0, len(tokens), batch_size):
        part = tokens.slice(start, start + batch_size)
        mask = part.attention_mask.to(device)
        found = record(model, (path,), next(part.batches(len(part), device)))[path]
        rows.append(found[mask].float())
        own = labels[start : start + batch_size].to(device)
        names.append(own[:, None].expand(mask.shape)[mask])
    return torch.cat(rows), torch.cat(names)


@torch.no_grad()
def dense_codes(dictionary: Dictionary, rows: Tensor) -> Tensor:
    """(R, M) codes with their zeros, for counting."""
    codes = dictionary.encode(rows)
    made = codes.values.new_zeros(len(rows), dictionary.d_sae + 1)
    place = torch.where(codes.indices < 0, dictionary.d_sae, codes.indices)
    return made.scatter_(1, place, codes.values)[:, :-1]


@dataclass(frozen=True, kw_only=True)
class Separability(SteeringMethod):
    """Measure how far units tell concepts apart, and suppress one concept where they speak for it.

    The report gives the separability of the dictionary's latents beside that of the module's own
    channels; the model is left with the ``target`` concept suppressed, what the dictionary misses
    kept.

    Parameters
    ----------
    manner : ``posterior`` multiplies a value by 1 - P(target | value) (APP); ``range`` silences
        values within 2.5 deviations of the target's mean; ``full`` silences always.
    latents : edit a TopK dictionary's latents; otherwise the module's own channels.
    top : units edited, those loudest on the target.
    hook : module; None: the middle block. k, width, tokens : of the dictionary, as in TopKSAE.
    seed : of the dictionary and of the permuted labels.

    Source: arXiv 2508.15094. Departs from the paper: the form of APP is reconstructed from its
    abstract; every token carries the label of its text; the divergence of permuted labels is
    subtracted.
    """

    card: ClassVar[Card] = Card(
        title="Evaluating Sparse Autoencoders for Monosemantic Representation",
        year=2025,
        arxiv="2508.15094",
        system="separability",
        family="features",
        when="inference",
        start="dense",
        masks="dynamic",
        site="latents or channels of any module",
        score="Jensen-Shannon divergence of values given concepts",
        pattern="units",
        budget="top units by mean on the target",
        update="none",
        kernel="sparse_code",
        departs="form of APP reconstructed; tokens labelled by their text; permuted labels' "
        "divergence subtracted",
    )
    example: ClassVar[Mapping[str, Any]] = {"k": 8, "width": 64, "tokens": 2048, "target": "1"}

    manner: Manner = "posterior"
    latents: bool = True
    top: int = _TOP
    hook: str | None = None
    k: int = 32
    width: int | None = None
    tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.manner not in get_args(Manner):
            raise GossamerError(
                f"manner is {self.manner!r}; choose from {', '.join(get_args(Manner))}"
            )
        check_count("top", self.top, 1)

    def dictionary(
        self, model: nn.Module, data: Labelled, progress: Progress | None = None
    ) -> Dictionary:
        """Train the dictionary of the hook on all the texts."""
        made = TopKSAE(
            hook=middle_block(model) if self.hook is None else self.hook,
            k=self.k,
            width=self.width,
            tokens=self.tokens,
            seed=self.seed,
        ).fit(model, data.tokens, progress=progress)
        return made.eval().requires_grad_(False)

    def plan(self, model: nn.Module, data: Labelled, progress: Progress | None = None) -> Plan:
        made = self.dictionary(model, data, progress) if self.latents else None
        rows, labels = self._rows(model, data)
        edit = self.suppression(model, data, made)
        values = rows if made is None else dense_codes(made, rows)
        notes = [f"suppresses {self.target!r} in {edit.law.units} of {values.shape[1]} units"]
        for what, own in (("channels", rows), ("latents", values))[: 1 + (made is not None)]:
            score = separability(own, labels, seed=self.seed).sort(descending=True).values
            notes.append(
                f"separability of {what}: mean {float(score.mean()):.3f}, "
                f"top {min(_TOP, len(score))} {float(score[:_TOP].mean()):.3f}"
            )
        return Plan((edit,), tuple(notes))

    def _path(self, model: nn.Module) -> str:
        return middle_block(model) if self.hook is None else self.hook

    def _rows(self, model: nn.Module, data: Labelled) -> tuple[Tensor, Tensor]:
        """Rows of all tokens and their concepts, numbered without gaps."""
        labels = data.codes(self.attribute).unique(return_inverse=True)[1]
        return labelled_rows(model, data.tokens, labels, self._path(model))

    def suppression(self, model: nn.Module, data: Labelled, dictionary: Dictionary | None) -> Edit:
        """The edit that suppresses the target in a dictionary, or in channels without one."""
        assert self.target is not None
        goal = data.number(self.attribute, self.target)
        concept = int((data.codes(self.attribute).unique() == goal).nonzero())
        rows, labels = self._rows(model, data)
        values = rows if dictionary is None else dense_codes(dictionary, rows)
        found = Densities.of(values, labels)
        loud = values[labels == concept].abs().mean(0)
        units = loud.argsort(descending=True, stable=True)[: self.top].sort().values
        return Edit(self._path(model), self._law(found, concept, units), units, dictionary)

    def _law(self, found: Densities, concept: int, units: Tensor) -> Law:
        if self.manner == "posterior":
            return found.posterior(concept, units)
        if self.manner == "range":
            return found.within(concept, units)
        return Affine.scaled(torch.zeros(len(units), device=units.device))
