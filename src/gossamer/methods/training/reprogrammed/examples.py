"""Examples of the new task: inputs of a network, and what each of them is.

Shapes: N samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.models import Inputs
from gossamer.models.labelled import Labelled, as_labelled

__all__ = ["Examples", "as_examples", "few_shot", "is_text"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels.

    Parameters
    ----------
    values : keyword arguments of the network, each (N, ...); ``x`` is given by position.
    labels : (N,) int64.
    names : of the classes.
    """

    values: dict[str, Tensor]
    labels: Tensor
    names: tuple[str, ...]

    def at(self, rows: Tensor) -> "Examples":
        """Some of them."""
        values = {name: value[rows] for name, value in self.values.items()}
        return Examples(values, self.labels[rows], self.names)

    def batches(
        self, size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """All of them once, in order or shuffled: inputs and labels."""
        count = len(self.labels)
        order = (
            torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        )
        for rows in order.split(size):
            part = self.at(rows)
            yield {k: v.to(device) for k, v in part.values.items()}, part.labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)


def is_text(model: nn.Module) -> bool:
    """Whether a network reads token ids and has a language-model head."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = None if getter is None else getter()
    except (AttributeError, NotImplementedError):
        head = None
    reads = hasattr(model, "get_input_embeddings") and hasattr(model, "config")
    return reads and isinstance(head, nn.Module)


def as_examples(data: Any, model: nn.Module) -> Examples:
    """Whatever a user may mean by labelled samples.

    Parameters
    ----------
    data : a pair (inputs, labels); ``Inputs`` with ``labels``; for language models also what
        :func:`gossamer.models.labelled.as_labelled` takes, with the attribute ``label``.

    Raises
    ------
    GossamerError
        If the data is none of these, labels are no whole numbers from 0 on, or inputs not finite.
    """
    names: tuple[str, ...] = ()
    pair = isinstance(data, tuple | list) and len(data) == 2
    if pair and all(isinstance(part, Tensor) for part in data):
        values, labels = {_key(model): data[0]}, data[1]
    elif isinstance(data, Inputs):
        values = dict(data.values)
        if "labels" not in values:
            raise GossamerError("the samples have no labels; give Inputs with labels")
        labels = values.pop("labels")
    elif is_text(model) and not pair:
        found = as_labelled(data, model)
        values, labels, names = _of_text(found)
    else:
        raise GossamerError(
            f"this method needs labelled samples and got {type(data).__name__}; give a pair "
            "(inputs, labels) of tensors, or Inputs with labels"
        )
    _check(values, labels)
    count = int(labels.max()) + 1
    return Examples(values, labels.long(), names or tuple(map(str, range(count))))


def _key(model: nn.Module) -> str:
    if is_text(model):
        return "input_ids"
    return "pixel_values" if hasattr(model, "config") else "x"


def _of_text(found: Labelled) -> tuple[dict[str, Tensor], Tensor, tuple[str, ...]]:
    mask = found.tokens.attention_mask
    values = {"input_ids": found.tokens.input_ids}
    if not bool(mask.all()):
        values["attention_mask"] = mask.long()
    return values, found.codes("label"), found.values["label"]


def _check(values: dict[str, Tensor], labels: Tensor) -> None:
    sizes = {len(value) for value in values.values()}
    if labels.dim() != 1 or labels.is_floating_point() or sizes != {len(labels)} or not sizes - {0}:
        raise GossamerError(
            f"labels are whole numbers (N,), one for each sample; got {labels.dtype} "
            f"{tuple(labels.shape)} for {', '.join(map(str, sorted(sizes)))} samples"
        )
    for name, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise GossamerError(f"{name} holds NaN or infinity; fill or drop those samples")
    low, counts = int(labels.min()), torch.bincount(labels.clamp_min(0).long())
    if low < 0 or not bool(counts.all()):
        which = low if low < 0 else int((counts == 0).nonzero()[0])
        raise GossamerError(
            f"labels go from {low} to {int(labels.max())} and class {which} "
            f"{'is below 0' if low < 0 else 'has no sample'}; number the classes 0, 1, ... T - 1"
        )


def few_shot(examples: Examples, shots: int | None, seed: int) -> Examples:
    """At most so many samples of every class, drawn at random; all for None."""
    if shots is None:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    labels = examples.labels[order]
    rows = [order[labels == label][:shots] for label in range(len(examples.names))]
    return examples.at(torch.cat(rows).sort().values)
