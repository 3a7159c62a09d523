"""A network that does another task, and how well; :meth:`restore` gives its own task back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.training.bayesian.calibration import quality
from gossamer.methods.training.reprogrammed.adapters import (
    Adapter,
    ImagePrompt,
    LinearProbe,
    SoftPrompt,
)
from gossamer.methods.training.reprogrammed.examples import as_examples, is_text
from gossamer.methods.training.reprogrammed.host import Host, call
from gossamer.methods.training.sparsifier.layers import find_layers
from gossamer.models import Applied, Report, SiteRow, State, at_work
from gossamer.models.capture import evaluating

if TYPE_CHECKING:
    from gossamer.methods.training.reprogramming import Reprogramming

__all__ = ["Reprogrammed", "adapter_from", "check_free"]


def check_free(model: nn.Module) -> None:
    """Refuse a network that is reprogrammed already.

    Raises
    ------
    GossamerError
        Saying what to restore.
    """
    if any(isinstance(work, Reprogrammed) for work in at_work(model)):
        raise GossamerError(
            "the network is reprogrammed already; restore() that first, then apply again"
        )


def adapter_from(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter that :meth:`Reprogrammed.state` stored."""
    options: dict[str, Any] = dict(meta["options"])
    adapter: Adapter
    if meta["kind"] == LinearProbe.kind:
        adapter = LinearProbe(**options)
    elif meta["kind"] == ImagePrompt.kind:
        for name in ("low", "high"):
            options[name] = torch.tensor(options[name])
        adapter = ImagePrompt(**options)
    else:
        adapter = SoftPrompt(options["classes"], tensors["adapter.vectors"])
    adapter.load_state_dict({name.removeprefix("adapter."): t for name, t in tensors.items()})
    return adapter.requires_grad_(False)


class Reprogrammed(Applied):
    """A frozen network with a learned adapter: calling the network gives logits of the new task.

    The adapter saves no arithmetic, and the network's zeros run densely: ``simulated`` is True.

    Attributes
    ----------
    adapter : what was learned. losses : mean of every epoch; empty after loading.
    names : of the task's classes.
    """

    simulated = True

    def __init__(
        self,
        method: "Reprogramming",
        host: Host,
        names: tuple[str, ...],
        *,
        losses: tuple[float, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(method, host.model)
        self.host = host
        self.adapter = host.adapter
        self.names = names
        self.losses = losses
        self._notes = notes
        self._join()

    def _undo(self) -> None:
        self.host.remove()

    @property
    def label_map(self) -> dict[str, int] | None:
        """Class of the task to class of the network; None for a probe, which has none."""
        if isinstance(self.adapter, LinearProbe):
            return None
        found = self.adapter.get_buffer("labels").tolist()
        return dict(zip(self.names, found, strict=True))

    @torch.no_grad()
    def predict(self, data: Any, *, batch_size: int = 128) -> Tensor:
        """Class probabilities (N, T) of labelled samples, see :meth:`Reprogramming.apply`."""
        examples = as_examples(data, self.model)
        device = next(self.model.parameters()).device
        parts: list[Tensor] = []
        with evaluating(self.model):
            for values, _ in examples.batches(batch_size, device):
                output = call(self.model, values)
                logits = output if isinstance(output, Tensor) else output.logits
                parts.append(logits.float().softmax(-1).cpu())
        return torch.cat(parts)

    def quality(self, data: Any) -> dict[str, float]:
        """Accuracy, expected calibration error ``ece`` (15 bins) and ``nll`` (nats)."""
        labels = as_examples(data, self.model).labels
        if int(labels.max()) >= len(self.names):
            raise GossamerError(
                f"labels go to {int(labels.max())}, the task has {len(self.names)} classes"
            )
        return quality(self.predict(data), labels)

    def state(self) -> State:
        tensors = {f"adapter.{k}": v.detach().clone() for k, v in self.adapter.state_dict().items()}
        meta = {
            "head": self.host.head,
            "kind": self.adapter.kind,
            "options": self.adapter.options(),
            "names": list(self.names),
            "notes": list(self._notes),
        }
        return State(meta, tensors)

    def report(self) -> Report:
        """Sparsity of the frozen weights, the size of the adapter, and the label map."""
        rows: list[SiteRow] = []
        for layer in find_layers(self.model):
            weight = layer.view(self.model.get_parameter(layer.parameter).detach())
            gone = 1.0 - int(weight.count_nonzero()) / layer.size
            rows.append(SiteRow(layer.name, layer.role, layer.block, layer.size, gone))
        size = sum(p.numel() for p in self.model.parameters())
        notes = [
            f"{self.adapter.kind} of {self.adapter.learned:,} learned values; all {size:,} of the "
            "network are frozen",
            *self._notes,
        ]
        if (found := self.label_map) is not None:
            what = "word" if is_text(self.model) else "class"
            shown = ", ".join(f"{name} is {what} {source}" for name, source in found.items())
            notes.append(f"label map: {shown}")
        return Report(
            self.method.to_dict(), tuple(rows), "weights", size, self.simulated, tuple(notes)
        )
