"""Sparse-IFT: larger sparse layers at the cost of the dense ones they replace.

Four forms of equal multiply-adds: a wider layer, several parallel ones, two wider factors, a sparse
matrix doped with a low-rank one. Masks stay as drawn or move by RigL while the layers train.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core import (
    Card,
    GossamerError,
    Method,
    Site,
    check_count,
    pack_bits,
    unknown,
    unpack_bits,
)
from gossamer.methods.weights.structured.isoflop import (
    Activation,
    MaskedLinear,
    SparseDoped,
    SparseFactorized,
    SparseParallel,
)
from gossamer.methods.weights.structured.masked import MaskedModule, folded_decay
from gossamer.methods.weights.structured.replaced import (
    Replaced,
    Width,
    dense_of,
    held_tensors,
    refuse_taken,
)
from gossamer.methods.weights.structured.rigl import MaskUpdater
from gossamer.methods.weights.structured.sizes import parallel_branches
from gossamer.methods.weights.structured.training import Training, check_training, train
from gossamer.methods.weights.structured.widening import Widening, widening
from gossamer.models import Inputs, Progress, as_tokens, find_sites

__all__ = ["SparseIFT"]

Transform = Literal["wide", "parallel", "factorized", "doped"]
Masks = Literal["static", "rigl"]


@dataclass(frozen=True, kw_only=True)
class SparseIFT(Method):
    """Replace linear layers by larger sparse ones of equal FLOPs, newly initialised.

    The new layers start from random weights, so the model is broken until it is trained: give
    ``steps`` here, or train it yourself with
    :class:`gossamer.methods.weights.structured.rigl.MaskUpdater`. Equal FLOPs are a count: with
    dense kernels, as here, a layer costs up to 1 / (1 - s) times as much time and memory.

    Parameters
    ----------
    transform : ``wide`` multiplies the inner width of every MLP by 1 / (1 - s), in the model's
        configuration too; ``parallel``, ``factorized`` and ``doped`` replace matrix by matrix.
    sparsity : of the sparse matrices; for ``parallel`` 1 - 1/k.
    roles : matrices for the three transforms by matrix, also as text with commas; ``wide``
        always takes whole MLPs.
    activation : ``relu`` inside ``parallel`` and ``factorized``; those layers then amount to no
        matrix, so plain transformers cannot read what was trained.
    masks : ``static``, or ``rigl`` to move 30 % of the weights at first, less later.
    every : steps between moves of masks.
    steps : training updates of the new layers; all else stays fixed.
    lr, batch_size, decay, seed : of the training; ``decay`` acts on folded products.

    Departs from the paper: only the new layers train, inside a model that is otherwise trained;
    the inner width of an MLP grows on one side of each matrix, so by 1 / (1 - s); new weights have
    the mean square output of those they replace.

    Source: arXiv 2303.11525.
    """

    card: ClassVar = Card(
        title="Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
        year=2024,
        arxiv="2303.11525",
        system="sparse_ift",
        family="weights",
        when="during training",
        start="sparse to sparse",
        masks="dynamic",
        site="linear weight, replaced by a larger sparse one",
        score="random; |w| to drop and |gradient| to grow with rigl",
        pattern="unstructured per layer",
        budget="sparsity, at the multiply-adds of the dense layer",
        schedule="static, or RigL's cosine of moves",
        update="training from random weights",
        kernel="none: masked-dense",
        departs="only the new layers train, in a model otherwise trained; no batch norm inside; "
        "an MLP's inner width grows by 1/(1-s), as the outer widths stay",
    )
    example: ClassVar = {
        "transform": "doped",
        "roles": ("attention", "mlp"),
        "sparsity": 0.5,
        "steps": 0,
    }
    exempt: ClassVar = {
        "dense at sparsity 0": "the new layers start from random weights at any sparsity"
    }

    transform: Transform = "wide"
    sparsity: float = 0.75
    roles: tuple[str, ...] | str = ("mlp",)
    activation: Activation = "linear"
    masks: Masks = "rigl"
    every: int = 100
    steps: int = 0
    lr: float = 1e-3
    batch_size: int = 8
    decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.roles, str):
            object.__setattr__(self, "roles", tuple(self.roles.split(",")))
        for name, kind in (
            ("transform", Transform),
            ("activation", Activation),
            ("masks", Masks),
        ):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        if self.transform == "parallel":
            parallel_branches(self.sparsity)
        if self.activation != "linear" and self.transform not in ("parallel", "factorized"):
            raise GossamerError(
                f"transform {self.transform} has no place for {self.activation}; "
                "use parallel or factorized"
            )
        if not 0.0 <= self.decay < float("inf"):
            raise GossamerError(f"decay is {self.decay!r}; give a number of at least 0")
        check_count("every", self.every, 1)
        check_training(self.steps, self.lr, self.batch_size)

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> "Transformed":
        """Put new layers in place and train them for ``steps`` updates.

        Parameters
        ----------
        data : tokens or text to train on; not looked at for ``steps`` = 0.

        Raises
        ------
        GossamerError
            If the model has no such layers, ``wide`` cannot be said in its configuration, or
            another method holds a layer; the model is then as it was.
        """
        sites, wide = self._places(model)
        refuse_taken(model, sites, self.key())
        tokens = data if isinstance(data, Inputs) or not self.steps else as_tokens(data, model)
        generator = torch.Generator().manual_seed(self.seed)
        work = Transformed(self, model, wide)
        try:
            for site in sites:
                work.put(site, self._layer(model, site, wide, generator))
            work.describe()
            self._train(work, tokens, progress)
        except BaseException:
            work.restore()
            raise
        return work

    def _places(self, model: nn.Module) -> tuple[tuple[Site, ...], Widening | None]:
        """The sites to replace, and for ``wide`` how they grow."""
        found = find_sites(model)
        if self.transform == "wide":
            wide = widening(model, found, self.sparsity)
            return wide.sites, wide
        chosen = found.select(self.roles)
        sites = tuple(s for s in chosen if s.expert is None and s.role != "experts.router")
        if not sites:
            raise GossamerError(
                f"no single matrix has the roles {', '.join(self.roles)}; choose others"
            )
        return sites, None

    def _layer(
        self,
        model: nn.Module,
        site: Site,
        wide: Widening | None,
        generator: torch.Generator | None,
    ) -> MaskedModule:
        weight, bias = dense_of(model, site)
        out_features, in_features = site.shape
        options: dict[str, Any] = {
            # The mean square of the outputs stays that of the layer replaced.
            "gain": float(weight.float().square().mean().sqrt()) * in_features**0.5,
            "generator": generator,
            "device": weight.device,
            "dtype": weight.dtype,
        }
        has = bias is not None
        match self.transform:
            case "wide":
                assert wide is not None
                out_wide, in_wide = wide.shape_of(site)
                return MaskedLinear(in_wide, out_wide, has, kept=wide.kept_of(site), **options)
            case "parallel" | "factorized":
                kind = SparseParallel if self.transform == "parallel" else SparseFactorized
                options |= {"sparsity": self.sparsity, "activation": self.activation}
                return kind(in_features, out_features, has, **options)
            case "doped":
                return SparseDoped(
                    in_features, out_features, has, sparsity=self.sparsity, **options
                )

    def _train(self, work: "Transformed", tokens: Any, progress: Progress | None) -> None:
        if not self.steps:
            work.warnings.append("the new layers hold random weights: train them, or give steps")
            return
        training = Training(
            steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=self.seed
        )
        model = work.model

        def updater(optimizer: torch.optim.Optimizer) -> MaskUpdater:
            return MaskUpdater(model, optimizer, total=self.steps, every=self.every)

        losses = train(
            model,
            list(work.modules.values()),
            tokens,
            training,
            updater=updater if self.masks == "rigl" else None,
            penalty=(lambda: folded_decay(model, self.decay)) if self.decay else None,
            progress=progress,
            what=f"sparse {self.transform}",
        )
        few = max(1, len(losses) // 10)
        first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
        work.notes.append(f"{self.steps} steps: training loss {first:.3f} to {last:.3f}")

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "Transformed":
        """Put the stored layers in place; of ``wide`` the loaded weights are wide already."""
        sites = {site.name: site for site in find_sites(model).sites}
        work = Transformed(self, model, None)
        try:
            for name in meta["sites"]:
                if name not in sites:
                    raise GossamerError(f"the saved layers name {name}, which this model lacks")
                work.put(sites[name], self._held(model, sites[name], held_tensors(tensors, name)))
        except BaseException:
            work.restore()
            raise
        work.notes, work.warnings = list(meta["notes"]), list(meta["warnings"])
        return work

    def _held(self, model: nn.Module, site: Site, held: dict[str, Tensor]) -> MaskedModule:
        weight, bias = dense_of(model, site)
        if self.transform == "wide":
            out_wide, in_wide = site.shape
            layer: MaskedModule = MaskedLinear(
                in_wide,
                out_wide,
                bias is not None,
                kept=1,
                device=weight.device,
                dtype=weight.dtype,
                generator=torch.Generator(),
            )
            held = {**held, "weight": weight, **({} if bias is None else {"bias": bias})}
        else:
            layer = self._layer(model, site, None, torch.Generator())
        for key in layer.masked:
            shape = layer.get_buffer(f"{key}_mask").shape
            held[f"{key}_mask"] = unpack_bits(held[f"{key}_mask"], tuple(shape))
        layer.load_state_dict(held)
        for parameter, mask in layer.pairs():
            if bool(parameter.detach()[~mask].any()):
                raise GossamerError(
                    f"{site.name} is not zero where its saved mask removes weights; "
                    "the weights were changed after saving: save the model again"
                )
        return layer


class Transformed(Replaced):
    """A model with iso-FLOP sparse layers; masked-dense, so its speed is simulated."""

    method: SparseIFT

    def __init__(self, method: SparseIFT, model: nn.Module, wide: Widening | None) -> None:
        width: Width | None = None if wide is None else wide.width
        self._wide = method.transform == "wide"
        self._dense_cost: dict[str, int] = {}
        super().__init__(method, model, simulated=True, width=width)

    def put(self, site: Site, module: nn.Module) -> None:
        self._dense_cost[site.name] = site.size
        super().put(site, module)

    def cost(self) -> tuple[int, int]:
        """Multiply-adds for one token of the new layers and of those they replaced."""
        layers = [m for m in self.modules.values() if isinstance(m, MaskedModule)]
        return sum(m.multiply_adds() for m in layers), sum(self._dense_cost.values())

    def describe(self) -> None:
        """Note what the new layers cost."""
        new, old = self.cost()
        self.notes.append(
            f"{len(self.modules)} layers: {new:,} multiply-adds a token, dense {old:,} "
            f"({new / old - 1:+.2%}), counted; with dense kernels they run over "
            f"{sum(m.sparse_size for m in self._layers()):,} entries"
        )
        if not self._foldable():
            self.warnings.append(
                f"layers with {self.method.activation} inside amount to no matrix: plain "
                "transformers will read the layers they replaced"
            )

    def _layers(self) -> list[MaskedModule]:
        return [m for m in self.modules.values() if isinstance(m, MaskedModule)]

    def _foldable(self) -> bool:
        return self.method.activation == "linear"

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._foldable():
            return super().plain(tensors)
        # No matrix computes a nonlinearity: plain transformers gets the layers replaced.
        heads = tuple(f"{site.module}." for site in self.sites.values())
        made = {k: v for k, v in tensors.items() if not k.startswith(heads)}
        for name, old in self._old.items():
            head = self.sites[name].module
            made |= {f"{head}.{key}": value for key, value in old.state_dict().items()}
        return made

    def state(self) -> Any:
        state = super().state()
        for key, tensor in list(state.tensors.items()):
            if key.endswith("_mask"):
                state.tensors[key] = pack_bits(tensor)
            elif self._wide:
                # The saved model itself is wide and holds the values.
                del state.tensors[key]
        return state

    def weight_bytes_saved(self) -> int:
        saved = 0
        for layer in self._layers():
            for parameter, mask in layer.pairs():
                item, total = parameter.element_size(), mask.numel()
                saved += max(0, total * item - int(mask.sum()) * item - -(-total // 8))
        return saved
