"""NMSparsifier: dense weights train while the network computes with N:M ones.

Between updates the model's parameters hold what the network computes with, so gradients arise
with respect to that: straight through the mask. For the length of an update they hold the dense
weights, which otherwise lie in a copy (or in the masters, where a loop trains those).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.training.nm.adam import adam_step, check_adam, start_adam
from gossamer.methods.training.nm.distillation import Frozen, mixing, teacher_of
from gossamer.methods.training.nm.sides import LowRank, Scale, Side
from gossamer.methods.training.nm.trained import Branch, NMTrained
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.compete import whole_layers
from gossamer.methods.training.sparsifier.decide import arranged
from gossamer.methods.training.sparsifier.layers import Layer, Quota
from gossamer.methods.training.sparsifier.layout import here, size_of
from gossamer.methods.training.sparsifier.masks import Held, left_over, same_everywhere
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier
from gossamer.methods.training.sparsifier.trained import SparselyTrained

if TYPE_CHECKING:
    from gossamer.methods.training.nm.base import BehindMask

__all__ = ["NMSparsifier"]


class NMSparsifier(Sparsifier):
    """A :class:`Sparsifier` whose removed weights live on, unseen or faded, until the end.

    Optimizer state of removed weights is theirs and stays; ``finish`` prunes for good. What
    :meth:`state_dict` holds beside masks: the dense weights, scales, branches.

    Attributes
    ----------
    teacher : the dense model that distillation asks, or None.
    """

    method: "BehindMask"
    result: ClassVar[type[SparselyTrained]] = NMTrained

    def __init__(
        self,
        method: "BehindMask",
        model: nn.Module,
        optimizer: Any,
        *,
        state: Mapping[str, Any] | None = None,
        teacher: nn.Module | None = None,
        **given: Any,
    ) -> None:
        self._dense: dict[str, Tensor] = {}
        self._sides: dict[str, Side] = {}
        self._gradients: dict[str, Tensor] = {}
        self._for_sides: dict[str, dict[str, Tensor]] = {}
        self._left = 0.0
        self.teacher = teacher_of(method, model, teacher, resumed=state is not None)
        lent = Frozen(self.teacher)
        try:
            super().__init__(method, model, optimizer, state=state, **given)
        except BaseException:
            lent.remove()
            raise
        self._handles.append(lent)
        if self.teacher is not None:
            hook = mixing(self.teacher, method.distilled_share, method.distilled_temperature)
            self._handles.append(self.model.register_forward_hook(hook, with_kwargs=True))

    # -- making -----------------------------------------------------------------------------

    @torch.no_grad()
    def _begin(self, loss: StartLoss | None) -> None:
        self._make_room()
        self._choose()
        for layer in self.layers:
            one = self.held[layer.parameter]
            if not self.method.scales and not self.method.low_rank_block:
                break
            weight, mask = layer.view(one.trained), layer.view(one.mask)
            if self.method.scales:
                self._sides[layer.name] = Scale(weight, self.method.scales)
            elif self.method.low_rank_block:
                self._sides[layer.name] = LowRank(weight * ~mask, self.method.low_rank_block)
        self._show()

    def _make_room(self) -> None:
        if self.method.changes_adam:
            check_adam(self.optimizer, self.method.key())
        if self.method.low_rank_block and any(layer.expert is not None for layer in self.layers):
            raise GossamerError(
                "stacked experts take no low-rank branch; skip experts or leave slorb at 0"
            )
        for layer in self.layers:
            beside = self.method.scales or self.method.low_rank_block
            sharded = self.held[layer.parameter].layout.sharded
            if beside and sharded and not self._has_rows(layer):
                raise GossamerError(
                    f"{layer.parameter} is sharded otherwise than by outputs, which scales and "
                    "low-rank branches follow; set parts=0 or slorb=0, or replicate the model"
                )
        if self.method.keeps_dense:
            for path, one in self.held.items():
                if one.master is one.weight:
                    self._dense[path] = one.shown.clone()

    @torch.no_grad()
    def _take(self, removed: Mapping[str, Tensor]) -> None:
        self._make_room()
        for path, tensor in self._dense.items():
            tensor.copy_(self.held[path].layout.taken(removed[f"dense:{path}"]))
        for layer in self.layers:
            prefix = f"side:{layer.name}:"
            values = {k.removeprefix(prefix): v for k, v in removed.items() if k.startswith(prefix)}
            if values:
                one = self.held[layer.parameter]
                weight = layer.view(self._trained(one))
                side: Side
                if self.method.scales:
                    side = Scale(weight, self.method.scales)
                else:
                    side = LowRank(weight, self.method.low_rank_block)
                side.load(side.each_row(values, one.layout.taken))
                self._sides[layer.name] = side

    def _trained(self, one: Held) -> Tensor:
        """The dense weights of a parameter."""
        return self._dense.get(one.path, one.trained)

    # -- one update -------------------------------------------------------------------------

    def _mask_gradient(self, one: Held) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            share = self.method.gradient_share(self.updates)
            if share == 1.0:
                return gradient
            return torch.where(one.mask, gradient, gradient * share)

        return hook

    def _mask_shard(self, one: Held) -> Any:
        def hook(parameter: Tensor) -> None:
            if self.method.gradient_share(self.updates) == 0.0:
                one.mask_gradient(parameter)

        return hook

    def _group(self, one: Held) -> dict[str, Any]:
        return next(
            group
            for group in self.optimizer.param_groups
            if any(parameter is one.master for parameter in group["params"])
        )

    @torch.no_grad()
    def _before_update(self, *_: Any) -> None:
        super()._before_update()
        for path, dense in self._dense.items():
            self.held[path].shown.copy_(dense)
        share = self.method.gradient_share(self.updates)
        # A fused optimizer divides gradients by the scaler's factor while it updates.
        scale = getattr(self.optimizer, "grad_scale", None)
        for one in self.held.values():
            gradient = one.gradient
            if gradient is not None and one.layout.sharded and 0.0 < share < 1.0:
                # Not where shards arise: several may be added up, and each adds to the sum before.
                gradient.copy_(torch.where(one.mask, gradient, gradient * share))
        for layer in self.layers:
            one = self.held[layer.parameter]
            side, gradient = self._sides.get(layer.name), one.gradient
            if side is None or gradient is None:
                continue
            found = side.gradients(layer.view(one.trained), layer.view(gradient))
            self._for_sides[layer.name] = {
                name: (value if name in side.by_row else one.layout.added(value))
                / (1.0 if scale is None else scale)
                for name, value in found.items()
            }
        for path, one in self.held.items():
            decay = self.method.decay(self.updates, float(self._group(one)["lr"]))
            if one.gradient is None or decay is None:
                continue
            if decay.into == "gradient":
                term = decay.term(one.trained, one.mask)
                one.gradient.add_(term if scale is None else term * scale)
            else:
                # The optimizer passes over a parameter without a gradient; its turn comes after.
                self._gradients[path] = one.master.grad  # type: ignore[assignment]
                one.master.grad = None

    @torch.no_grad()
    def _after_update(self, *_: Any) -> None:
        overflow = getattr(self.optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            self._for_sides.clear()
            self._gradients.clear()
            self._show()
            return
        scale = getattr(self.optimizer, "grad_scale", None)
        for path, gradient in self._gradients.items():
            one = self.held[path]
            group = self._group(one)
            decay = self.method.decay(self.updates, float(group["lr"]))
            state: dict[str, Any] = self.optimizer.state[one.master]
            if not state:
                start_adam(one.master.detach(), state, fused=bool(group.get("fused")))
            moments = {name: here(value) for name, value in state.items()}
            found = here(gradient) if scale is None else here(gradient) / scale
            adam_step(one.trained, found, moments, group, mask=one.mask, decay=decay)
            one.master.grad = gradient
        for name, gradients in self._for_sides.items():
            layer = next(layer for layer in self.layers if layer.name == name)
            self._sides[name].update(gradients, self._group(self.held[layer.parameter]))
        self._gradients.clear()
        self._for_sides.clear()
        for path, dense in self._dense.items():
            dense.copy_(self.held[path].shown)
        self._stepped = True

    @torch.no_grad()
    def step(self) -> bool:
        """Choose the masks where it is time, and let the network compute with masked weights.

        Returns
        -------
        Whether the masks were chosen anew.
        """
        if not self._stepped:
            return False
        self._stepped = False
        self._account()
        self.updates += 1
        again = self.method.refreshes(self.updates)
        if again:
            self._choose()
        self._show()
        return again

    def _account(self) -> None:
        sees = self.method.removed_share(self.updates) > 0.0
        kept = {layer.name: layer.size for layer in self.layers} if sees else self._kept
        learns = self.method.gradient_share(self.updates) > 0.0
        self.flops.count(kept, dense_gradient=learns)
        if self.teacher is not None:
            self.flops.total += self.flops.forward(self.flops.sizes)
        at = self.flops.positions or {}
        self.flops.total += sum(
            6.0 * self._sides[layer.name].size(layer.shape[0]) * at.get(layer.name, 1.0)
            for layer in self.layers
            if layer.name in self._sides
        )

    def _choose(self) -> None:
        """Masks of the largest dense weights."""
        self.quotas = self.method.quotas_at(self.layers, self.updates)
        near = tuple(layer for layer in self.layers if self._has_rows(layer))
        far = tuple(layer for layer in self.layers if layer not in near)
        masks, _ = arranged(far, self.held, self._found(far))
        for layer in near:
            # Groups lie along inputs, so no row needs what another process holds.
            quota, one = self.quotas[layer.name], self.held[layer.parameter]
            score = self._trained(one).abs().float()
            mask = quota.pattern.select(score, quota.budget).mask() if len(score) else one.mask
            masks[layer.parameter] = mask
        for path, mask in same_everywhere(masks, self.held).items():
            self.held[path].mask.copy_(mask)
        self._count()

    def _has_rows(self, layer: Layer) -> bool:
        """Whether the layer is sharded, and what is here of it are whole rows (., I)."""
        layout = self.held[layer.parameter].layout
        return layout.sharded and layout.rows and not layer.transposed and layer.expert is None

    def _found(self, layers: tuple[Layer, ...]) -> Iterator[tuple[Layer, Tensor, Quota]]:
        """Layers with their masks (O, I)."""

        def local(layer: Layer) -> Tensor:
            value = self._trained(self.held[layer.parameter])
            return (value if self.held[layer.parameter].layout.sharded else layer.view(value)).abs()

        for layer, score in whole_layers(layers, self.held, local):
            quota = self.quotas[layer.name]
            score = score.float().contiguous()
            yield layer, quota.pattern.select(score, quota.budget).mask(), quota

    def _show(self, *, final: bool = False) -> None:
        """Put what the network computes with into the parameters."""
        share = 0.0 if final else self.method.removed_share(self.updates)
        if share == 1.0 and not self._sides:
            for one in self.held.values():
                if one.master is not one.weight:
                    one.shown.copy_(one.trained)
            return
        for one in self.held.values():
            dense = self._trained(one)
            if share == 1.0:
                one.shown.copy_(dense)
            elif share == 0.0:
                one.shown.copy_(dense).mul_(one.wide(one.shown.dtype))
            else:
                one.shown.copy_(torch.where(one.mask, dense, dense * share))
        for layer in self.layers:
            side = self._sides.get(layer.name)
            if side is None or (final and isinstance(side, LowRank)):
                continue
            weight = layer.view(self.held[layer.parameter].shown)
            weight.copy_(side.shown(weight))

    # -- reading, stopping, going on --------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes held beside the model and the optimizer, by purpose."""
        teacher = map(here, self.teacher.parameters()) if self.teacher is not None else ()
        return {
            **super().memory(),
            "dense weights that train": size_of(self._dense.values()),
            "scales and branches with their moments": sum(
                3 * size_of(side.tensors.values()) for side in self._sides.values()
            ),
            "teacher": size_of(teacher),
        }

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on exactly: plain values and tensors."""
        state = super().state_dict()
        state["removed"] = {
            f"dense:{path}": self.held[path].layout.wrap(value.clone())
            for path, value in self._dense.items()
        }
        for layer in self.layers:
            if (side := self._sides.get(layer.name)) is None:
                continue
            values = side.each_row(side.to_dict(), self.held[layer.parameter].layout.wrap)
            state["removed"] |= {f"side:{layer.name}:{part}": v for part, v in values.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; see :meth:`Sparsifier.load_state_dict`."""
        super().load_state_dict(state)
        with torch.no_grad():
            self._show()

    @torch.no_grad()
    def finish(self) -> SparselyTrained:
        """End the training: what is removed is zero from now on, scales are in the weights.

        Returns
        -------
        What reports, saves, and (attached with ``undo``) restores.
        """
        if self._stepped:
            self.step()
        self._left = self.left_over()
        if self.method.removed_share(self.updates) == 1.0 and self._left > 0.01:
            self.warnings.append(
                f"removed weights were still {self._left:.1%} of the size of kept ones when they "
                "were pruned; raise pull, lr or steps"
            )
        self._show(final=True)
        for one in self.held.values():
            if one.master is not one.weight:
                one.trained.copy_(one.shown)
        work = super().finish()
        self._dense.clear()
        branches = {
            layer.name: Branch(
                layer.parameter.rpartition(".")[0],
                **side.each_row(side.tensors, self.held[layer.parameter].layout.full),
            )
            for layer in self.layers
            if isinstance(side := self._sides.get(layer.name), LowRank)
        }
        assert isinstance(work, NMTrained)
        return work.beside(branches)

    def left_over(self) -> float:
        """Mean size of removed dense weights over that of kept ones."""
        return left_over(self.held, self._trained)

    def _remarks(self) -> tuple[str, ...]:
        return (
            f"before the last pruning, removed weights were {self._left:.2%} of the size of "
            "kept ones",
        )
