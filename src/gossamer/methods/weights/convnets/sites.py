"""Pointwise sites: the 1x1 convolutions of any model, and what follows each of them.

Shapes: O = output channels, I = input channels.
"""

from collections import Counter
from dataclasses import dataclass
from math import inf

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.core import GossamerError, Site, UnsupportedModel
from gossamer.kernels.sparse_conv.module import is_pointwise

__all__ = ["ROLE", "ConvSite", "Followers", "followers", "pointwise"]

ROLE = "conv.1x1"
# Modules of transformers that run exactly convolution, normalization, activation in this order.
_LAYERS = ("MobileNetV1ConvLayer", "MobileNetV2ConvLayer")


class ConvSite(Site):
    """A pointwise convolution's weights (O, I, 1, 1), seen as a matrix (O, I)."""

    def weight(self, model: nn.Module) -> Tensor:
        tensor = getattr(self.owner(model), self.parameter).detach()
        return tensor.view(self.shape)


def pointwise(model: nn.Module) -> tuple[ConvSite, ...]:
    """The 1x1 convolutions of a model in the order of its modules, its first convolution excepted.

    Grouped convolutions (depthwise ones among them) and larger kernels are no sites.

    Raises
    ------
    UnsupportedModel
        If there is none.
    GossamerError
        If one is quantised or reparameterised, so that its weight is no plain tensor.
    """
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    sites = []
    for index, (name, conv) in enumerate(convs):
        if index == 0 or not is_pointwise(conv):
            continue
        if parametrize.is_parametrized(conv) or not conv.weight.is_floating_point():
            raise GossamerError(
                f"{name} holds {conv.weight.dtype} or reparameterised weights; prune the model "
                "before quantising it, and remove its parametrisations"
            )
        shape = (conv.out_channels, conv.in_channels)
        sites.append(ConvSite(name, ROLE, len(sites), name, "weight", shape))
    if not sites:
        raise UnsupportedModel(
            f"{type(model).__name__} has no 1x1 convolution after its first one; this method "
            "prunes the pointwise convolutions of MobileNet-like models"
        )
    return tuple(sites)


@dataclass(frozen=True)
class Followers:
    """What can be computed together with a convolution, in evaluation mode.

    Parameters
    ----------
    norm : the batch normalisation that reads it alone, or None.
    clamp : the activation after that, one that bounds its input, or None.
    """

    norm: nn.BatchNorm2d | None = None
    clamp: nn.Module | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """What the activation clamps to; infinite without one."""
        if isinstance(self.clamp, nn.Hardtanh):  # ReLU6 is one
            return float(self.clamp.min_val), float(self.clamp.max_val)
        return (0.0 if self.clamp is not None else -inf), inf

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Those that there are, in order."""
        return tuple(m for m in (self.norm, self.clamp) if m is not None)


def _next(parent: nn.Module, conv: nn.Module) -> list[nn.Module | None]:
    """The modules that run right after a convolution inside its parent, as far as that is known."""
    if isinstance(parent, nn.Sequential):
        inside = list(parent)
        at = next(i for i, module in enumerate(inside) if module is conv)
        return list(inside[at + 1 :])
    if type(parent).__name__ in _LAYERS and parent.convolution is conv:
        return [m for m in (parent.normalization, parent.activation) if m is not None]  # type: ignore[list-item]
    return []


def _free(module: nn.Module | None, uses: Counter[int]) -> bool:
    """Used once, and nobody watches what goes in or out of it."""
    if module is None or uses[id(module)] != 1:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def followers(model: nn.Module, sites: tuple[ConvSite, ...]) -> dict[str, Followers]:
    """What follows every site where the model's structure tells: Sequential, MobileNetV1 and V2."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found = {}
    for site in sites:
        conv = site.owner(model)
        parent = model.get_submodule(site.module.rpartition(".")[0])
        after = _next(parent, conv) if _free(conv, uses) else []
        norm = clamp = None
        first = after[0] if after else None
        known = isinstance(first, nn.BatchNorm2d) and first.running_var is not None
        if isinstance(first, nn.BatchNorm2d) and known and _free(first, uses):
            norm, after = first, after[1:]
        if after and isinstance(after[0], nn.ReLU | nn.Hardtanh) and _free(after[0], uses):
            clamp = after[0]
        found[site.name] = Followers(norm, clamp)
    return found
