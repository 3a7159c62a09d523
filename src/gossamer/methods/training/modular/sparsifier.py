"""A sparsifier that listens: before a change of masks it correlates the units of every layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.training.modular.activity import listen
from gossamer.methods.training.modular.correlation import Comoments
from gossamer.methods.training.sparsifier.change import Change
from gossamer.methods.training.sparsifier.masks import Held
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier

if TYPE_CHECKING:
    from gossamer.methods.training.g2gnet import G2GNet

__all__ = ["HebbianSparsifier"]


class HebbianSparsifier(Sparsifier):
    """A :class:`Sparsifier` whose masks grow where the units on both sides are active together.

    For some updates before a change it adds up correlations, as large as the weights themselves;
    they are dropped once the masks have changed. In between nothing is measured.
    """

    method: "G2GNet"

    def __init__(self, method: "G2GNet", *args: Any, **options: Any) -> None:
        self._moments: dict[str, Comoments] = {}
        super().__init__(method, *args, **options)
        if any(method.listens(update) for update in range(1, method.steps + 1)):
            self._handles += listen(self.model, self.layers, self._listening, self._hear)

    def _hold(self, masters: Mapping[str, Tensor]) -> dict[str, Held]:
        held = super()._hold(masters)
        for path, one in held.items():
            if one.layout.sharded:
                raise GossamerError(
                    f"{path} is sharded over processes; correlations are of whole matrices: "
                    "replicate the model with DistributedDataParallel"
                )
        return held

    def _listening(self) -> bool:
        return self.method.listens(self.updates + 1)

    def _hear(self, name: str, before: Tensor, behind: Tensor) -> None:
        self._comoments(name, behind.device).update(before, behind)

    def _comoments(self, name: str, device: torch.device) -> Comoments:
        if name not in self._moments:
            rows, columns = next(layer.shape for layer in self.layers if layer.name == name)
            self._moments[name] = Comoments((rows, columns), self.method.decay, device)
        return self._moments[name]

    @torch.no_grad()
    def step(self) -> bool:
        """Hold the masks after an update; see :meth:`Sparsifier.step`.

        An update that was listened to costs one more product, as large as a dense forward pass.
        """
        heard = self._stepped and self._listening()
        changed = super().step()
        if heard:
            at = self.flops.positions or {}
            self.flops.total += 2.0 * sum(
                layer.size * at.get(layer.name, 1.0) for layer in self.layers
            )
        return changed

    def _carry_out(self, change: Change) -> None:
        if change.growth == "correlation":
            for layer in self.layers:
                one = self.held[layer.parameter]
                if layer.parameter not in self._signal:
                    self._signal[layer.parameter] = torch.zeros_like(
                        one.weight, dtype=torch.float32
                    )
                moments = self._comoments(layer.name, one.weight.device)
                moments.pool()
                layer.view(self._signal[layer.parameter]).copy_(moments.correlation().abs_())
        super()._carry_out(change)
        self._moments.clear()

    # -- reading, stopping, going on --------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes held beside the model and the optimizer, by purpose."""
        heard = any(self.method.listens(u) for u in range(1, self.method.steps + 1))
        return {
            **super().memory(),
            "correlations before masks change": heard * 4 * sum(x.size for x in self.layers),
        }

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on exactly: plain values and tensors."""
        state = super().state_dict()
        for name, moments in self._moments.items():
            state["removed"] |= {f"{name}:{k}": v.clone() for k, v in moments.tensors.items()}
            state["removed"][f"{name}:batches"] = torch.tensor(moments.batches)
        return state

    @torch.no_grad()
    def _take(self, removed: Mapping[str, Tensor]) -> None:
        super()._take(removed)
        self._moments.clear()
        for key, stored in removed.items():
            name, _, part = key.rpartition(":")
            moments = self._comoments(name, self._device_of(name))
            if part == "batches":
                moments.batches = int(stored)
            else:
                moments.tensors[part].copy_(stored)

    def _device_of(self, name: str) -> torch.device:
        layer = next(layer for layer in self.layers if layer.name == name)
        return self.held[layer.parameter].weight.device
