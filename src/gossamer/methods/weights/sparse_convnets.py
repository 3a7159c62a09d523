"""Fast sparse ConvNets: most weights of the 1x1 convolutions go, and a kernel skips them.

In mobile networks nearly all arithmetic is in pointwise convolutions. With channels in rows, the
lanes of a vector run over positions, so one kept weight meets a whole vector of activations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from gossamer.core import (
    Block,
    Card,
    GossamerError,
    Method,
    Pattern,
    Selection,
    Unstructured,
    check_count,
    unknown,
    unpack_bits,
)
from gossamer.kernels.measured import Choice
from gossamer.methods.weights.convnets.execute import Execute, Execution, run_on_kernel
from gossamer.methods.weights.convnets.sites import ConvSite, pointwise
from gossamer.methods.weights.convnets.training import gradual, select
from gossamer.methods.weights.pruned import Pruned, PrunedModel
from gossamer.methods.weights.retrain.loop import Plan
from gossamer.methods.weights.retrain.states import copy_of, put_back
from gossamer.models import Inputs, Progress, Report, State

__all__ = ["SparseConvModel", "SparseConvNets"]


class SparseConvModel(PrunedModel):
    """A model with pruned pointwise convolutions, some or all of which the sparse kernel runs.

    Attributes
    ----------
    execution : which sites run on the kernel, and what was measured.
    losses : of every training step; empty when nothing was trained.
    """

    def __init__(self, method: Method, model: nn.Module, *, undo: bool) -> None:
        self.execution = Execution()
        self.losses: list[float] = []
        self.trained_from: dict[str, Tensor] | None = None
        super().__init__(method, model, undo=undo)

    @property
    def simulated(self) -> bool:  # type: ignore[override]
        """Whether every site still runs on torch's dense convolution."""
        return not self.execution.layers

    @property
    def sparse(self) -> tuple[str, ...]:
        """Names of the sites that the kernel runs."""
        return tuple(self.execution.layers)

    @property
    def choices(self) -> dict[str, Choice]:
        """Measured milliseconds of every site that was timed."""
        return dict(self.execution.choices)

    def _undo(self) -> None:
        super()._undo()
        self.execution.stop()
        if self.trained_from is not None:
            put_back(self.model, self.trained_from)
            self.trained_from = None

    def forget(self) -> None:
        self.execution.stop()
        super().forget()

    def state(self) -> State:
        base = super().state()
        return State({**base.meta, "sparse": list(self.sparse)}, base.tensors)

    def report(self) -> Report:
        base = super().report()
        notes = list(self.execution.notes)
        if self.losses:
            notes.append(
                f"trained for {len(self.losses)} steps, loss {self.losses[0]:.3f} to "
                f"{self.losses[-1]:.3f}"
            )
        for name, choice in self.choices.items():
            times = ", ".join(f"{key} {value:.3f} ms" for key, value in choice.milliseconds.items())
            notes.append(f"{name}: {times}; {choice.name} runs")
        return replace(base, notes=tuple(notes))

    def weight_bytes_saved(self) -> int:
        """Bytes of the dense weights less those the kernel reads, over the sites it runs."""
        packed = {name: layer.packed for name, layer in self.execution.layers.items()}
        return sum(max(0, 4 * self.sites[n].size - p.nbytes) for n, p in packed.items())


