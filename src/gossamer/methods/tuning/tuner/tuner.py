"""Tuner: a fine-tuning at work on a model, whose own weights stay frozen.

It freezes the model, puts an adapter beside every chosen matrix, and gives an optimizer what
trains. After every update it lets the adapters choose anew what depends on their parameters.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Site, unknown
from gossamer.core.saved import check_parts, taking
from gossamer.methods.tuning.tuner.adapter import (
    Adapter,
    displace,
    load_tensors,
    place,
    tensors_of,
)
from gossamer.methods.tuning.tuner.tuned import Tuned
from gossamer.models import at_work
from gossamer.models.applied import ACCELERATED

if TYPE_CHECKING:
    from gossamer.methods.tuning.base import Tuning

__all__ = ["Tuner"]

_PARTS: dict[str, type] = {"method": Mapping, "updates": int, "tensors": Mapping}


class Tuner:
    """Trains few parameters in any loop: call :meth:`step` after every update.

    Made by ``Method(...).attach(model)``, before the optimizer and before anything wraps the model:
    both must see the new parameters.

    Attributes
    ----------
    method : with all parameters. model : the bare model. updates : done so far.
    adapters : by site name. sites : the matrices they stand beside.
    """

    def __init__(
        self,
        method: "Tuning",
        model: nn.Module,
        *,
        undo: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        _refuse(model, method.key())
        self.method = method
        self.model = model
        self.updates = 0
        self.undo = undo
        self.sites: dict[str, Site] = {site.name: site for site in method.sites(model)}
        self.head = _head(model, tuple(method.head))
        self.own = sum(p.numel() for p in model.parameters())
        self.adapters: dict[str, Adapter] = {}
        self._wanted = [(p, p.requires_grad) for p in model.parameters()]
        self._head_before = {n: p.detach().clone() for n, p in self.head.items()} if undo else {}
        try:
            generator = torch.Generator().manual_seed(method.seed)
            for name, site in self.sites.items():
                adapter = method.adapter(site, site.weight(model), generator)
                place(model, site, adapter)
                self.adapters[name] = adapter
            trains = {id(p) for p in self.head.values()}
            for parameter, _ in self._wanted:
                parameter.requires_grad_(id(parameter) in trains)
            if state is not None:
                self.load_state_dict(state)
        except BaseException:
            self.remove()
            raise

    # -- training ---------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """All that trains, for the optimizer: the adapters' parameters, then the head's."""
        beside = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        return [*beside, *self.head.values()]

    @property
    def trainable(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def step(self) -> bool:
        """Count an update of the optimizer, and choose masks anew where it is time.

        Returns
        -------
        Whether anything was chosen anew.
        """
        self.updates += 1
        changed = [
            self.method.refresh(self.adapters[name], site.weight(self.model), self.updates)
            for name, site in self.sites.items()
        ]
        return any(changed)

    @property
    def sparsity(self) -> float:
        """Share removed over all tuned matrices, as of now."""
        kept = sum(self.kept(name) for name in self.sites)
        return 1.0 - kept / sum(site.size for site in self.sites.values())

    def kept(self, name: str) -> int:
        """Number of weights of a site that are in use."""
        selection = self.adapters[name].selection
        return self.sites[name].size if selection is None else selection.kept

    # -- reading, stopping, going on --------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes held beside the model and the optimizer, by purpose."""
        buffers = [b for adapter in self.adapters.values() for b in adapter.buffers()]
        beside = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        return {
            "trained parameters": _bytes(beside),
            "masks": _bytes(buffers),
            "head before, to undo": _bytes(self._head_before.values()),
        }

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs beside the frozen model: plain values and tensors."""
        tensors = {
            f"{name}:{key}": value
            for name, adapter in self.adapters.items()
            for key, value in tensors_of(adapter).items()
        }
        tensors |= {f"head:{name}": p.detach().clone() for name, p in self.head.items()}
        return {"method": self.method.to_dict(), "updates": self.updates, "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises
        ------
        GossamerError
            If the state is of another method, other parameters or another model.
        """
        check_parts(state, {"method": Mapping}, "a tuning", "tuner")
        # Files have no tuples.
        with taking("tuner"):
            own, given = (
                json.loads(json.dumps(d)) for d in (self.method.to_dict(), state["method"])
            )
            if given != own:
                wrong = [k for k, v in own.items() if given.get(k) != v]
                raise GossamerError(
                    f"the state is of another tuning ({', '.join(wrong) or 'more parameters'} "
                    "differs); attach the method with the parameters it was saved with"
                )
            check_parts(state, _PARTS, "a tuning", "tuner")
            if state["updates"] < 0:
                raise GossamerError(
                    f"the state is of update {state['updates']}; pass what tuner.state_dict() gave"
                )
            parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.sites}
            parts["head"] = {}
            for key, value in state["tensors"].items():
                name, _, part = key.partition(":")
                if name not in parts:
                    raise GossamerError(f"the state names {name}, which this model does not have")
                parts[name][part] = value
            head = parts.pop("head")
            if set(head) != set(self.head):
                odd = ", ".join(sorted(set(head) ^ set(self.head))[:3])
                raise GossamerError(f"the state does not fit the model's head: {odd}")
            for name, tensors in parts.items():
                load_tensors(self.adapters[name], tensors, name)
            for name, parameter in self.head.items():
                parameter.copy_(head[name])
        self.updates = int(state["updates"])

    # -- ending -----------------------------------------------------------------------------

    def head_before(self) -> list[tuple[Tensor, Tensor]]:
        """The head's parameters and what they held when attached with ``undo``."""
        return [(self.head[name], value) for name, value in self._head_before.items()]

    @torch.no_grad()
    def cancel(self) -> None:
        """Take the adapters away and put the head back, as if nothing had trained."""
        self.remove()
        for parameter, value in self.head_before():
            parameter.copy_(value)

    def remove(self) -> None:
        """Take the adapters away; the frozen weights are as they always were."""
        for site in self.sites.values():
            if getattr(site.owner(self.model), "tuning", None) is self.adapters.get(site.name):
                displace(self.model, site)
        for parameter, wanted in self._wanted:
            parameter.requires_grad_(wanted)

    @torch.no_grad()
    def fold(self) -> None:
        """Write what the adapters and the frozen matrices amount to into the model, for good."""
        for name, site in self.sites.items():
            site.write(self.model, self.adapters[name].folded(site.weight(self.model)))
        self.remove()

    def finish(self, *, fold: bool = True) -> Tuned:
        """End the training.

        Parameters
        ----------
        fold : write the result into the model's own weights and take the adapters away; otherwise
            they stay, so that training can go on and weights can be folded later.

        Returns
        -------
        What reports, saves, and (attached with ``undo``) restores.
        """
        work = Tuned(self.method, self.model, tuner=self, undo=self.undo)
        if fold:
            work.fold()
        return work


