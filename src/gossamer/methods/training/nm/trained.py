"""A model that was trained behind an N:M mask, with what stays beside its sparse weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.methods.training.sparsifier.trained import SparselyTrained, reattached
from gossamer.models import State

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["Branch", "NMTrained"]


@dataclass(frozen=True)
class Branch:
    """A low-rank branch beside a layer: adds S (P x) to its output.

    Parameters
    ----------
    module : path of the layer's module. spread : S, (O, I / k). project : P, (I / k, I).
    """

    module: str
    spread: Tensor
    project: Tensor

    def watch(self, model: nn.Module) -> Any:
        """Put it beside its layer, by a hook."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            project, spread = self.project.to(output), self.spread.to(output)
            return output + linear(linear(args[0].to(output), project), spread)

        return model.get_submodule(self.module).register_forward_hook(hook)


class NMTrained(SparselyTrained):
    """A :class:`SparselyTrained` that may keep low-rank branches; they are no part of the N:M
    weights, and run as hooks until :meth:`restore`.

    Attributes
    ----------
    branches : by layer; empty for most.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        self.branches: dict[str, Branch] = {}
        self._handles: list[Any] = []
        super().__init__(*args, **given)

    def beside(self, branches: Mapping[str, Branch]) -> "NMTrained":
        """Put branches beside their layers."""
        self.branches |= branches
        self._handles += [branch.watch(self.model) for branch in branches.values()]
        return self

    @classmethod
    def again(
        cls,
        method: "SparseTraining",
        model: nn.Module,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> SparselyTrained:
        """Take up stored masks and branches."""
        work = reattached(method, model, meta, tensors, cls)
        assert isinstance(work, cls)
        device = next(model.parameters()).device
        modules: Mapping[str, str] = meta.get("branches", {})
        return work.beside(
            {
                name: Branch(
                    module,
                    tensors[f"spread.{name}"].to(device),
                    tensors[f"project.{name}"].to(device),
                )
                for name, module in modules.items()
            }
        )

    def _undo(self) -> None:
        super()._undo()
        while self._handles:
            self._handles.pop().remove()

    def state(self) -> State:
        """Masks, notes, and the branches."""
        state = super().state()
        tensors = dict(state.tensors)
        for name, branch in self.branches.items():
            tensors[f"spread.{name}"] = branch.spread.contiguous()
            tensors[f"project.{name}"] = branch.project.contiguous()
        modules = {name: branch.module for name, branch in self.branches.items()}
        return State({**state.meta, "branches": modules}, tensors)
