"""The protocol of weight pruning after training.

A method decides, layer by layer and in the order of the forward pass, which weights stay and
what the survivors become. Everything else is shared here: how the sparsity is allocated over
layers, what calibration data flows, masks, undo, saving.
Shapes: O = out features, I = in features of a layer.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
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
    unknown,
    unpack_bits,
)
from gossamer.core import allocate as split
from gossamer.core.scores import outlier_share, weight_times_input
from gossamer.methods.weights.pruned import LayerView, Pruned, PrunedModel
from gossamer.models import (
    Inputs,
    Progress,
    SiteMap,
    as_tokens,
    find_sites,
)
from gossamer.models import stream as stream_blocks

__all__ = ["LayerView", "OneShot", "Pruned", "PrunedModel", "Scored", "prunable", "skipping"]

Allocation = Literal["uniform", "er", "erk", "lamp", "global", "owl"]


def prunable(model: nn.Module) -> SiteMap:
    """The sites weight pruning works on: all but routers, which are tiny and steer everything.

    Embeddings, heads, norms and biases are no sites to begin with.
    """
    sites = find_sites(model)
    return replace(sites, sites=tuple(s for s in sites.sites if s.role != "experts.router"))


def skipping(sites: SiteMap, skip: str) -> SiteMap:
    """The sites without those whose role or name one of the comma-separated words matches.

    Raises
    ------
    GossamerError
        If a word matches no site, or together they match all.
    """
    words = [word.strip() for word in skip.split(",") if word.strip()]
    dropped: set[str] = set()
    for word in words:
        found = {
            site.name
            for site in sites.sites
            if word in (site.role, site.role.partition(".")[0]) or fnmatchcase(site.name, word)
        }
        if not found:
            known = [*dict.fromkeys(s.role for s in sites.sites), *(s.name for s in sites.sites)]
            raise unknown("role or name of a layer to skip", word, known)
        dropped |= found
    if words and len(dropped) == len(sites.sites):
        raise GossamerError(f"skip {skip!r} leaves no layer to prune; name fewer")
    return replace(sites, sites=tuple(s for s in sites.sites if s.name not in dropped))


@dataclass(frozen=True, kw_only=True)
class OneShot(Method):
    """Base of the methods that prune a trained model in one pass.

    Parameters
    ----------
    sparsity : share of the prunable weights removed; None takes the pattern's own, or 0.5.
    pattern : allowed shape, for example ``"row"``, ``"layer"``, ``"model"``, ``"2:4"``.
    allocation : how the sparsity is split over layers: ``uniform``, ``er``, ``erk``, ``lamp``,
        ``global`` (one competition of this method's own scores), ``owl``.
    skip : matrices left dense, separated by commas: roles (``mlp.down``), halves of roles
        (``attention``) or names with wildcards (``*.layers.0.*``). The sparsity is of the others.
    """

    sparsity: float | None = None
    pattern: Pattern = Unstructured(per="layer")
    allocation: Allocation = "uniform"
    skip: str = ""

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
    def measures(self) -> frozenset[Stat]:
        """What this method reads of every layer: ``needs``, and what its fields add to it."""
        return self.needs

    @property
    def _data_needs(self) -> frozenset[Stat]:
        owl = frozenset({Stat.INPUT_L2}) if self.allocation == "owl" else frozenset()
        return self.measures | owl

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
        sites = skipping(prunable(model), self.skip)
        self._refuse_early(model, sites)
        work = PrunedModel(self, model, undo=undo)
        tokens = data
        if self._data_needs and not isinstance(data, Inputs):
            tokens = as_tokens(data, model)
        try:
            budgets = self._budgets(work, sites, tokens, batch_size, progress)
            if self.measures:
                stream_blocks(
                    model,
                    tokens,
                    self.measures,
                    lambda block: self._prune(work, block.sites, block.stats, budgets),
                    sites=sites,
                    batch_size=batch_size,
                    progress=progress,
                )
            else:
                for index in range(len(sites.blocks)):
                    self._prune(work, sites.in_block(index), {}, budgets)
                    if progress:
                        progress(index + 1, len(sites.blocks), f"{self.key()}: pruning")
        except BaseException:
            if undo:
                work.restore()
            else:
                work.forget()
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
                work.forget()
                raise GossamerError(f"the saved masks name {name}, which this model does not have")
            mask = unpack_bits(tensors[f"mask.{name}"], sites[name].shape)
            if bool(sites[name].weight(model)[~mask].any()):
                work.forget()
                raise GossamerError(
                    f"{name} is not zero where its saved mask removes weights; "
                    "the weights were changed after saving: save the model again"
                )
            work.masks[name] = tensors[f"mask.{name}"]
            work.kept[name] = Selection.from_mask(mask).kept
            work.sites[name] = sites[name]
        return work

    def _prune(
        self,
        work: PrunedModel,
        sites: tuple[Site, ...],
        stats: Mapping[str, Mapping[Stat, Any]],
        budgets: Mapping[str, tuple[Pattern, Budget]],
    ) -> None:
        """Decide and change every site of one block."""
        memo: dict[str, Any] = {}
        for site in sites:
            measured = work.usable(site, stats.get(site.name, {}))
            known = work.scores.pop(site.name, None)
            layer = replace(self.view(work.model, site, measured), known=known, memo=memo)
            try:
                pruned = self.prune(layer, *budgets[site.name])
            except GossamerError as error:
                raise GossamerError(f"{site.name}: {error}") from None
            work.write(site, layer.weight, pruned)

    # -- how much where ---------------------------------------------------------------------

    def _refuse_early(self, model: nn.Module, sites: SiteMap) -> None:
        """Refuse what some layer cannot take, or has no order, before anything is changed."""
        for site in sites.sites:
            try:
                self.pattern.check_shape(site.shape)
            except GossamerError as error:
                raise GossamerError(f"{site.name}: {error}") from None
            weight = site.weight(model)
            if not bool(weight.isfinite().all()):
                bad = site.size - int(weight.isfinite().sum())
                raise GossamerError(
                    f"{site.name}: {bad} of {site.size} weights are NaN or infinite, which have no "
                    "rank; repair the checkpoint, or load it in float32 if it overflows"
                )

    def _budgets(
        self,
        work: PrunedModel,
        sites: SiteMap,
        tokens: Any,
        batch_size: int,
        progress: Progress | None,
    ) -> dict[str, tuple[Pattern, Budget]]:
        """The pattern and budget of every site, from the allocation."""
        assert self.sparsity is not None
        model = work.model
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
                scores = self._all_scores(model, sites, tokens, batch_size, progress)
                shares = split.global_(scores, self.sparsity)
                if not self.measures:
                    # Nothing measured changes them on the way, so they are not computed twice.
                    work.scores = scores
            case "owl":
                shares = self._owl(model, sites, tokens, batch_size, progress)
        if isinstance(self.pattern, NM) and self.allocation != "uniform":
            shares = split.grouped(shares, sizes, self.pattern.of)
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

        if self.measures:
            stream_blocks(
                model,
                tokens,
                self.measures,
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
    ) -> dict[str, float]:
        """Sparsity per site from each block's share of outlier scores on the dense model.

        The paper's constants: outliers are 5 times the mean, blocks differ by up to 0.16; with
        N:M patterns 6 times, and by up to half of M.
        """
        groups = self.pattern.of if isinstance(self.pattern, NM) else None
        multiple, spread = (5.0, 0.08) if groups is None else (6.0, 0.25)
        outliers: dict[str, float] = {}

        def measure(block: Any) -> None:
            if not block.sites:
                return
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
        shares = split.owl(outliers, sizes, self.sparsity, spread)
        if groups is not None:
            # A block is one unit, so that rounding does not part its layers.
            shares = split.grouped(shares, sizes, groups)
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
        score = self.score(layer) if layer.known is None else layer.known
        return Pruned(pattern.select(score, budget))
