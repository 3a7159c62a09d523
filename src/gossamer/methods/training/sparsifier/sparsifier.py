"""Sparsifier: a sparse training at work on a model and its optimizer.

Between two updates it only masks gradients. After every update it sets removed weights and their
optimizer state to zero, and at the updates its method names it changes the masks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Unstructured, pack_bits, unknown
from gossamer.core.saved import taking
from gossamer.methods.training.sparsifier import schedule
from gossamer.methods.training.sparsifier.change import Change, StartLoss
from gossamer.methods.training.sparsifier.claim import Claim
from gossamer.methods.training.sparsifier.decide import exchange, first_masks, prune_to
from gossamer.methods.training.sparsifier.flops import TrainingFlops
from gossamer.methods.training.sparsifier.layers import Layer, Quota, other_weights, plain_module
from gossamer.methods.training.sparsifier.layout import here, reshard, shards_itself, size_of
from gossamer.methods.training.sparsifier.masks import (
    Held,
    check_optimizer,
    hold,
    kept_counts,
    masked,
    plain_optimizer,
    same_everywhere,
    whole_masks,
)
from gossamer.methods.training.sparsifier.saving import check_state, common_state, masks_of
from gossamer.methods.training.sparsifier.trained import SparselyTrained

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["Sparsifier"]


class Sparsifier:
    """Keeps a model sparse while any loop trains it: call :meth:`step` after every update.

    Made by ``Method(...).attach(model, optimizer)``. Where a gradient scaler leaves an update out,
    :meth:`step` does nothing. All processes of a distributed training hold the same masks; where
    parameters are sharded, each holds its part, and what reads whole masks is collective.

    Attributes
    ----------
    method : with all parameters. model : the bare model. updates : done so far.
    layers : what is kept sparse. flops : operations of the training so far.
    """

    result: ClassVar[type[SparselyTrained]] = SparselyTrained
    own_state: ClassVar[Mapping[str, type]] = {}
    """What a state holds beside what all hold, and of what type."""

    def __init__(
        self,
        method: "SparseTraining",
        model: nn.Module,
        optimizer: Any,
        *,
        before: Mapping[str, Tensor] | None = None,
        masters: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        loss: StartLoss | None = None,
    ) -> None:
        self.method = method
        self.model = plain_module(model)
        reshard(self.model)
        if not method.takes_shards and shards_itself(self.model):
            raise GossamerError(
                f"{method.key()} reads and writes whole weights, and these are sharded; replicate "
                "the model with DistributedDataParallel"
            )
        self.optimizer = plain_optimizer(optimizer)
        self.layers: tuple[Layer, ...] = method.layers_of(self.model)
        self.updates = 0
        self.warnings: list[str] = []
        self.held = self._hold({} if masters is None else masters)
        check_optimizer(self.optimizer, self.held)
        self.quotas = method.quotas(self.layers, method.initial_sparsity)
        others = other_weights(self.model, [one.weight for one in self.held.values()])
        sizes = {layer.name: layer.size for layer in self.layers}
        self.flops = TrainingFlops(sizes, others=float(others))
        self._kept = sizes
        self._removed: dict[str, Tensor] = {}
        self._before = before
        self._signal: dict[str, Tensor] = {}
        self._stepped = False
        if method.remembers_removed:
            self._removed = {path: torch.zeros_like(one.trained) for path, one in self.held.items()}
        self._handles: list[Any] = [Claim(self.model, self.optimizer, method.key())]
        try:
            if state is None:
                self._begin(loss)
            else:
                self.load_state_dict(state)
            self.warnings += schedule.warnings(self.method)
            self._change = method.change(self.updates + 1)
            self._watch()
        except BaseException:
            self.remove()
            raise

    # -- making -----------------------------------------------------------------------------

    def _hold(self, masters: Mapping[str, Tensor]) -> dict[str, Held]:
        return hold(self.model, self.layers, masters)

    @property
    def sharded(self) -> bool:
        """Whether parameters lie in shards over processes."""
        return any(one.layout.sharded for one in self.held.values())

    def _begin(self, loss: StartLoss | None) -> None:
        scores = self.method.start_scores(self.model, self.layers, loss)
        masks, self.quotas = first_masks(self.method, self.layers, self.quotas, self.held, scores)
        self._note_floors()
        self._set(masks)

    def _watch(self) -> None:
        """Hooks on gradients and on the optimizer's step; undone by :meth:`remove`."""
        for one in self.held.values():
            if one.layout.sharded:
                # Gradients reach shards by reduction, which no other hook sees.
                hook = one.weight.register_post_accumulate_grad_hook(self._mask_shard(one))
            else:
                hook = one.weight.register_hook(self._mask_gradient(one))
            self._handles.append(hook)
        self._handles.append(self.optimizer.register_step_pre_hook(self._before_update))
        self._handles.append(self.optimizer.register_step_post_hook(self._after_update))

    def _note_floors(self) -> None:
        for name, quota in self.quotas.items():
            if quota.floored:
                text = f"{name} would be emptied; it keeps {quota.keep} of each group"
                if text not in self.warnings:
                    self.warnings.append(text)

    # -- one update -------------------------------------------------------------------------

    @property
    def needs_dense_gradient(self) -> bool:
        """Whether the coming update needs the gradients of removed weights as well."""
        return self._change is not None and self._change.dense_gradient

    def _mask_gradient(self, one: Held) -> Any:
        # Masked where they arise, so that accumulation, reduction over processes and clipping
        # see the gradient of a sparse network.
        def hook(gradient: Tensor) -> Tensor:
            return gradient if self.needs_dense_gradient else masked(gradient, one.mask)

        return hook

    def _mask_shard(self, one: Held) -> Any:
        def hook(parameter: Tensor) -> None:
            if not self.needs_dense_gradient:
                one.mask_gradient(parameter)

        return hook

    def _before_update(self, *_: Any) -> None:
        if self._stepped:
            raise GossamerError(
                "the optimizer stepped twice; call sparsifier.step() after every optimizer.step()"
            )
        if not self.needs_dense_gradient:
            return
        assert self._change is not None
        for path, one in self.held.items():
            if (gradient := one.gradient) is None:
                raise GossamerError(
                    f"{path} has no gradient at update {self.updates + 1}, where masks grow by "
                    "gradient; run backward before optimizer.step(), or skip the layer"
                )
            self._signal[path] = gradient.detach().abs()
            gradient.mul_(one.mask)
        if self._change.instead:
            # An optimizer passes over parameters without a gradient.
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _after_update(self, *_: Any) -> None:
        # A fused optimizer under a gradient scaler finds out by itself that gradients overflowed.
        overflow = getattr(self.optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            self._signal.clear()
            return
        self._stepped = True

    @torch.no_grad()
    def step(self) -> bool:
        """Hold the masks after an update of the optimizer, and change them where it is time.

        Returns
        -------
        Whether the masks were changed.
        """
        if not self._stepped:
            return False
        self._stepped = False
        self.updates += 1
        self.flops.count(self._kept, dense_gradient=self.needs_dense_gradient)
        change = self._change
        if change is not None:
            try:
                self._carry_out(change)
            finally:
                self._signal.clear()
        for one in self.held.values():
            one.enforce(self.optimizer)
        self._change = self.method.change(self.updates + 1)
        return change is not None

    def _carry_out(self, change: Change) -> None:
        if change.sparsity is not None:
            masks, self.quotas = prune_to(
                self.method, self.layers, self.held, self._removed, change.sparsity
            )
            self._note_floors()
            self._set(masks)
        if change.exchange > 0.0:
            masks, values = exchange(
                self.layers, self.held, self.quotas, self._signal, change, self._seed
            )
            self._set(masks, renew=values)

    @property
    def _seed(self) -> str:
        return f"{self.method.seed}:{self.updates}"

    @torch.no_grad()
    def _set(
        self,
        masks: Mapping[str, Tensor],
        renew: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,
    ) -> None:
        """Put new masks to work: removed values go, returning ones come back, grown ones start.

        Parameters
        ----------
        renew : parameter to (where weights grew, their values or None for zeros).
        """
        for path, mask in same_everywhere(masks, self.held).items():
            one = self.held[path]
            gone, back = one.mask & ~mask, mask & ~one.mask
            if path in self._removed:
                self._removed[path].add_(one.trained * gone)
            one.mask.copy_(mask)
            one.clear(self.optimizer, gone)
            if path in self._removed and renew is None:
                for tensor in one.values:
                    tensor.add_(self._removed[path] * back)
                self._removed[path].masked_fill_(back, 0)
            if renew is not None:
                grown, values = renew[path]
                one.clear(self.optimizer, grown & mask)
                if values is not None:
                    for tensor in one.values:
                        tensor.add_((values * (grown & mask)).to(tensor))
        self._count()

    # -- reading ----------------------------------------------------------------------------

    def mask(self, name: str) -> Tensor:
        """The mask of a layer, (O, I); True where kept. Collective where it is sharded."""
        known = {layer.name: layer for layer in self.layers}
        if name not in known:
            raise unknown("layer", name, list(known))
        one = self.held[known[name].parameter]
        return known[name].view(one.layout.full(one.mask))

    def kept(self) -> dict[str, int]:
        """Number of kept weights of every layer."""
        return dict(self._kept)

    def _count(self) -> None:
        self._kept = kept_counts(self.layers, self.held)
        if self.method.pattern == Unstructured("model"):
            # Where layers compete, what one of them keeps follows from its mask alone.
            layers = self._kept.items()
            self.quotas = {name: Quota(Unstructured("layer"), kept) for name, kept in layers}

    @property
    def sparsity(self) -> float:
        """Share removed over all layers."""
        return 1.0 - sum(self.kept().values()) / sum(layer.size for layer in self.layers)

    def memory(self) -> dict[str, int]:
        """Bytes held beside the model and the optimizer, by purpose."""
        held = self.held.values()
        signal = any(
            change is not None and change.dense_gradient
            for change in map(self.method.change, range(1, self.method.steps + 1))
        )
        whole = max(one.weight.numel() for one in held) if self.sharded else 0
        return {
            "masks": size_of(one.mask for one in held),
            "a mask while it is applied": max(size_of([one.shown]) for one in held),
            "gradients while masks grow": signal * size_of(one.trained for one in held),
            # Weights and gradients in float32 and two masks, of one parameter.
            "the largest parameter while masks are decided": whole * (4 + 4 * signal + 2),
            "removed values": size_of(self._removed.values()),
            "dense weights, to undo": size_of(map(here, (self._before or {}).values())),
        }

    # -- stopping and going on --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on exactly: plain values and tensors."""
        if self._stepped:
            raise GossamerError("call sparsifier.step() before saving its state")
        state = common_state(self.method, self.updates, self.flops.to_dict(), self.held)
        removed = {p: self.held[p].layout.wrap(v.clone()) for p, v in self._removed.items()}
        return {**state, "removed": removed}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Load the model and the optimizer first, and
        attach before loading the model, or attach with ``state=``: attaching removes weights.

        Raises
        ------
        GossamerError
            If the state is of another method, model or number of processes.
        """
        check_state(state, self.method, self.held, self.own_state)
        check_optimizer(self.optimizer, self.held)
        with taking():
            for path, mask in masks_of(state, self.held):
                self.held[path].mask.copy_(mask)
            self._take(state["removed"])
            self.updates = int(state["updates"])
            self.flops.load(state["flops"])
        self.quotas = self.method.quotas(self.layers, self.method.sparsity_at(self.updates))
        self._count()
        self._change = self.method.change(self.updates + 1)
        self._signal.clear()
        self._stepped = False

    def _take(self, removed: Mapping[str, Tensor]) -> None:
        for path, values in self._removed.items():
            values.copy_(self.held[path].layout.taken(removed[path]))
        for one in self.held.values():
            one.enforce(self.optimizer)

    def _remarks(self) -> tuple[str, ...]:
        return ()

    def remove(self) -> None:
        """Take all hooks off; the weights stay as they are."""
        while self._handles:
            self._handles.pop().remove()

    def finish(self) -> SparselyTrained:
        """End the training: hooks go, the sparse model stays.

        Returns
        -------
        What reports, saves, and (attached with ``undo``) restores.
        """
        if self._stepped:
            self.step()
        memory = self.memory()
        self.remove()
        for one in self.held.values():
            one.enforce(self.optimizer)
        warnings = list(self.warnings)
        if self.updates < self.method.steps:
            warnings.append(
                f"training ended at update {self.updates} of {self.method.steps}: "
                f"the schedule is at a sparsity of {self.sparsity:.4f}"
            )
        masks = {name: pack_bits(mask).cpu() for name, mask in whole_masks(self.layers, self.held)}
        notes = (
            f"training took {self.flops.share:.1%} of the operations of a dense one of "
            f"{self.flops.updates} updates ({self.flops.dense_gradients} with all gradients)",
            "memory beside model and optimizer: "
            + ", ".join(f"{name} {size:,} bytes" for name, size in memory.items() if size),
            *schedule.notes(self.method),
            *self._remarks(),
        )
        return self.result(
            self.method,
            self.model,
            self.layers,
            masks,
            before=self._before,
            notes=notes,
            warnings=tuple(warnings),
            flops=self.flops,
        )