@dataclass(frozen=True, kw_only=True)
class SparseConvNets(Method):
    """Prune the pointwise convolutions of a mobile network by magnitude and run them sparsely.

    The first convolution, depthwise ones, larger kernels and the classifier stay dense. The
    sparsity is the same in every layer.

    Parameters
    ----------
    sparsity : share of every pointwise convolution's weights removed.
    pattern : ``"layer"`` or ``"row"`` (unstructured), ``"block:2x1"`` or ``"block:4x1"`` (two or
        four output channels stay or go together; output channels must divide).
    steps : optimizer updates of gradual pruning, cubic, with AdamW; 0 prunes at once.
    lr, batch_size, seed : of the training.
    execute : ``sparse`` runs every site on the kernel, ``dense`` none; ``auto`` follows the
        planner's rule (more than two thirds zeros) and, when images are given, a measurement of
        every site.
    fuse : in evaluation mode, compute the batch normalisation and the ReLU or ReLU6 that follow
        inside the kernel's pass, where the model's structure shows them.

    Source: arXiv 1911.09723. Departs from the paper: AdamW with a linear decay trains, for as
    long as ``steps`` say; activations stay in torch's layout, which has channels in rows, so no
    entry convolution converts them.
    """

    card: ClassVar = Card(
        title="Fast Sparse ConvNets",
        year=2019,
        arxiv="1911.09723",
        system="sparse_convnets",
        family="weights",
        when="during training",
        site="weights of 1x1 convolutions",
        score="|w|",
        pattern="unstructured, or blocks of 2 or 4 output channels",
        budget="sparsity, the same in every layer",
        schedule="cubic over the first three quarters of the steps",
        update="training under the mask",
        kernel="sparse_conv",
        departs="AdamW with a linear decay; any network with 1x1 convolutions, not retuned "
        "MobileNets; channels-last images are transposed at each kernel's entry",
    )
    subject: ClassVar[str] = "vision model"
    example: ClassVar[Mapping[str, Any]] = {"steps": 2, "batch_size": 3, "execute": "sparse"}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
    }

    sparsity: float = 0.9
    pattern: Pattern = Unstructured(per="layer")
    steps: int = 0
    lr: float = 1e-3
    batch_size: int = 32
    seed: int = 0
    execute: Execute = "auto"
    fuse: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = isinstance(self.pattern, Unstructured) and self.pattern.per != "model"
        if not plain and self.pattern not in (Block(2, 1), Block(4, 1)):
            raise GossamerError(
                f"pattern is {self.pattern}; the kernel reads layer, row, block:2x1 and block:4x1"
            )
        if self.execute not in get_args(Execute):
            raise unknown("execution", self.execute, get_args(Execute))
        check_count("steps", self.steps, 0)
        self._plan()

    def _plan(self) -> Plan:
        return Plan(steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=self.seed)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        undo: bool = True,
        progress: Progress | None = None,
    ) -> SparseConvModel:
        """Prune a model in place, training it on the way if ``steps`` say so, and run it sparsely.

        Parameters
        ----------
        model : any module with 1x1 convolutions.
        data : :class:`~gossamer.models.Inputs`, keyword arguments of the model; with ``labels``
            where it is trained. Without steps, data only serve the measurement of ``auto``.
        undo : keep the dense weights so that ``restore`` works; False saves that memory.

        Raises
        ------
        GossamerError
            If a layer cannot take the pattern, data are missing or unusable, or sparse execution
            was asked for and cannot run; the model is then left as it was.
        """
        sites = pointwise(model)
        self._refuse_early(model, sites, data)
        work = SparseConvModel(self, model, undo=undo)
        # Kept while training even without undo: an interrupt must leave the model as it was.
        before = copy_of(model) if self.steps else None
        try:
            if before is not None:
                work.losses = gradual(
                    model,
                    sites,
                    data,
                    sparsity=self.sparsity,
                    pattern=self.pattern,
                    plan=self._plan(),
                    progress=progress,
                )
            for site in sites:
                weight = site.weight(model)
                work.write(site, weight, Pruned(select(weight, self.pattern, self.sparsity)))
            work.execution = self._run(model, sites, data)
        except BaseException:
            if undo:
                work.restore()
            else:
                work.forget()
            if before is not None:
                put_back(model, before)
            raise
        if undo:
            work.trained_from = before
        return work

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SparseConvModel:
        """Take up the stored masks of a loaded model, and run the same sites sparsely."""
        work = SparseConvModel(self, model, undo=False)
        try:
            sites = {site.name: site for site in pointwise(model)}
            for name in meta["sites"]:
                if name not in sites:
                    raise GossamerError(
                        f"the saved masks name {name}, which this model does not have"
                    )
                mask = unpack_bits(tensors[f"mask.{name}"], sites[name].shape)
                if bool(sites[name].weight(model)[~mask].any()):
                    raise GossamerError(
                        f"{name} is not zero where its saved mask removes weights; "
                        "the weights were changed after saving: save the model again"
                    )
                work.sites[name], work.masks[name] = sites[name], tensors[f"mask.{name}"]
                work.kept[name] = Selection.from_mask(mask).kept
            kept = tuple(site for name, site in sites.items() if name in work.sites)
            work.execution = self._run(model, kept, None, tuple(meta["sparse"]))
        except BaseException:
            work.forget()
            raise
        return work

    def _run(
        self,
        model: nn.Module,
        sites: tuple[ConvSite, ...],
        data: Any,
        only: tuple[str, ...] | None = None,
    ) -> Execution:
        blocks = None
        if isinstance(self.pattern, Block):
            blocks = dict.fromkeys((site.name for site in sites), self.pattern.high)
        return run_on_kernel(
            model,
            sites,
            execute=self.execute,
            fuse=self.fuse,
            data=data,
            only=only,
            blocks=blocks,
        )

    def _refuse_early(self, model: nn.Module, sites: tuple[ConvSite, ...], data: Any) -> None:
        for site in sites:
            try:
                self.pattern.check_shape(site.shape)
            except GossamerError as error:
                raise GossamerError(f"{site.name}: {error}") from None
            if not torch.isfinite(site.weight(model)).all():
                raise GossamerError(f"{site.name} holds NaN or infinite weights; repair it first")
        if data is not None and not isinstance(data, Inputs):
            raise GossamerError(
                f"data are {type(data).__name__}; give Inputs(dict(pixel_values=..., labels=...)) "
                "as the model's keyword arguments"
            )
        if self.steps and (data is None or "labels" not in data.values):
            raise GossamerError(
                f"steps is {self.steps}, which needs data with labels; give "
                "Inputs(dict(pixel_values=..., labels=...)), or steps=0"
            )
