"""The protocol of weight pruning after training.

A method decides, layer by layer and in the order of the forward pass, which weights stay and
what the survivors become. Everything else is shared here: how the sparsity is allocated over
layers, what calibration data flows, masks, undo, saving.
Shapes: O = out features, I = in features of a layer.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from zlib import crc32

import torch
from torch import Tensor, nn

from gossamer.core import (
    NM,
    Budget,
    GossamerError,
    Method,
    Pattern,
    Selection,
    Site,
    Stat,
    Unstructured,
    kept_count,
    pack_bits,
    unpack_bits,
)
from gossamer.core import allocate as split
from gossamer.core.scores import outlier_share, weight_times_input
from gossamer.models import (
    Applied,
    Inputs,
    Progress,
    Report,
    SiteMap,
    SiteRow,
    State,
    as_tokens,
    find_sites,
)
from gossamer.models import stream as stream_blocks

__all__ = ["LayerView", "OneShot", "Pruned", "PrunedModel", "Scored", "prunable"]

Allocation = Literal["uniform", "er", "erk", "lamp", "global", "owl"]


def prunable(model: nn.Module) -> SiteMap:
    """The sites weight pruning works on: all but routers, which are tiny and steer everything.

    Embeddings, heads, norms and biases are no sites to begin with.
    """
    sites = find_sites(model)
    return replace(sites, sites=tuple(s for s in sites.sites if s.role != "experts.router"))


@dataclass(frozen=True)
class LayerView:
    """What a method sees of a layer while it decides.

    Parameters
    ----------
    site : which matrix of the model.
    weight : (O, I), the current values.
    stats : what the method's ``needs`` named, measured on the already pruned stream.
    seed : differs from layer to layer, fixed by the method's seed and the layer's place.
    """

    site: Site
    weight: Tensor
    stats: Mapping[Stat, Any]
    seed: int

    def stat(self, stat: Stat) -> Any:
        """A measured statistic."""
        return self.stats[stat]


@dataclass(frozen=True)
class Pruned:
    """A method's decision for one layer.

    Parameters
    ----------
    selection : which weights stay, shape (O, I).
    weight : new values of the survivors, (O, I), or None when they keep theirs.
    """

    selection: Selection
    weight: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class OneShot(Method):
    """Base of the methods that prune a trained model in one pass.

    Parameters
    ----------
    sparsity : share of the prunable weights removed; None takes the pattern's own, or 0.5.
    pattern : allowed shape, for example ``"row"``, ``"layer"``, ``"model"``, ``"2:4"``.
    allocation : how the sparsity is split over layers: ``uniform``, ``er``, ``erk``, ``lamp``,
        ``global`` (one competition of this method's own scores), ``owl``.
    """

    sparsity: float | None = None
    pattern: Pattern = Unstructured(per="layer")
    allocation: Allocation = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = self.pattern.fixed_sparsity
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.5 if fixed is None else fixed)
        elif (
            fixed is not None and self.allocation == "uniform" and abs(self.sparsity - fixed) > 1e-9
        ):
            raise GossamerError(
                f"pattern {self.pattern} fixes the sparsity at {fixed:g}; got {self.sparsity}: "
                "leave the sparsity out or choose another pattern"
            )
        if self.allocation not in get_args(Allocation):
            raise GossamerError(
                f"allocation is {self.allocation!r}; choose from {', '.join(get_args(Allocation))}"
            )
        if self.pattern == Unstructured("model"):
            if self.allocation not in ("uniform", "global"):
                raise GossamerError(
                    f"pattern model lets all layers compete, so allocation {self.allocation} has "
                    "nothing to split; use pattern layer or row"
                )
            object.__setattr__(self, "allocation", "global")

    @abstractmethod
    def prune(self, layer: LayerView, pattern: Pattern, budget: Budget) -> Pruned:
        """Decide one layer: what stays under the budget, and new values if they change."""

    @abstractmethod
    def score(self, layer: LayerView) -> Tensor:
        """Scores (O, I) that a model-wide competition compares; higher means keep.

        Raises
        ------
        GossamerError
            If the method has no score outside its own solver.
        """

    @property
    def _data_needs(self) -> frozenset[Stat]:
        owl = frozenset({Stat.INPUT_L2}) if self.allocation == "owl" else frozenset()
        return self.needs | owl

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        undo: bool = True,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> "PrunedModel":
        """Prune a model in place.

        Parameters
        ----------
        model : any model whose sites are known.
        data : calibration text or tokens, see :func:`gossamer.models.as_tokens`; ignored by
            methods that need none.
        undo : keep the removed values so that ``restore`` works; False saves that memory.

        Raises
        ------
        GossamerError
            When a layer cannot take the pattern, or the data cannot be used; the model is then
            left as it was.
        """
        sites = prunable(model)
        self._refuse_early(sites)
        work = PrunedModel(self, model, undo=undo)
        tokens = data
        if self._data_needs and not isinstance(data, Inputs):
            tokens = as_tokens(data, model)
        try:
            budgets = self._budgets(model, sites, tokens, batch_size, progress)
            if self.needs:
                stream_blocks(
                    model,
                    tokens,
                    self.needs,
                    lambda block: work.prune_block(block.sites, block.stats, budgets),
                    sites=sites,
                    batch_size=batch_size,
                    progress=progress,
                )
            else:
                for index in range(len(sites.blocks)):
                    work.prune_block(sites.in_block(index), {}, budgets)
                    if progress:
                        progress(index + 1, len(sites.blocks), f"{self.key()}: pruning")
        except BaseException:
            if undo:
                work.restore()
            raise
        return work

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "PrunedModel":
        """Take up the stored masks of a loaded model; its weights already hold the zeros."""
        work = PrunedModel(self, model, undo=False)
        sites = {site.name: site for site in prunable(model).sites}
        for name in meta["sites"]:
            if name not in sites:
                raise GossamerError(f"the saved masks name {name}, which this model does not have")
            mask = unpack_bits(tensors[f"mask.{name}"], sites[name].shape)
            work.masks[name] = tensors[f"mask.{name}"]
            work.kept[name] = Selection.from_mask(mask).kept
            work.sites[name] = sites[name]
        return work

    # -- how much where ---------------------------------------------------------------------

    def _refuse_early(self, sites: SiteMap) -> None:
        """Refuse a pattern that some layer cannot take before anything is changed."""
        for site in sites.sites:
            try:
                self.pattern.check_shape(site.shape)
            except GossamerError as error:
                raise GossamerError(f"{site.name}: {error}") from None

    def _budgets(
        self,
        model: nn.Module,
        sites: SiteMap,
        tokens: Any,
        batch_size: int,
        progress: Progress | None,
    ) -> dict[str, tuple[Pattern, Budget]]:
        """The pattern and budget of every site, from the allocation."""
        assert self.sparsity is not None
        shapes = {site.name: site.shape for site in sites.sites}
        sizes = {site.name: site.size for site in sites.sites}
        match self.allocation:
            case "uniform":
                shares = split.uniform(shapes, self.sparsity)
            case "er":
                shares = split.er(shapes, self.sparsity)
            case "erk":
                shares = split.erk(shapes, self.sparsity)
            case "lamp":
                weights = {site.name: site.weight(model) for site in sites.sites}
                shares = split.lamp(weights, self.sparsity)
            case "global":
                shares = split.global_(
                    self._all_scores(model, sites, tokens, batch_size, progress), self.sparsity
                )
            case "owl":
                shares = self._owl(model, sites, tokens, batch_size, progress)
        return {name: self._for_site(share, sizes[name]) for name, share in shares.items()}

    def _for_site(self, sparsity: float, size: int) -> tuple[Pattern, Budget]:
        if isinstance(self.pattern, NM):
            keep = round((1.0 - sparsity) * self.pattern.of)
            pattern = NM(min(max(keep, 1), self.pattern.of), self.pattern.of)
            return pattern, Budget(keep=pattern.keep)
        if self.pattern == Unstructured("model"):
            return Unstructured("layer"), Budget(keep=kept_count(size, sparsity))
        return self.pattern, Budget(sparsity=min(1.0, max(0.0, sparsity)))

    def _all_scores(
        self,
        model: nn.Module,
        sites: SiteMap,
        tokens: Any,
        batch_size: int,
        progress: Progress | None,
    ) -> dict[str, Tensor]:
        """This method's scores of every site on the dense model."""
        scores: dict[str, Tensor] = {}

        def collect(block_sites: tuple[Site, ...], stats: Mapping[str, Mapping[Stat, Any]]) -> None:
            for site in block_sites:
                scores[site.name] = self.score(self.view(model, site, stats.get(site.name, {})))

        if self.needs:
            stream_blocks(
                model,
                tokens,
                self.needs,
                lambda block: collect(block.sites, block.stats),
                sites=sites,
                batch_size=batch_size,
                recompute=False,
                progress=progress,
            )
        else:
            collect(sites.sites, {})
        return scores

    def _owl(
        self,
        model: nn.Module,
        sites: SiteMap,
        tokens: Any,
        batch_size: int,
        progress: Progress | None,
        multiple: float = 5.0,
    ) -> dict[str, float]:
        """Sparsity per site from each block's share of outlier scores on the dense model."""
        outliers: dict[str, float] = {}

        def measure(block: Any) -> None:
            norms = {s.name: block.stats[s.name][Stat.INPUT_L2] for s in block.sites}
            parts = [
                weight_times_input(s.weight(model), norms[s.name]).flatten() for s in block.sites
            ]
            outliers[str(block.index)] = outlier_share(torch.cat(parts), multiple)

        stream_blocks(
            model,
            tokens,
            frozenset({Stat.INPUT_L2}),
            measure,
            sites=sites,
            batch_size=batch_size,
            recompute=False,
            progress=progress,
        )
        sizes = {i: sum(s.size for s in sites.in_block(int(i))) for i in outliers}
        assert self.sparsity is not None
        shares = split.owl(outliers, sizes, self.sparsity)
        return {site.name: shares[str(site.block)] for site in sites.sites}

    def view(self, model: nn.Module, site: Site, stats: Mapping[Stat, Any]) -> LayerView:
        """A layer as this method sees it."""
        seed = getattr(self, "seed", 0)
        # A checksum of the name, not Python's hash: the same in every process.
        return LayerView(site, site.weight(model), stats, crc32(f"{seed}:{site.name}".encode()))


@dataclass(frozen=True, kw_only=True)
class Scored(OneShot):
    """Base of the methods that are a score and nothing else: survivors keep their values."""

    def prune(self, layer: LayerView, pattern: Pattern, budget: Budget) -> Pruned:
        return Pruned(pattern.select(self.score(layer), budget))


class PrunedModel(Applied):
    """A model whose weights were pruned; the zeros are in its parameters.

    Masked-dense: the arithmetic is still dense, so ``simulated`` is True.
    """

    def __init__(self, method: OneShot, model: nn.Module, *, undo: bool) -> None:
        super().__init__(method, model)
        self.undo = undo
        self.sites: dict[str, Site] = {}
        self.kept: dict[str, int] = {}
        self.masks: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self._removed: dict[str, Tensor] = {}

    def prune_block(
        self,
        sites: tuple[Site, ...],
        stats: Mapping[str, Mapping[Stat, Any]],
        budgets: Mapping[str, tuple[Pattern, Budget]],
    ) -> None:
        """Decide and change every site of one block."""
        assert isinstance(self.method, OneShot)
        for site in sites:
            layer = self.method.view(self.model, site, self._usable(site, stats.get(site.name, {})))
            try:
                pruned = self.method.prune(layer, *budgets[site.name])
            except GossamerError as error:
                raise GossamerError(f"{site.name}: {error}") from None
            self._write(site, layer.weight, pruned)

    def _usable(self, site: Site, stats: Mapping[Stat, Any]) -> Mapping[Stat, Any]:
        """An expert that saw no token has norms of zero, which rank nothing: take them as one."""
        norm = stats.get(Stat.INPUT_L2)
        if norm is None or bool(norm.any()):
            return stats
        self.notes.append(f"{site.name} saw no calibration token; pruned by magnitude")
        return {**stats, Stat.INPUT_L2: torch.ones_like(norm)}

    def _write(self, site: Site, weight: Tensor, pruned: Pruned) -> None:
        mask = pruned.selection.mask()
        if self.undo:
            changed = pruned.weight is not None
            self._removed[site.name] = weight.clone() if changed else weight[~mask]
        if pruned.weight is not None:
            weight.copy_(pruned.weight)
        weight.masked_fill_(~mask, 0)
        self.sites[site.name] = site
        self.kept[site.name] = pruned.selection.kept
        self.masks[site.name] = pack_bits(mask)

    def selection(self, name: str) -> Selection:
        """What stays of one site."""
        return Selection.from_mask(unpack_bits(self.masks[name], self.sites[name].shape))

    @torch.no_grad()
    def restore(self) -> None:
        if not self.undo:
            raise GossamerError("pruned without undo: load the model again to have it dense")
        for name, removed in self._removed.items():
            weight = self.sites[name].weight(self.model)
            if removed.dim() == 2:
                weight.copy_(removed)
            else:
                mask = unpack_bits(self.masks[name], self.sites[name].shape)
                weight[~mask] = removed
        self._removed.clear()

    @torch.no_grad()
    def enforce(self) -> None:
        """Set every removed weight to zero again, for example after an optimizer step."""
        for name in self.masks:
            self.selection(name).apply_(self.sites[name].weight(self.model))

    def state(self) -> State:
        return State(
            {"sites": list(self.masks)}, {f"mask.{n}": mask for n, mask in self.masks.items()}
        )

    def report(self) -> Report:
        rows = tuple(
            SiteRow(name, site.role, site.block, site.size, 1.0 - self.kept[name] / site.size)
            for name, site in self.sites.items()
        )
        total = sum(p.numel() for p in self.model.parameters())
        return Report(
            self.method.to_dict(), rows, "weights", total, self.simulated, tuple(self.notes)
        )

    def weight_bytes_saved(self) -> int:
        saved = 0
        for name, site in self.sites.items():
            item = getattr(site.owner(self.model), site.parameter).element_size()
            read = self.kept[name] * item + -(-site.size // 8)
            saved += max(0, site.size * item - read)
        return saved
