"""Supervised dictionaries: the best sparse code there could be, read off attributes that are known.

Where a task's attributes are written down, an activation is a mean plus one atom for each value.
Learned dictionaries are held against it; on its own it edits an attribute by swapping two atoms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import nn

from gossamer.core import Card, GossamerError
from gossamer.methods.features.editing import (
    Affine,
    Edit,
    Plan,
    SteeringMethod,
    gathered,
    middle_block,
)
from gossamer.methods.features.supervised.codes import Kind, SupervisedCodes
from gossamer.models import Progress
from gossamer.models.labelled import Labelled

__all__ = ["SupervisedDictionaries"]


@dataclass(frozen=True, kw_only=True)
class SupervisedDictionaries(SteeringMethod):
    """Fit atoms to the attributes of labelled texts and swap one attribute's value for another.

    All attributes of the texts get atoms; ``attribute`` is the one edited. To hold a learned
    dictionary against this one, see ``supervised/codes.py`` and ``supervised/control.py``.

    Parameters
    ----------
    source : value to take off; None: nothing, the target's atom is only added.
    hook : module whose output is described and edited; None: the middle block.
    codes : ``mse`` fits all atoms at once by least squares, ``mean`` each by itself.

    Source: arXiv 2405.08366, §3 and §4. Departs from the paper: one place is edited, not all nodes
    of a circuit at once.
    """

    card: ClassVar[Card] = Card(
        title="Towards Principled Evaluations of Sparse Autoencoders for Interpretability and "
        "Control",
        year=2024,
        arxiv="2405.08366",
        system="supervised_dictionaries",
        family="features",
        when="inference",
        start="dense",
        masks="none",
        site="output of any module",
        score="least squares on known attributes",
        pattern="one atom for each attribute",
        budget="attributes of the task",
        update="closed form",
        kernel="fused add",
        departs="one place is edited, not all nodes of a circuit at once",
    )
    example: ClassVar[Mapping[str, Any]] = {"source": "0", "target": "1"}

    positions: str = "last"
    source: str | None = None
    hook: str | None = None
    codes: Kind = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes not in get_args(Kind):
            raise GossamerError(f"codes is {self.codes!r}; choose from {', '.join(get_args(Kind))}")

    def fit(self, model: nn.Module, data: Labelled) -> tuple[str, SupervisedCodes, torch.Tensor]:
        """Path of the module, the codes of its activations at the last token, and those rows."""
        path = middle_block(model) if self.hook is None else self.hook
        rows = gathered(model, data.tokens, (path,))[path].cpu()
        return path, SupervisedCodes.fit(rows, data.attributes, self.codes), rows

    def plan(self, model: nn.Module, data: Labelled, progress: Progress | None = None) -> Plan:
        assert self.target is not None
        if self.source == self.target:
            raise GossamerError(f"source and target are both {self.source!r}; name two values")
        goal = data.number(self.attribute, self.target)
        start = None if self.source is None else data.number(self.attribute, self.source)
        path, codes, rows = self.fit(model, data)
        missed = (rows - codes.reconstruct(data.attributes)).square().sum()
        share = float(missed / (rows - codes.mean).square().sum().clamp_min(1e-30))
        shift = codes.edit(self.attribute, start, goal)
        swap = f"adds {self.target!r}" + ("" if self.source is None else f" for {self.source!r}")
        note = f"atoms of {', '.join(data.attributes)} leave {share:.1%} of the variance; {swap}"
        return Plan((Edit(path, Affine.added(shift)),), (note,))
