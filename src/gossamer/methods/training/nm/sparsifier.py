"""NMSparsifier: dense weights train while the network computes with N:M ones.

Between updates the model's parameters hold what the network computes with, so gradients arise
with respect to that: straight through the mask. For the length of an update they hold the dense
weights, which otherwise lie in a copy (or in the masters, where a loop trains those).
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.training.nm.adam import adam_step, check_adam
from gossamer.methods.training.nm.distillation import mixing
from gossamer.methods.training.nm.sides import LowRank, Scale, Side
from gossamer.methods.training.nm.trained import Branch, NMTrained
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.methods.training.sparsifier.layers import plain_module
from gossamer.methods.training.sparsifier.masks import Held, same_everywhere
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
        self.teacher: nn.Module | None = None
        if method.distilled_share:
            if teacher is None and state is not None:
                raise GossamerError(
                    f"going on with {method.key()} needs the dense model it began with; "
                    "attach with teacher=, or train with distill=0"
                )
            copied = deepcopy(plain_module(model)) if teacher is None else teacher
            self.teacher = copied.eval().requires_grad_(False)
        super().__init__(method, model, optimizer, state=state, **given)
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
            weight, mask = layer.view(one.master.detach()), layer.view(one.mask)
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
        if self.method.keeps_dense:
            for path, one in self.held.items():
                if one.master is one.weight:
                    self._dense[path] = one.weight.detach().clone()

    @torch.no_grad()
    def _take(self, removed: Mapping[str, Tensor]) -> None:
        self._make_room()
        for path, tensor in self._dense.items():
            tensor.copy_(removed[f"dense:{path}"])
        for layer in self.layers:
            prefix = f"side:{layer.name}:"
            values = {k.removeprefix(prefix): v for k, v in removed.items() if k.startswith(prefix)}
            if values:
                weight = layer.view(self._trained(self.held[layer.parameter]))
                side: Side
                if self.method.scales:
                    side = Scale(weight, self.method.scales)
                else:
                    side = LowRank(weight, self.method.low_rank_block)
                side.load(values)
                self._sides[layer.name] = side

    def _trained(self, one: Held) -> Tensor:
        """The dense weights of a parameter."""
        return self._dense.get(one.path, one.master.detach())

    # -- one update -------------------------------------------------------------------------

    def _mask_gradient(self, one: Held) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            share = self.method.gradient_share(self.updates)
            if share == 1.0:
                return gradient
            return torch.where(one.mask, gradient, gradient * share)

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
            self.held[path].weight.copy_(dense)
        for layer in self.layers:
            one = self.held[layer.parameter]
            side = self._sides.get(layer.name)
            if side is None or one.master.grad is None:
                continue
            weight = layer.view(one.master.detach())
            gradient = layer.view(one.master.grad)
            self._for_sides[layer.name] = side.gradients(weight, gradient)
        for path, one in self.held.items():
            gradient = one.master.grad
            decay = self.method.decay(self.updates, float(self._group(one)["lr"]))
            if gradient is None or decay is None:
                continue
            if decay.into == "gradient":
                gradient.add_(decay.term(one.master, one.mask))
            else:
                # The optimizer passes over a parameter without a gradient; its turn comes after.
                self._gradients[path] = gradient
                one.master.grad = None

    @torch.no_grad()
    def _after_update(self, *_: Any) -> None:
        overflow = getattr(self.optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            self._show()
            return
        for path, gradient in self._gradients.items():
            one = self.held[path]
            group = self._group(one)
            decay = self.method.decay(self.updates, float(group["lr"]))
            state: dict[str, Any] = self.optimizer.state[one.master]
            adam_step(one.master, gradient, state, group, mask=one.mask, decay=decay)
            one.master.grad = gradient
        for name, gradients in self._for_sides.items():
            layer = next(layer for layer in self.layers if layer.name == name)
            self._sides[name].update(gradients, self._group(self.held[layer.parameter]))
        self._gradients.clear()
        self._for_sides.clear()
        for path, dense in self._dense.items():
            dense.copy_(self.held[path].weight)
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
            6.0 * side.size * at.get(name, 1.0) for name, side in self._sides.items()
        )

    def _choose(self) -> None:
        """Masks of the largest dense weights."""
        self.quotas = self.method.quotas_at(self.layers, self.updates)
        masks = {path: torch.ones_like(one.mask) for path, one in self.held.items()}
        for layer in self.layers:
            quota = self.quotas[layer.name]
            score = layer.view(self._trained(self.held[layer.parameter])).abs().float()
            mask = quota.pattern.select(score.contiguous(), quota.budget).mask()
            layer.view(masks[layer.parameter]).copy_(mask)
        for path, mask in same_everywhere(masks).items():
            self.held[path].mask.copy_(mask)
        self._count()

    def _show(self, *, final: bool = False) -> None:
        """Put what the network computes with into the parameters."""
        share = 0.0 if final else self.method.removed_share(self.updates)
        if share == 1.0 and not self._sides:
            for one in self.held.values():
                if one.master is not one.weight:
                    one.weight.copy_(one.master)
            return
        for one in self.held.values():
            dense = self._trained(one)
            one.weight.copy_(torch.where(one.mask, dense, dense * share))
        for layer in self.layers:
            side = self._sides.get(layer.name)
            if side is None or (final and isinstance(side, LowRank)):
                continue
            weight = layer.view(self.held[layer.parameter].weight.detach())
            weight.copy_(side.shown(weight))

    # -- reading, stopping, going on --------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes held beside the model and the optimizer, by purpose."""
        teacher = self.teacher.parameters() if self.teacher is not None else ()
        return {
            **super().memory(),
            "dense weights that train": _bytes(self._dense.values()),
            "scales and branches with their moments": sum(
                3 * _bytes(side.tensors.values()) for side in self._sides.values()
            ),
            "teacher": _bytes(teacher),
        }

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on exactly: plain values and tensors."""
        state = super().state_dict()
        state["removed"] = {f"dense:{path}": value.clone() for path, value in self._dense.items()}
        for name, side in self._sides.items():
            values = side.to_dict().items()
            state["removed"] |= {f"side:{name}:{part}": value for part, value in values}
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
                one.master.copy_(one.weight)
        work = super().finish()
        self._dense.clear()
        branches = {
            layer.name: Branch(layer.parameter.rpartition(".")[0], **side.tensors)
            for layer in self.layers
            if isinstance(side := self._sides.get(layer.name), LowRank)
        }
        assert isinstance(work, NMTrained)
        return work.beside(branches)

    def left_over(self) -> float:
        """Mean size of removed dense weights over that of kept ones."""
        sums = [0.0, 0.0]
        counts = [0, 0]
        for layer in self.layers:
            one = self.held[layer.parameter]
            size = layer.view(self._trained(one)).abs().double()
            mask = layer.view(one.mask)
            for kept in (0, 1):
                part = mask if kept else ~mask
                sums[kept] += float((size * part).sum())
                counts[kept] += int(part.count_nonzero())
        if not counts[0] or not sums[1]:
            return 0.0
        return (sums[0] / counts[0]) / (sums[1] / counts[1])

    def _remarks(self) -> tuple[str, ...]:
        return (
            f"before the last pruning, removed weights were {self._left:.2%} of the size of "
            "kept ones",
        )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
