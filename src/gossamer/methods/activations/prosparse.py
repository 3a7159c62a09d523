"""ProSparse: make a SiLU model a ReLU model, then press its hidden units towards zero, gently.

The activation function becomes ReLU, training continues under an L1 penalty that rises in smooth
stages, and at last the ReLU's threshold is lifted, so that most hidden units are exactly zero.
Shapes: I = hidden units.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count
from gossamer.core.schedule import StagedSine
from gossamer.methods.activations.training.fatrelu import FATReLU
from gossamer.methods.activations.training.hidden import (
    HiddenPenalty,
    activation_functions,
    measure_activity,
    swapped,
)
from gossamer.methods.activations.training.loop import Training, as_trainable, fit, take
from gossamer.methods.activations.training.trained import TrainedModel, as_data, keep_weights
from gossamer.models import Progress, find_sites

__all__ = ["FATReLU", "ProSparse", "penalty_at", "stages"]

Rise = Literal["sine", "constant"]

# Of the paper's schedule for Llama-2-7B: stage ends over 16 500 steps, penalties over the largest.
_ENDS = (5_000, 6_000, 10_000, 12_000, 16_000, 16_500)
_PEAKS = (0.0, 0.025, 0.25, 0.25, 1.0, 0.0)
_CONFIG = ("hidden_act", "hidden_activation", "activation_function")
_MEASURED = 64


def stages(steps: int, penalty: float) -> StagedSine:
    """The paper's stages, scaled to a number of steps and a largest penalty.

    Six stages: none, constant, three rises (one level), and a fall back to 0.

    Parameters
    ----------
    steps : at least 6, one a stage. penalty : the largest, at the end of the fifth stage.
    """
    check_count("steps", steps, len(_ENDS))
    ends: list[int] = []
    for place, end in enumerate(_ENDS):
        room = steps - (len(_ENDS) - 1 - place)
        ends.append(max(ends[-1] + 1 if ends else 1, min(round(steps * end / _ENDS[-1]), room)))
    return StagedSine(tuple(ends), tuple(penalty * peak for peak in _PEAKS))


def penalty_at(schedule: StagedSine, step: int) -> float:
    """Weight of the L1 term at a step: constant in the first two stages, then half sines.

    λ(t) = λ_{i-1} + ½ (λ_i - λ_{i-1}) [1 + sin(-π/2 + π (t - T_{i-1}) / (T_i - T_{i-1}))] inside
    stage i, so it is continuous from the second stage on.

    Source: arXiv 2402.13516, §3.2.
    """
    for end, peak in zip(schedule.steps[:2], schedule.peaks[:2], strict=True):
        if step < end:
            return peak
    return schedule.at(step).sparsity


@dataclass(frozen=True, kw_only=True)
class ProSparse(Method):
    """Continue training as a ReLU model under a staged L1 penalty on the hidden activations.

    The loss is the model's own plus λ(t) times the mean over layers and real tokens of ‖a‖₁, a
    the vector that enters the down projection, summed over its units in fp32.

    Parameters
    ----------
    steps : updates of all weights, at least 6.
    penalty : λ at its peak; 0 only makes the model a ReLU model (ReLUfication).
    rise : ``sine`` stages, or the peak ``constant`` from the first step (the paper's ablation).
    threshold : of the ReLU after training; in training it is 0.
    lr, batch_size, seed : of the training; the rate falls to 0 over the second half.

    Source: arXiv 2402.13516, §3; stages of its Llama-2-7B, scaled to ``steps``.

    Departs from the paper: the penalty is named per token's sum over units and so depends on the
    width; the peak is a parameter, the paper's values being for a model a thousand times larger.
    """

    card: ClassVar[Card] = Card(
        title="ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large "
        "Language Models",
        year=2024,
        arxiv="2402.13516",
        system="prosparse",
        family="activations",
        when="during training",
        masks="dynamic",
        site="hidden activation that enters the down projection",
        score="pre-activation of the gate",
        pattern="any hidden unit, per token",
        budget="emergent, by an L1 penalty and a fixed threshold",
        schedule="staged sine of the penalty",
        update="training of all weights",
        kernel="masked dense",
        departs="stages scaled to the steps at hand; the peak penalty is a parameter",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 6, "batch_size": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the sparsity emerges in training and is no parameter",
        "exact sparsity": "the sparsity emerges in training and is no parameter",
        "sparsity range": "the sparsity emerges in training and is no parameter",
        "encoders": "training needs a model with a loss of its own, on data with labels",
    }

    steps: int = 600
    penalty: float = 1e-3
    rise: Rise = "sine"
    threshold: float = 0.01
    lr: float = 3e-4
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("penalty", "threshold"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value < 0:
                raise GossamerError(f"{name} is {value!r}; give a number, at least 0")
        if self.rise not in get_args(Rise):
            raise GossamerError(f"rise is {self.rise!r}; choose from {', '.join(get_args(Rise))}")
        stages(self.steps, self.penalty)
        self.plan()

    def plan(self) -> Training:
        """The training, also for a dense model that is to see the same tokens."""
        return Training(
            steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=self.seed, decay=0.5
        )

    def weight(self, step: int) -> float:
        """λ at a step."""
        if self.rise == "constant":
            return self.penalty
        return penalty_at(stages(self.steps, self.penalty), step)

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> TrainedModel:
        """Train the model in place, then lift the threshold.

        Parameters
        ----------
        model : a transformers model with a loss of its own, in float32.
        data : see :func:`gossamer.models.as_tokens`; ``Inputs`` with labels for other models.
        """
        as_trainable(model)
        samples = as_data(data, model)
        with ExitStack() as stack:
            stack.callback(keep_weights(dict(model.named_parameters())))
            functions = stack.enter_context(self._relu(model))
            with HiddenPenalty(model, _l1) as penalty:

                def term(step: int) -> Tensor | None:
                    weight = self.weight(step)
                    return weight * penalty() if weight else None

                losses = fit(
                    model, samples, self.plan(), extra=term, progress=progress, what="ProSparse"
                )
            for function in functions:
                function.threshold = self.threshold
            few = take(samples, torch.arange(min(_MEASURED, len(samples))))
            activity = measure_activity(model, few)
            notes = (f"shares are measured on the first {len(few)} samples of the training data",)
            return TrainedModel(self, model, stack.pop_all(), activity, losses=losses, notes=notes)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> TrainedModel:
        """Lift the thresholds of a loaded model; its weights are already the trained ones."""
        with ExitStack() as stack:
            for function in stack.enter_context(self._relu(model)):
                function.threshold = self.threshold
            return TrainedModel(self, model, stack.pop_all(), TrainedModel.activity_of(meta))

    @contextmanager
    def _relu(self, model: nn.Module) -> Iterator[list[FATReLU]]:
        """The model with FATReLU of threshold 0 for its MLPs' activation functions."""
        functions = {path: FATReLU() for path in activation_functions(model, find_sites(model))}
        for function in functions.values():
            function.train(model.training)
        with swapped(model, dict(functions)), _named_relu(model):
            yield list(functions.values())


def _l1(rows: Tensor) -> Tensor:
    return rows.abs().sum(-1)


@contextmanager
def _named_relu(model: nn.Module) -> Iterator[None]:
    """Say ReLU in the configuration, so that a saved folder loads as a ReLU model anywhere."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    before = {n: v for n in _CONFIG if isinstance(v := getattr(text, n, None), str)}
    try:
        for name in before:
            setattr(text, name, "relu")
        yield
    finally:
        for name, value in before.items():
            setattr(text, name, value)