def _refuse(model: nn.Module, key: str) -> None:
    if not isinstance(model, nn.Module):
        raise GossamerError(
            f"the model is {model!r}, a {type(model).__name__}; give a transformers model, such as "
            "load_model(folder).model"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise GossamerError(
            f"the model is inside DistributedDataParallel, which would miss what {key} adds; "
            "attach to the bare model, then wrap it"
        )
    if ACCELERATED in vars(model):
        raise GossamerError("the model is accelerated; restore that before tuning it")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise GossamerError(
                f"{name} is sharded over processes (FSDP), so its masks cannot be chosen; "
                "replicate the model with DistributedDataParallel"
            )
    for work in at_work(model):
        # Folding would fill the zeros of what was pruned before.
        if work.rewrites or work.report().unit == "weights":
            raise GossamerError(
                f"{work.method.key()} holds weights that {key} would write over; restore it "
                "first, or save the model and load it without its methods"
            )


def _head(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters of the modules of these names, by their path."""
    found: dict[str, nn.Parameter] = {}
    for name in names:
        inside = {
            f"{path}.{key}": parameter
            for path, module in model.named_modules()
            if name in (path, path.rpartition(".")[2])
            for key, parameter in module.named_parameters()
        }
        if not inside:
            paths = [
                p for p, m in model.named_modules() if p and next(m.parameters(), None) is not None
            ]
            raise unknown("head", name, paths)
        found |= inside
    chosen = {id(parameter) for parameter in found.values()}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in chosen and path not in found:
            raise GossamerError(
                f"head {', '.join(names)} shares a weight with {path}, which stays frozen; "
                "leave it out"
            )
    return found


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
