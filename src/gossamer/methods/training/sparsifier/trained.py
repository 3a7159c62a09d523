"""A model that was trained sparse: the zeros are in its parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Selection, unpack_bits
from gossamer.methods.training.sparsifier.flops import TrainingFlops
from gossamer.methods.training.sparsifier.layers import Layer, find_layers
from gossamer.methods.training.sparsifier.layout import Layout, everywhere, here, is_sharded, rank
from gossamer.models import Applied, Report, SiteRow, State, at_work

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["SparselyTrained", "copy_of", "gathered", "put_back", "reattached"]


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model)}


@torch.no_grad()
def put_back(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Write copies back in place."""
    for name, tensor in _tensors(model):
        tensor.copy_(before[name])


@torch.no_grad()
def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict in the main memory of rank 0, one tensor at a time. Collective."""
    whole: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = Layout(name, tensor).full(here(tensor))
        if rank() == 0:
            whole[name] = full.cpu()
    return whole


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


class SparselyTrained(Applied):
    """What a sparse training leaves behind. Masked-dense, so ``simulated`` is True.

    Parameters
    ----------
    masks : layer to its mask at one bit a weight.
    before : copies to restore from, or None.
    losses : of every update, where gossamer's own loop trained.
    flops : operations of the training; None after loading.
    """

    def __init__(
        self,
        method: "SparseTraining",
        model: nn.Module,
        layers: tuple[Layer, ...],
        masks: Mapping[str, Tensor],
        *,
        before: Mapping[str, Tensor] | None = None,
        notes: tuple[str, ...] = (),
        warnings: tuple[str, ...] = (),
        losses: tuple[float, ...] = (),
        flops: TrainingFlops | None = None,
    ) -> None:
        super().__init__(method, model)
        self.layers = layers
        self.masks = dict(masks)
        self.losses = losses
        self.flops = flops
        self._before = before
        self._whole: dict[str, Tensor] | None = None
        self._notes = notes
        self._warnings = warnings
        self._kept = {layer.name: self.selection(layer.name).kept for layer in layers}
        self._join()

    def selection(self, name: str) -> Selection:
        """What stays of one layer, (O, I)."""
        layer = next(layer for layer in self.layers if layer.name == name)
        return Selection.from_mask(unpack_bits(self.masks[name], layer.shape))

    def _undo(self) -> None:
        if self._before is None:
            raise GossamerError(
                "trained without a copy of the weights before; attach with undo=True to restore, "
                "or load the model again"
            )
        works = at_work(self.model)
        if works[-1] is not self:
            raise GossamerError(
                f"{works[-1].method.key()} was applied to the trained weights later; "
                "restore that first"
            )
        put_back(self.model, self._before)

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in place of shards, while :meth:`save` has them."""
        return tensors if self._whole is None else self._whole

    def save(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """As for any method; of a sharded model rank 0 writes, and every process must call this.

        The whole model passes through the main memory of rank 0.
        """
        shards = [p for p in self.model.parameters() if is_sharded(p)]
        if not shards:
            return super().save(folder, tokenizer)
        failed: Exception | None = None
        self._whole = gathered(self.model)
        try:
            if rank() == 0:
                super().save(folder, tokenizer)
        except Exception as error:
            failed = error
        finally:
            self._whole = None
        # Nobody goes on before the files are there, or without knowing that they are not.
        if not everywhere(failed is None, Layout("", shards[0]).working):
            raise failed or GossamerError("rank 0 could not save; its message says why")
        return Path(folder)

    def state(self) -> State:
        """The masks, and what was noted of the training."""
        meta = {
            "layers": [layer.name for layer in self.layers],
            "notes": list(self._notes),
            "warnings": list(self._warnings),
        }
        return State(meta, {f"mask.{name}": mask for name, mask in self.masks.items()})

    def report(self) -> Report:
        """Sparsity of every layer, the training's cost, the memory it held."""
        rows = tuple(
            SiteRow(
                layer.name,
                layer.role,
                layer.block,
                layer.size,
                1.0 - self._kept[layer.name] / layer.size,
            )
            for layer in self.layers
        )
        return Report(
            self.method.to_dict(),
            rows,
            "weights",
            sum(p.numel() for p in self.model.parameters()),
            self.simulated,
            notes=self._notes,
            warnings=self._warnings,
        )

    def weight_bytes_saved(self) -> int:
        """Bytes of the removed weights, less a bit for each weight of the layer."""
        saved = 0
        for layer in self.layers:
            item = self.model.get_parameter(layer.parameter).element_size()
            read = self._kept[layer.name] * item + -(-layer.size // 8)
            saved += max(0, layer.size * item - read)
        return saved


def reattached(
    method: "SparseTraining",
    model: nn.Module,
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kind: type[SparselyTrained] = SparselyTrained,
) -> SparselyTrained:
    """Take up the stored masks of a loaded model, whose weights hold the zeros.

    Raises
    ------
    GossamerError
        If the model lacks a layer, or has weights where its mask removes them.
    """
    known = {layer.name: layer for layer in find_layers(model)}
    for name in meta["layers"]:
        if name not in known:
            raise GossamerError(f"the saved masks name {name}, which this model does not have")
        layer = known[name]
        mask = unpack_bits(tensors[f"mask.{name}"], layer.shape)
        if bool(layer.view(model.get_parameter(layer.parameter).detach())[~mask].any()):
            raise GossamerError(
                f"{name} is not zero where its saved mask removes weights; "
                "the weights were changed after saving: save the model again"
            )
    return kind(
        method,
        model,
        tuple(known[name] for name in meta["layers"]),
        {name: tensors[f"mask.{name}"] for name in meta["layers"]},
        # Nothing of the model was changed, so there is nothing to put back.
        before=dict(_tensors(model)),
        notes=tuple(meta["notes"]),
        warnings=tuple(meta["warnings"]),
    )
