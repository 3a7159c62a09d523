"""Essential sparsity: prune a trained model more and more, and stop before the loss turns up.

Up to some sparsity the smallest weights cost almost nothing; beyond it the loss rises sharply.
The sweep finds that point for any score, any pattern, any model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import (
    NM,
    Card,
    GossamerError,
    Method,
    Pattern,
    Unstructured,
    check_count,
)
from gossamer.methods.weights.base import Allocation, OneShot, prunable
from gossamer.methods.weights.knee.curve import Curve, parse_sweep
from gossamer.methods.weights.retrain.loop import Plan, finetune
from gossamer.methods.weights.retrain.masks import Masks, parameter_masks
from gossamer.methods.weights.retrain.start import Successor, reattach_masks, starting
from gossamer.methods.weights.retrain.states import copy_of, put_back
from gossamer.models import Inputs, Progress, Tokens, as_tokens
from gossamer.models.fit import in_float32
from gossamer.models.loss import WindowLosses, window_losses

__all__ = ["EssentialSparsity"]


@dataclass(frozen=True, kw_only=True)
class EssentialSparsity(Method):
    """Prune one shot at the largest sparsity that leaves the held-out loss within a tolerance.

    The report also gives the elbow of a two-segment fit with its bootstrap interval, and the
    whole curve. :meth:`curve` measures without changing the model.

    Parameters
    ----------
    sweep : the sparsities, as ``start:stop:step`` or a rising list ``0.3,0.5,0.7``. N:M patterns
        sweep N from M - 1 to 1 instead.
    tolerance : share of the dense loss that may be added; the answer depends on it.
    pattern : ``"model"`` for one competition over all layers, the paper's choice; or ``"layer"``,
        ``"row"``, ``"2:4"`` and the like, where only M counts.
    allocation : with ``layer`` and ``row``: ``uniform``, ``erk``, ``owl`` ...
    base : the pruning method whose score is used, by key, such as ``"wanda"``.
    steps : updates of ordinary fine-tuning under the fixed mask at every point of the sweep,
        before the loss is measured. 0 is one shot.
    lr, batch_size : of the fine-tuning (AdamW).
    """

    card: ClassVar = Card(
        title="The Emergence of Essential Sparsity in Large Pre-trained Models: "
        "The Weights that Matter",
        year=2023,
        arxiv="2306.03805",
        system="essential_sparsity",
        family="weights",
        when="after training",
        site="linear weight",
        score="|w|, or that of any pruning method",
        pattern="unstructured, N:M, block, channels",
        budget="the largest sparsity within a tolerance of the dense loss",
        schedule="one shot at every sparsity of a sweep",
        update="none, or fine-tuning under the fixed mask",
        departs="the paper names no formula for the drop: here it is the largest swept sparsity "
        "whose loss is within the tolerance, and beside it the joint of two line segments with a "
        "bootstrap interval; the measure is held-out loss, the paper's a task's score after "
        "fine-tuning (steps)",
    )
    example: ClassVar = {"sweep": "0.25,0.5", "tolerance": 1.0}
    exempt: ClassVar = {
        "dense at sparsity 0": "the sparsity is what the method looks for",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to measure",
    }

    sweep: str = "0.05:0.95:0.05"
    tolerance: float = 0.01
    pattern: Pattern = Unstructured(per="model")
    allocation: Allocation = "uniform"
    base: str = "magnitude"
    steps: int = 0
    lr: float = 1e-4
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_sweep(self.sweep)
        if self.pattern.fixed_sparsity == 0:
            raise GossamerError(f"pattern {self.pattern} removes nothing; give M of at least 2")
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance < 1e6:
            raise GossamerError(
                f"tolerance is {self.tolerance!r}; it is a share of the dense loss, at least 0"
            )
        check_count("steps", self.steps, 0)
        self._plan()
        for _ in self._points():
            pass

    def _plan(self) -> Plan:
        return Plan(steps=self.steps, lr=self.lr, batch_size=self.batch_size)

    def _points(self) -> Iterator[tuple[float, str, OneShot]]:
        """Sparsity, pattern in words and method of every point, the dense one left out."""
        if isinstance(self.pattern, NM):
            of = self.pattern.of
            patterns: list[tuple[float, Pattern]] = [
                (1.0 - keep / of, NM(keep, of)) for keep in range(of - 1, 0, -1)
            ]
        else:
            patterns = [(share, self.pattern) for share in parse_sweep(self.sweep)]
        for share, pattern in patterns:
            yield share, str(pattern), starting(self.base, share, pattern, self.allocation)

    def curve(
        self,
        model: nn.Module,
        heldout: Any,
        calibration: Any = None,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Curve:
        """Measure the loss at every sparsity; the model is as before afterwards.

        Parameters
        ----------
        heldout : tokens the loss is measured on, see :func:`gossamer.models.as_tokens`, or
            ``Inputs`` with labels.
        calibration : for scores that look at activations, and for fine-tuning.
        batch_size : windows run at once while measuring.
        progress : called with (points done, points, what).

        Raises
        ------
        GossamerError
            If the model has no loss on such data, or a layer cannot take the pattern.
        """
        points = list(self._points())
        self._refuse_early(model)
        measured = _usable(heldout, model)

        def show(done: int) -> None:
            if progress is not None:
                progress(done, len(points) + 1, f"sweeping {self.base}")

        losses = [self._dense(model, measured, calibration, batch_size)]
        if not isfinite(losses[0].mean):
            raise GossamerError(
                f"the dense model's loss is {losses[0].mean}, so there is nothing to compare with; "
                "look for NaN in the weights, or load the model in float32"
            )
        shares, words, asked = [0.0], ["dense"], [0.0]
        show(1)
        for done, (wanted, pattern, method) in enumerate(points, 2):
            share, loss = self._point(model, method, measured, calibration, batch_size)
            show(done)
            if share <= shares[-1]:
                continue  # Two amounts that round to the same weights.
            losses.append(loss)
            shares.append(share)
            words.append(pattern)
            asked.append(wanted)
        return Curve.of(shares, losses, _ceiling(model, measured), words, asked)

    def _refuse_early(self, model: nn.Module) -> None:
        """A layer that cannot take the pattern is an error before anything is measured."""
        for site in prunable(model).sites:
            try:
                self.pattern.check_shape(site.shape)
            except GossamerError as error:
                raise GossamerError(f"{site.name}: {error}") from None

    def _dense(
        self, model: nn.Module, heldout: Any, calibration: Any, batch_size: int
    ) -> WindowLosses:
        """The dense model's losses, fine-tuned like every other point."""
        if not self.steps:
            return window_losses(model, heldout, batch_size=batch_size)
        before = copy_of(model)
        try:
            self._finetune(model, calibration, {})
            return window_losses(model, heldout, batch_size=batch_size)
        finally:
            put_back(model, before)

    def _point(
        self, model: nn.Module, method: OneShot, heldout: Any, calibration: Any, batch_size: int
    ) -> tuple[float, WindowLosses]:
        before = copy_of(model) if self.steps else None
        with method.apply(model, calibration, batch_size=batch_size) as work:
            try:
                if before is not None:
                    self._finetune(model, calibration, parameter_masks(work))
                return work.report().sparsity, window_losses(model, heldout, batch_size=batch_size)
            finally:
                if before is not None:
                    put_back(model, before)

    def _finetune(self, model: nn.Module, data: Any, masks: Masks) -> None:
        with in_float32(model):
            finetune(model, _usable(data, model), masks, self._plan())

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        heldout: Any = None,
        undo: bool = True,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Successor:
        """Sweep, then leave the model pruned at the sparsity found.

        Parameters
        ----------
        data : text or tokens. Without ``heldout`` the loss is measured on its last half, and the
            first half calibrates and fine-tunes; all of it measures where neither is asked for.
        heldout : other text or tokens to measure on.
        undo : keep what ``restore`` needs.

        Raises
        ------
        GossamerError
            As :meth:`curve`; the model is then as it was.
        """
        calibration, measured = self._split(_usable(data, model), heldout, model)
        curve = self.curve(model, measured, calibration, batch_size=batch_size, progress=progress)
        essential = curve.essential(self.tolerance)
        chosen = self._chosen(curve, essential.sparsity)
        before = copy_of(model) if self.steps and undo else None
        work = chosen.apply(model, calibration, undo=before is None and undo, batch_size=batch_size)
        try:
            if self.steps:
                self._finetune(model, calibration, parameter_masks(work))
        except BaseException:
            work.forget()
            if before is not None:
                put_back(model, before)
            raise
        return Successor(
            self,
            work,
            before=before,
            notes=curve.sentences(self.tolerance),
            warnings=_warnings(curve, essential.sparsity),
            facts={"curve": curve.to_dict(self.tolerance)},
        )

    def _split(self, tokens: Any, heldout: Any, model: nn.Module) -> tuple[Any, Any]:
        if heldout is not None:
            return tokens, _usable(heldout, model)
        if not self.steps and not any(m.measures or m.allocation == "owl" for m in self._methods()):
            return tokens, tokens
        half = len(tokens) // 2
        if not half:
            raise GossamerError(
                f"base {self.base} calibrates on one part of the data and is measured on another; "
                "give at least 2 windows, or heldout"
            )
        return _part(tokens, 0, half), _part(tokens, half, len(tokens))

    def _methods(self) -> Iterator[OneShot]:
        return (method for _, _, method in self._points())

    def _chosen(self, curve: Curve, sparsity: float) -> OneShot:
        """The method of the point found; the dense point prunes nothing."""
        if not sparsity:
            pattern = Unstructured("layer") if isinstance(self.pattern, NM) else self.pattern
            return starting("magnitude", 0.0, pattern)
        wanted = curve.asked[curve.sparsity.index(sparsity)]
        return next(method for asked, _, method in self._points() if asked == wanted)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Successor:
        """Take up the stored masks of a loaded model; nothing is swept again."""
        work = reattach_masks(model, meta, tensors)
        return Successor(self, work, notes=meta["notes"], facts=meta["facts"])


