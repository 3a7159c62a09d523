"""Replaced: a model in which other modules stand in the place of some matrices.

The matrices' own modules are kept aside, so undoing puts back the very objects. Saved folders hold
the matrix that each module amounts to under the model's own names, and the modules' parameters
beside them.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gossamer.core import GossamerError, Method, Site
from gossamer.methods.weights.pruned import PrunedModel
from gossamer.models import Applied, Report, SiteRow, State, at_work

__all__ = ["Replaced", "Width", "dense_of", "held_tensors", "refuse_taken"]


@dataclass(frozen=True)
class Width:
    """A number of the model's configuration that a method changed.

    Parameters
    ----------
    config : the configuration object. name : of the attribute. old, new : its values.
    """

    config: Any
    name: str
    old: Any
    new: Any


def dense_of(model: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """A site's (out, in) weight and its bias, both detached."""
    bias = getattr(site.owner(model), "bias", None)
    return site.weight(model), None if bias is None else bias.detach()


def refuse_taken(model: nn.Module, sites: tuple[Site, ...], key: str) -> None:
    """Refuse to replace matrices that another method holds: its zeros or hooks would be lost.

    Raises
    ------
    GossamerError
        Naming the method or the matrix.
    """
    names = {site.name for site in sites}
    for work in at_work(model):
        if isinstance(work, PrunedModel) and names & set(work.sites):
            raise GossamerError(
                f"{work.method.key()} pruned the matrices that {key} would replace; "
                f"apply {key} first, or restore the pruning"
            )
    for site in sites:
        owner = site.owner(model)
        if owner._forward_hooks or owner._forward_pre_hooks:
            raise GossamerError(
                f"{site.module} has a hook that a replacement would lose; "
                f"apply {key} before methods that watch activations"
            )


class Replaced(Applied):
    """New modules at work in a model.

    Parameters
    ----------
    width : what was changed in the configuration, if anything.
    simulated : the new modules' arithmetic runs over what they removed.

    Attributes
    ----------
    modules : site name to the new module. notes, warnings : for the report.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        *,
        simulated: bool,
        width: Width | None = None,
    ) -> None:
        super().__init__(method, model)
        self.simulated = simulated
        self.undo = True
        self.width = width
        self.sites: dict[str, Site] = {}
        self.modules: dict[str, nn.Module] = {}
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.meta: dict[str, Any] = {}
        self._old: dict[str, nn.Module] = {}
        if width is not None:
            setattr(width.config, width.name, width.new)
        self._join()

    def put(self, site: Site, module: nn.Module) -> None:
        """Put a module in a site's place, in the mode and with the trainability of the old."""
        old = site.owner(self.model)
        module.train(old.training)
        wanted = old.get_parameter(site.parameter).requires_grad
        for parameter in module.parameters():
            parameter.requires_grad_(wanted)
        self._old[site.name] = old
        self.sites[site.name] = site
        self.modules[site.name] = module
        self.model.set_submodule(site.module, module)

    def drop_undo(self) -> None:
        """Free the old modules' memory; ``restore`` is then refused, ``densify`` still works."""
        self.undo = False
        for name, old in self._old.items():
            # What is left says how the matrix was stored.
            self._old[name] = old.to("meta")

    def _undo(self) -> None:
        if not self.undo:
            raise GossamerError("replaced without undo: load the model again to have it dense")
        for name, module in self.modules.items():
            if self.model.get_submodule(self.sites[name].module) is not module:
                raise GossamerError(f"{name} was replaced again later; restore that first")
            if module._forward_hooks or module._forward_pre_hooks:
                raise GossamerError(
                    f"{name} has a hook of a method applied later; restore that first"
                )
        for name, old in self._old.items():
            self.model.set_submodule(self.sites[name].module, old)
        if self.width is not None:
            setattr(self.width.config, self.width.name, self.width.old)

    def forget(self) -> None:
        """Leave the new modules in the model and stop counting as at work on it."""
        self._leave()

    def densify(self) -> nn.Module:
        """Multiply every module out into a dense layer like the old one and stop being at work.

        The model computes the same function (up to rounding), all its matrices are dense and
        trainable: reverse sparsification goes on training from here.

        Raises
        ------
        GossamerError
            If a module has no dense form of the old shape.
        """
        made = {name: self._plain_of(name) for name in self.modules}
        for name, (weight, bias) in made.items():
            site, module = self.sites[name], self.modules[name]
            old = self._old[name]
            parameter = old.get_parameter(site.parameter)
            if tuple(weight.shape) != tuple(parameter.shape):
                raise GossamerError(f"{name} became wider, so it has no form like the old one")
            shell = _shell(old)
            wanted = next(module.parameters()).requires_grad
            shell.weight = nn.Parameter(weight, requires_grad=wanted)
            if bias is not None:
                shell.bias = nn.Parameter(bias, requires_grad=wanted)
            shell.train(module.training)
            self.model.set_submodule(site.module, shell)
        self._leave()
        return self.model

    def _plain_of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight as the architecture stores it, and bias, of what a module amounts to."""
        site, module = self.sites[name], self.modules[name]
        dense: Callable[[], Tensor] = module.dense  # type: ignore[assignment]
        weight = dense().detach()
        bias = getattr(module, "bias", None)
        return (
            (weight.T if site.transposed else weight).contiguous(),
            None if bias is None else bias.detach(),
        )

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        heads = {self.sites[name].module: name for name in self.modules}
        made: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            head = key.rpartition(".")[0]
            if head not in heads:
                made[key] = tensor
            elif f"{head}.weight" not in made:
                weight, bias = self._plain_of(heads[head])
                made[f"{head}.weight"] = weight
                if bias is not None:
                    made[f"{head}.bias"] = bias
        return made

    def state(self) -> State:
        tensors = {
            f"{name}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
        }
        meta = {"sites": list(self.modules), "notes": self.notes, "warnings": self.warnings}
        return State({**self.meta, **meta}, tensors)

    def rows(self) -> tuple[SiteRow, ...]:
        """One row per site: the module's ``size`` and ``sparsity``."""
        return tuple(
            SiteRow(name, site.role, site.block, *_amount(self.modules[name], site))
            for name, site in self.sites.items()
        )

    def report(self) -> Report:
        rows = self.rows()
        held = sum(p.numel() for p in self.model.parameters())
        return Report(
            self.method.to_dict(),
            rows,
            "weights",
            held + self.gone(),
            self.simulated,
            tuple(self.notes),
            tuple(self.warnings),
        )

    def gone(self) -> int:
        """Parameters that the model had before and has no more; 0 where zeros are still held."""
        if self.simulated:
            return 0
        return sum(
            site.size
            - sum(p.numel() for n, p in self.modules[name].named_parameters() if n != "bias")
            for name, site in self.sites.items()
        )


def _amount(module: Any, site: Site) -> tuple[int, float]:
    """What a row's sparsity is a share of, and the sparsity."""
    size = getattr(module, "sparse_size", None)
    return (site.size, module.shape.sparsity) if size is None else (size, module.sparsity)


def _shell(module: nn.Module) -> Any:
    """The same module with a list of parameters of its own, so that they can be exchanged."""
    made = copy(module)
    made._parameters = dict(module._parameters)
    return made


def held_tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors a state holds for one site."""
    head = f"{name}."
    return {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
