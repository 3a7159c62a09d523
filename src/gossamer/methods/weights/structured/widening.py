"""Widening the MLPs of a transformer: which matrices grow, on which side, and where it is written.

The residual stream keeps its width, so every matrix grows on one side only.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from gossamer.core import GossamerError, Site
from gossamer.methods.weights.structured.replaced import Width
from gossamer.methods.weights.structured.sizes import wide_factor
from gossamer.models import SiteMap

__all__ = ["Widening", "widening"]

_UP = ("mlp.gate", "mlp.up", "mlp.gate_up")
# Where configurations of transformers keep the inner width of an MLP.
_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim")


@dataclass(frozen=True)
class Widening:
    """What grows.

    Parameters
    ----------
    sites : the MLPs' matrices. inner, new : their inner width, before and after.
    width : the change of the configuration.
    """

    sites: tuple[Site, ...]
    inner: int
    new: int
    width: Width

    def shape_of(self, site: Site) -> tuple[int, int]:
        """(out, in) of the wide matrix."""
        out_features, in_features = site.shape
        if site.role in _UP:
            return out_features // self.inner * self.new, in_features
        return out_features, self.new

    def kept_of(self, site: Site) -> int:
        """Weights that stay: as many as the dense matrix has, at most all of the wide one."""
        rows, columns = self.shape_of(site)
        return min(site.size, rows * columns)


def widening(model: nn.Module, sites: SiteMap, sparsity: float) -> Widening:
    """How the MLPs of a model grow at a sparsity.

    Raises
    ------
    GossamerError
        If the model has no MLPs of single matrices, they differ in width, the configuration does
        not name it, or another parameter has it too.
    """
    every = sites.select("mlp")
    inner = {s.shape[1] for s in every if s.role == "mlp.down"}
    if not every or len(inner) != 1:
        kind = "no MLP of single matrices" if not every else f"MLPs of widths {sorted(inner)}"
        raise GossamerError(
            f"{type(model).__name__} has {kind}, so wide does not apply; "
            "use transform parallel, factorized or doped with other roles"
        )
    (width,) = inner
    for site in every:
        grown = site.shape[1] if site.role == "mlp.down" else site.shape[0]
        if grown not in (width, 2 * width):
            raise GossamerError(f"{site.name} is {site.shape}, not {width} wide inside")
    _refuse_others(model, every, width)
    new = round(wide_factor(sparsity, sides=1) * width)
    return Widening(every, width, new, _named(model, width, new))


def _refuse_others(model: nn.Module, sites: tuple[Site, ...], inner: int) -> None:
    """Refuse norms and the like between the matrices: they would keep the old width."""
    down = [site for site in sites if site.role == "mlp.down"]
    for site in down:
        path = site.module.rpartition(".")[0]
        own = {s.module.removeprefix(f"{path}.") for s in sites if s.module.startswith(f"{path}.")}
        if not any(s.role in _UP and s.module.startswith(f"{path}.") for s in sites):
            continue
        for name, parameter in model.get_submodule(path).named_parameters():
            head = name.rpartition(".")[0]
            between = head not in own and "norm" in head and "layer_norm" not in head
            if between and tuple(parameter.shape) == (inner,):
                raise GossamerError(
                    f"{path}.{name} is as wide as the MLP inside, so wide does not apply; "
                    "use transform parallel, factorized or doped"
                )


def _named(model: nn.Module, inner: int, new: int) -> Width:
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in _NAMES:
        held = getattr(config, name, -1)
        # GPT-2 writes None for four times the hidden size.
        if held == inner or (held is None and name == "n_inner"):
            return Width(config, name, held, new)
    raise GossamerError(
        f"the configuration of {type(model).__name__} does not name the MLP's width {inner}, "
        "so a wide model could not be loaded again; use parallel, factorized or doped"
    )
