"""LinEAS: learn a diagonal affine map behind every norm so that source texts look like target's.

All maps are learned together through the frozen model: what counts is the distribution of each
coordinate over texts, so the texts need no pairing; a penalty leaves most coordinates alone.
Shapes: N = texts, D = width of a layer.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from math import cos, pi, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count, nearest
from gossamer.methods.control.base import Affine, ContrastMethod, Edit, Plan, norm_paths
from gossamer.methods.features.editing import gathered, pooled
from gossamer.methods.features.hooks import find_module, hidden_of, with_hidden
from gossamer.models import Progress, Tokens
from gossamer.models.labelled import Labelled

__all__ = ["LinEAS", "prox", "sorted_distance", "transport"]


def quantiles(rows: Tensor, count: int) -> Tensor:
    """(N, D) to (count, D): each column's values at evenly spaced ranks, lowest first."""
    ordered = rows.sort(dim=0).values
    if len(ordered) == count:
        return ordered
    at = ((torch.arange(count, dtype=rows.dtype) + 0.5) * len(rows) / count - 0.5).clamp(
        0, len(rows) - 1
    )
    low = at.floor().long()
    high = (low + 1).clamp_max(len(rows) - 1)
    part = (at - low).to(rows)[:, None]
    return ordered[low] * (1 - part) + ordered[high] * part


def sorted_distance(source: Tensor, target: Tensor) -> Tensor:
    """Squared 1-D Wasserstein distance, summed over columns of (N, D) and (N', D)."""
    wanted = quantiles(target, len(source))
    return (source.sort(dim=0).values - wanted).square().mean(0).sum()


def prox(vector: Tensor, step: float, lasso: float, group: float) -> Tensor:
    """Proximal map of step * (lasso ‖v‖₁ + group sqrt(D) ‖v‖₂): soft threshold, then shrink."""
    soft = vector.sign() * (vector.abs() - step * lasso).clamp_min(0)
    norm = float(soft.norm())
    if norm == 0:
        return soft
    return soft * max(0.0, 1 - step * group * sqrt(len(soft)) / norm)


def transport(source: Tensor, target: Tensor) -> Affine:
    """The affine map of each column that best carries sorted source to sorted target.

    Least squares in closed form, each layer on its own (Lin-AcT, arXiv 2410.23054, learned at
    once): the local baseline of maps learned together.
    """
    start, end = source.sort(dim=0).values, quantiles(target, len(source))
    centred = start - start.mean(0)
    spread = centred.square().sum(0)
    overlap = (centred * (end - end.mean(0))).sum(0)
    scale = torch.where(spread > 1e-12, overlap / spread.clamp_min(1e-12), 1.0)
    return Affine(scale, end.mean(0) - scale * start.mean(0))


class _Maps:
    """Diagonal affine maps at work behind modules, learning."""

    def __init__(self, model: nn.Module, wide: Mapping[str, int]) -> None:
        self.model, self.paths = model, tuple(wide)
        device = next(model.parameters()).device
        self.scale = [torch.ones(d, device=device, requires_grad=True) for d in wide.values()]
        self.shift = [torch.zeros(d, device=device, requires_grad=True) for d in wide.values()]

    def features(self, tokens: Tokens) -> list[Tensor]:
        """(N, D) mean activations behind every module, all maps in force."""
        device = self.scale[0].device
        mask, found = tokens.attention_mask.to(device), {}

        def hook(i: int) -> Any:
            def after(module: nn.Module, args: Any, output: Any) -> Any:
                hidden = hidden_of(output, self.paths[i])
                steered = self.scale[i] * hidden.float() + self.shift[i]
                found[i] = pooled(steered, mask, "mean")
                return with_hidden(output, steered.to(hidden.dtype))

            return after

        with ExitStack() as stack:
            for i, path in enumerate(self.paths):
                handle = find_module(self.model, path).register_forward_hook(hook(i))
                stack.callback(handle.remove)
            with torch.enable_grad():
                self.model(**next(tokens.batches(len(tokens), device)))
        return [found[i] for i in range(len(self.paths))]

    def step(self, loss: Tensor, rate: float, lasso: float, group: float) -> None:
        """One proximal gradient step, around the identity."""
        parts = self.scale + self.shift
        gradients = torch.autograd.grad(loss, parts)
        with torch.no_grad():
            for part, gradient, rest in zip(
                parts, gradients, [1.0] * len(self.scale) + [0.0] * len(self.shift), strict=True
            ):
                part.copy_(rest + prox(part - rate * gradient - rest, rate, lasso, group))


