"""What a search looks at: batches, read over and over, and what a model makes of one of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError
from gossamer.models import Progress
from gossamer.models.gradient import own_loss

__all__ = ["SearchData"]

Loss = Callable[[nn.Module, Any], Tensor]


class SearchData:
    """Batches for a search; called with a model, the loss of the first of them.

    Parameters
    ----------
    batches : a list, a loader or anything else that can be read more than once. A batch is a dict
        of the model's arguments, a pair of inputs and labels, or inputs alone; labels are read
        only by objectives that need a loss.
    loss : function of (model, batch) to a scalar, in place of the model's own loss on a dict, and
        of cross-entropy on a pair.
    progress : called with (steps of the search done, steps, what).
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        loss: Loss | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.batches = batches
        self.progress = progress
        self._loss = loss

    def __call__(self, model: nn.Module) -> Tensor:
        """Loss of the first batch, so that other methods before training take the same data."""
        return self.loss(model, next(self.forever()))

    def forever(self) -> Iterator[Any]:
        """The batches, from the start again whenever they end.

        Raises
        ------
        GossamerError
            If there are none, or they can be read only once and do not last.
        """
        seen = 0
        while True:
            before = seen
            for batch in self.batches:
                seen += 1
                yield batch
            if seen == before:
                raise GossamerError(
                    f"the search data ended after {seen} batches; give a list or a loader, which "
                    "can be read again"
                )

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """What the model says of a batch without its labels, (..., classes); padding left out.

        Raises
        ------
        GossamerError
            If the model gives nothing with classes.
        """
        device = next(model.parameters()).device
        mask: Tensor | None = None
        if isinstance(batch, Mapping):
            given = {n: v.to(device) for n, v in batch.items() if n != "labels"}
            mask = given.get("attention_mask")
            found = model(**given)
        else:
            found = model(_inputs(batch).to(device))
        found = getattr(found, "logits", found)
        if not isinstance(found, Tensor) or found.dim() < 2:
            raise GossamerError(
                f"{type(model).__name__} gives no logits; this objective compares outputs of "
                "shape (..., classes): use objective task, ratio, norm or gradients with loss="
            )
        if mask is not None and mask.shape == found.shape[:-1]:
            found = found[mask.bool()]
        return found.float() if found.element_size() < 4 else found

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch.

        Raises
        ------
        GossamerError
            If the batch has no labels and the model no loss of its own.
        """
        if self._loss is not None:
            return self._loss(model, batch)
        if isinstance(batch, Mapping):
            device = next(model.parameters()).device
            return own_loss(model, {name: value.to(device) for name, value in batch.items()})
        if isinstance(batch, Tensor):
            raise GossamerError(
                "the search data has no labels; use objective kl or features, or give pairs of "
                "inputs and labels"
            )
        logits = self.logits(model, batch)
        return cross_entropy(logits, batch[1].to(logits.device))


def _inputs(batch: Any) -> Tensor:
    found = batch if isinstance(batch, Tensor) else None
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        found = batch[0]
    if found is None:
        raise GossamerError(
            f"a batch of the search data is a {type(batch).__name__}; give dicts of the model's "
            "arguments, pairs of inputs and labels, or tensors"
        )
    return found
