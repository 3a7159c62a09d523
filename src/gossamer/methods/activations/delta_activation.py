"""Delta activation: from frame to frame little changes, so compute with what does.

Activations are quantised, their changes sent on, and linear layers integrate what they receive.
Training with a penalty on the changes makes them rarer.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name

from gossamer.core import Card, GossamerError, Method, check_count
from gossamer.methods.activations.streams.applied import DeltaStream
from gossamer.methods.activations.streams.delta import DeltaLayer, delta_layers, quantise
from gossamer.methods.activations.streams.play import play
from gossamer.methods.activations.streams.video import moving_shapes
from gossamer.methods.activations.training.loop import Training, as_trainable, fit
from gossamer.methods.activations.training.trained import keep_weights
from gossamer.models import Inputs, Progress

__all__ = ["DeltaActivation", "DeltaLayer", "moving_shapes", "play", "quantise"]

_MEASURED = 16


@dataclass(frozen=True, kw_only=True)
class DeltaActivation(Method):
    """Send quantised changes of activations between frames, and train them to be few.

    The loss is the mean cross-entropy over frames plus ``penalty`` times the sum over layers of
    the mean |Δ|. At threshold 0 the outputs are those of the network on quantised activations.
    Batch norms work as in evaluation, on the integrated sums, so they need no folding.

    Parameters
    ----------
    quantum : step of the quantised activations, 0 for none. Powers of two sum without rounding.
    threshold : changes smaller than this are not sent yet; what is left waits, nothing is lost.
    penalty : λ of the mean |Δ|; 0 trains without it.
    refresh : frames after which the sums are computed anew, against rounding drift; 0 never.
    steps, lr, batch_size, seed : of the training; steps 0 leaves the weights.

    Source: arXiv 2107.07305, §3 (quantisation, delta, straight-through gradient, penalty).

    Departs from the paper: the threshold beside the quantum is an option; plain PyTorch layers
    take part without being exchanged; the step of quantisation is fixed, not learned.
    """

    card: ClassVar[Card] = Card(
        title="Training for temporal sparsity in deep neural networks, application in video "
        "processing",
        year=2021,
        arxiv="2107.07305",
        system="delta_activation",
        family="activations",
        when="during training",
        masks="dynamic",
        site="input of every linear layer and convolution",
        score="|change since it was last sent|",
        pattern="any activation, per frame",
        budget="emergent, by quantisation, threshold and penalty",
        schedule="constant",
        update="training of all weights through the rounding",
        kernel="dense products of changes",
        departs="a threshold beside the quantum as an option; quantum fixed",
    )
    subject: ClassVar[str] = "stream model"
    example: ClassVar[Mapping[str, Any]] = {"steps": 2, "batch_size": 3, "lr": 1e-2}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the sparsity is that of changes and no parameter",
        "exact sparsity": "the sparsity is that of changes and no parameter",
        "sparsity range": "the sparsity is that of changes and no parameter",
        "reads data": "without steps nothing is trained",
    }

    quantum: float = 1 / 16
    threshold: float = 0.0
    penalty: float = 1.0
    refresh: int = 0
    steps: int = 200
    lr: float = 1e-3
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("quantum", "threshold", "penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value < 0:
                raise GossamerError(f"{name} is {value!r}; give a number, at least 0")
        check_count("refresh", self.refresh, 0)
        self.plan()

    def plan(self) -> Training:
        """The training."""
        return Training(
            steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=self.seed, decay=0.5
        )

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> DeltaStream:
        """Put deltas to work on every linear layer, and train if ``steps`` says so.

        Parameters
        ----------
        model : maps frames (N, ...) to class scores (N, classes), each frame by itself.
        data : ``Inputs`` with ``frames`` (N, T, ...) and, to train, ``labels`` (N,).
        """
        clips = _clips(data)
        with ExitStack() as stack:
            deltas = self._install(model, stack)
            losses: tuple[float, ...] = ()
            if self.steps:
                as_trainable(model)
                stack.callback(keep_weights(dict(model.named_parameters())))
                losses = self._train(model, clips, deltas, progress)
            work = DeltaStream(self, model, stack.pop_all(), deltas, {}, losses=losses)
        try:
            work.measure(clips.values["frames"][:_MEASURED])
        except BaseException:
            work.restore()
            raise
        return work

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> DeltaStream:
        """Put deltas and stored weights to work on a network of the same layers."""
        with ExitStack() as stack:
            deltas = self._install(model, stack)
            stack.callback(keep_weights(dict(model.named_parameters())))
            try:
                model.load_state_dict(dict(tensors))
            except RuntimeError:
                raise GossamerError(
                    "the saved weights do not fit this network; build the one they were saved from"
                ) from None
            counts: dict[str, Any] = {name: tuple(c) for name, c in meta["counts"].items()}
            return DeltaStream(self, model, stack.pop_all(), deltas, counts)

    def _install(self, model: nn.Module, stack: ExitStack) -> dict[str, DeltaLayer]:
        deltas = {
            name: DeltaLayer(
                layer, quantum=self.quantum, threshold=self.threshold, refresh=self.refresh
            )
            for name, layer in delta_layers(model).items()
        }
        for delta in deltas.values():
            stack.callback(delta.install())
        return deltas

    def _train(
        self,
        model: nn.Module,
        clips: Inputs,
        deltas: Mapping[str, DeltaLayer],
        progress: Progress | None,
    ) -> tuple[float, ...]:
        length = clips.values["frames"].shape[1]

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            scores = model(batch["frames"].flatten(0, 1))
            return F.cross_entropy(scores, batch["labels"].repeat_interleave(length))

        def changes(step: int) -> Tensor | None:
            sizes = [delta.size for delta in deltas.values() if delta.size is not None]
            return self.penalty * torch.stack(sizes).sum() if self.penalty else None

        try:
            for delta in deltas.values():
                delta.length = length
            return fit(
                model,
                clips,
                self.plan(),
                extra=changes,
                loss=loss,
                progress=progress,
                what="deltas",
            )
        finally:
            for delta in deltas.values():
                delta.length = delta.size = None


def _clips(data: Any) -> Inputs:
    """The clips, checked."""
    if not isinstance(data, Inputs) or "frames" not in data.values:
        raise GossamerError(
            "a stream model needs Inputs with frames (clips, frames, ...) and labels; got "
            f"{type(data).__name__}"
        )
    if data.values["frames"].dim() < 3:
        shape = tuple(data.values["frames"].shape)
        raise GossamerError(f"frames have shape {shape}; give (clips, frames, ...)")
    return data
