"""Reprogramming: a frozen network does another task, behind a learned prompt or before a probe.

Whether a sparse network can do so as well as a dense one of the same accuracy, and whether its
confidence can be believed, shows what the removed weights were good for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count, unknown
from gossamer.methods.training.reprogrammed.adapters import (
    Adapter,
    ImagePrompt,
    LinearProbe,
    resized,
)
from gossamer.methods.training.reprogrammed.examples import (
    Examples,
    as_examples,
    few_shot,
    is_text,
)
from gossamer.methods.training.reprogrammed.fitted import Reprogrammed, adapter_from, check_free
from gossamer.methods.training.reprogrammed.host import Host, find_head, soft_prompt
from gossamer.methods.training.reprogrammed.labels import check_classes
from gossamer.methods.training.reprogrammed.training import (
    AdapterPlan,
    train_probe,
    train_prompt,
)
from gossamer.models import Progress, context_length

__all__ = ["Reprogramming"]


@dataclass(frozen=True, kw_only=True)
class Reprogramming(Method):
    """Make a frozen network do another task, and measure accuracy and calibration.

    ``adapter="prompt"`` leaves the network its head. Images are shrunk into the centre of the
    network's canvas, and the frame around them is learned; which of its classes stands for which
    of the task's is found anew every epoch, one to one, the most frequent pair first. Before a
    text, learned vectors are put in the place of words, and words of the vocabulary stand for the
    classes. ``adapter="probe"`` learns a linear head on the features instead.

    The network is used as it is: prune it first, by any method, for a sparse one. Afterwards
    calling it gives logits of the task's classes, until ``restore()``.

    Parameters
    ----------
    adapter : ``prompt`` or ``probe``.
    width : of the frame in pixels, or number of vectors before a text.
    canvas : side of the network's images; None takes its configuration's, or the images' own.
    epochs, lr, batch_size : of Adam; the rate falls to a tenth at 50 % and again at 72 %.
    remap_every : epochs a label map stays; 0 takes the network's classes in their order.
    shots : samples of every class that are used; None uses all.
    seed : of the samples drawn, their order, and the first values of a probe or of vectors.

    Source: arXiv 2308.14969; the prompt's label map: arXiv 2211.11635 (from memory).

    Departs from the paper: the frame ranges over the pixels seen in training, channel by channel
    (there 0 to 1, before normalisation); the text form is ours, and adds up probabilities of words
    where images count first choices.
    """

    card: ClassVar[Card] = Card(
        title="Reprogramming under constraints: Revisiting efficient and reliable transferability "
        "of lottery tickets",
        year=2023,
        arxiv="2308.14969",
        system="reprogramming",
        family="training",
        when="after training",
        start="dense",
        masks="none",
        site="inputs and head of a frozen network",
        score="none",
        pattern="none",
        budget="none: the network's own zeros",
        schedule="label map found anew every epoch",
        update="prompt or linear head; the network is frozen",
        kernel="none",
        departs="range of a frame from the data; text form with soft prompt and words as classes",
    )
    subject: ClassVar[str] = "frozen network"
    example: ClassVar[Mapping[str, Any]] = {"epochs": 2, "lr": 0.5}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "it removes nothing: the network's task changes, not its weights",
    }

    adapter: Literal["prompt", "probe"] = "prompt"
    width: int = 2
    canvas: int | None = None
    epochs: int = 100
    lr: float = 0.01
    batch_size: int = 128
    remap_every: int = 1
    shots: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "epochs", "batch_size"):
            check_count(name, getattr(self, name), 1)
        check_count("remap_every", self.remap_every, 0)
        for name in ("canvas", "shots"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        if not isinstance(self.lr, int | float) or not isfinite(self.lr) or self.lr <= 0:
            raise GossamerError(f"lr is {self.lr!r}; give a positive number")
        if self.adapter not in ("prompt", "probe"):
            raise unknown("adapter", self.adapter, ("prompt", "probe"))

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> Reprogrammed:
        """Learn an adapter for a frozen network and put it to work.

        Parameters
        ----------
        model : a classifier of images that ends in a linear head, or a causal language model.
        data : a pair (inputs, labels); ``Inputs`` with ``labels``; for a language model also
            labelled text, see :func:`gossamer.models.labelled.as_labelled`.

        Raises
        ------
        GossamerError
            If the data have no usable labels, one class or more than the network, or training
            diverges; the network is then as it was.
        """
        check_free(model)
        examples = as_examples(data, model)
        if len(examples.names) == 1:
            raise GossamerError(
                f"all {len(examples)} samples have the label {examples.names[0]!r}; a task needs "
                "samples of at least two classes"
            )
        chosen = few_shot(examples, self.shots, self.seed)
        plan = AdapterPlan(self.epochs, self.lr, self.batch_size, self.remap_every, self.seed)
        adapter, head = self._adapter(model, chosen)
        host = Host(model, head, adapter.to(next(model.parameters()).device))
        host.install()
        try:
            train = train_probe if self.adapter == "probe" else train_prompt
            losses = train(host, chosen, plan, progress)
        except BaseException:
            host.remove()
            raise
        adapter.requires_grad_(False)
        note = (
            f"{len(chosen)} of {len(examples)} samples in {len(examples.names)} classes; "
            f"loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last"
        )
        return Reprogrammed(self, host, chosen.names, losses=losses, notes=(note,))

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Reprogrammed:
        """Put a stored adapter to work on the network it was learned for."""
        check_free(model)
        if meta["head"] not in dict(model.named_modules()):
            raise GossamerError(f"the adapter is for a head {meta['head']}, which is not here")
        adapter = adapter_from(meta, tensors)
        host = Host(model, meta["head"], adapter.to(next(model.parameters()).device))
        host.install()
        return Reprogrammed(self, host, tuple(meta["names"]), notes=tuple(meta["notes"]))

    def _adapter(self, model: nn.Module, examples: Examples) -> tuple[Adapter, str]:
        """An untrained adapter, and the path of the network's head."""
        classes = len(examples.names)
        if is_text(model):
            canvas = None
            head = find_head(model, examples)
            self._check_length(model, examples)
        else:
            name, images = next(iter(examples.values.items()))
            canvas = self.canvas if self.adapter == "probe" else self._side(model, images)
            one = examples.at(torch.arange(1))
            if canvas is not None:
                one.values[name] = resized(one.values[name], canvas)
            head = find_head(model, one)
        layer: Any = model.get_submodule(head)
        if self.adapter == "probe":
            with torch.random.fork_rng([]):
                torch.manual_seed(self.seed)
                return LinearProbe(layer.weight.shape[1], classes, canvas), head
        check_classes(classes, len(layer.weight))
        if canvas is None:
            return soft_prompt(model, classes, self.width, self.seed), head
        pixels = next(iter(examples.values.values())).float()
        low, high = pixels.amin((0, 2, 3)), pixels.amax((0, 2, 3))
        return ImagePrompt(classes, canvas, self.width, low, high), head

    def _side(self, model: nn.Module, images: Tensor) -> int:
        """Side of the canvas."""
        size = self.canvas or getattr(getattr(model, "config", None), "image_size", None)
        if isinstance(size, int):
            return size
        if images.dim() != 4 or images.shape[-1] != images.shape[-2]:
            raise GossamerError(
                f"images of shape {tuple(images.shape[1:])} do not say how large the network's "
                "are; give canvas, the side of its images"
            )
        return images.shape[-1]

    def _check_length(self, model: nn.Module, examples: Examples) -> None:
        limit, length = context_length(model), examples.values["input_ids"].shape[1]
        added = self.width if self.adapter == "prompt" else 0
        if limit is not None and length + added > limit:
            raise GossamerError(
                f"texts of {length} tokens behind {added} learned vectors exceed the model's "
                f"context of {limit}; cut the texts"
            )