@dataclass(frozen=True, kw_only=True)
class LinEAS(ContrastMethod):
    """Steer by element-wise affine maps learned end to end on few unpaired texts.

    The loss is the squared Wasserstein distance of every coordinate's text means, source against
    target, summed over layers; gradients run through all later maps. After each step a sparse
    group lasso pulls maps to the identity, exactly for most coordinates if asked.

    Parameters
    ----------
    hooks : patterns of module paths, separated by commas, such as ``model.layers.*.mlp``; empty:
        the norms in the blocks named "post", or each block's last.
    steps : updates over all texts at once. lr : of the first; it falls to 0 as a cosine.
    lasso, group : weights of the penalties on single coordinates and on whole layers.

    Source: arXiv 2503.10679, algorithm 1. Departs from the paper: every update sees all source
    texts at once; unequal numbers of texts meet at interpolated quantiles.
    """

    card: ClassVar[Card] = Card(
        title="LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss",
        year=2025,
        arxiv="2503.10679",
        system="lineas",
        family="control",
        when="inference",
        start="dense",
        masks="static",
        site="output of normalisations",
        score="learned",
        pattern="coordinates and layers",
        budget="emergent from the penalty",
        schedule="cosine step size",
        update="proximal gradient on scale and shift",
        kernel="fused add",
        departs="full batches; unequal counts meet at interpolated quantiles",
    )
    example: ClassVar[Mapping[str, Any]] = {"source": "0", "target": "1", "steps": 5}

    hooks: str = ""
    steps: int = 1000
    lr: float = 0.1
    lasso: float = 0.0
    group: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps, 1)
        for name, least in (("lr", "above"), ("lasso", "at least"), ("group", "at least")):
            value = getattr(self, name)
            if not 0 <= value < float("inf") or (name == "lr" and value == 0):
                raise GossamerError(f"{name} is {value!r}; give a number {least} 0")

    def paths(self, model: nn.Module) -> tuple[str, ...]:
        """The modules behind which maps stand.

        Raises
        ------
        GossamerError
            If a pattern matches nothing, with the nearest paths.
        """
        if not self.hooks:
            return norm_paths(model)
        known, found = [name for name, _ in model.named_modules() if name], dict[str, None]()
        for pattern in (part.strip() for part in self.hooks.split(",")):
            hits = [name for name in known if fnmatch(name, pattern)]
            if not hits:
                close = nearest(pattern, known)
                hint = f"did you mean {' or '.join(close)}?" if close else "see model.named_modules"
                raise GossamerError(f"hooks: no module matches {pattern!r}; {hint}")
            found |= dict.fromkeys(hits)
        return tuple(name for name in known if name in found)

    def plan(self, model: nn.Module, data: Labelled, progress: Progress | None = None) -> Plan:
        source, target = self.sides(data)
        if len(source) < 2 or len(target) < 2:
            raise GossamerError(
                f"{len(source)} source and {len(target)} target texts; a distribution needs 2 of "
                "each, the paper takes 32"
            )
        paths = self.paths(model)
        wanted = gathered(model, target, paths, "mean")
        maps = _Maps(model, {path: wanted[path].shape[1] for path in paths})
        first = last = 0.0
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            for i in range(self.steps):
                found = maps.features(source)
                parts = zip(found, paths, strict=True)
                loss = torch.stack([sorted_distance(x, wanted[p]) for x, p in parts]).sum()
                last = float(loss.detach())
                first = last if i == 0 else first
                if not last < float("inf"):
                    raise GossamerError(f"the loss is {last} after {i} steps; lower lr={self.lr}")
                rate = self.lr * (1 + cos(pi * i / self.steps)) / 2
                maps.step(loss, rate, self.lasso, self.group)
                if progress is not None:
                    progress(i + 1, self.steps, f"distance {last:.4f}")
        finally:
            for module, training in modes:
                module.training = training
        note = f"distance of text means {first:.4f} before, {last:.4f} after {self.steps} steps"
        return Plan(_edits(maps), (note,))


def _edits(maps: _Maps) -> tuple[Edit, ...]:
    """One edit a layer; coordinates that kept their identity are counted as left alone."""
    parts = zip(maps.paths, maps.scale, maps.shift, strict=True)
    return tuple(Edit(p, Affine(w.detach().cpu(), b.detach().cpu())) for p, w, b in parts)