def _usable(data: Any, model: nn.Module) -> Tokens | Inputs:
    return data if isinstance(data, Inputs) else as_tokens(data, model)


def _part(tokens: Tokens | Inputs, start: int, stop: int) -> Tokens | Inputs:
    if isinstance(tokens, Tokens):
        return tokens.slice(start, stop)
    return Inputs({name: value[start:stop] for name, value in tokens.values.items()})


def _ceiling(model: nn.Module, data: Tokens | Inputs) -> float | None:
    """Loss of equal odds for every answer: words for tokens, classes for labelled inputs."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    if isinstance(data, Tokens):
        size = getattr(config.get_text_config(), "vocab_size", 0)
    else:
        size = getattr(config, "num_labels", 0)
    return log(size) if size and size > 1 else None


def _warnings(curve: Curve, sparsity: float) -> Sequence[str]:
    said: list[str] = []
    if not sparsity:
        said.append(
            "no swept sparsity stays within the tolerance, so nothing was removed; sweep smaller "
            "sparsities or allow more"
        )
    elif sparsity == curve.sparsity[-1]:
        said.append("the largest swept sparsity still stays within the tolerance; sweep further")
    if curve.windows < 8:
        said.append(
            f"the intervals are drawn from {curve.windows} window"
            f"{'s' if curve.windows > 1 else ''}; give at least 8"
        )
    return said
