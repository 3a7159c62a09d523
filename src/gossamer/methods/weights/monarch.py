"""Monarch: a dense matrix becomes the nearest product of two block-diagonal ones.

The projection is analytic, so a trained model can be taken over at once and then fine-tuned; and
multiplied out again, to go on training dense.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, Site, check_count
from gossamer.methods.weights.structured.monarch import MonarchLinear, MonarchShape
from gossamer.methods.weights.structured.replaced import (
    Replaced,
    dense_of,
    held_tensors,
    refuse_taken,
)
from gossamer.methods.weights.structured.training import Training, check_training, train
from gossamer.models import Inputs, Progress, as_tokens, find_sites

__all__ = ["Monarch"]


@dataclass(frozen=True, kw_only=True)
class Monarch(Method):
    """Replace linear layers by products of two block-diagonal matrices.

    The new layers are really smaller and run their structure, so nothing is simulated. Whether
    that is faster depends on size and machine: small layers are slower than dense ones.
    A saved folder holds the matrices multiplied out, for plain transformers, and the factors
    beside them; so on disk it is larger than the dense model.

    Parameters
    ----------
    nblocks : blocks of each factor; sqrt(n) of them with rank 1 are the paper's 2 n sqrt(n)
        parameters, 4 its layers' default.
    sparsity : share of a matrix's parameters to remove, which sets the rank of the slices
        (rounded down, at least 1); None: square inner blocks, 2 / nblocks of a square matrix stay.
    rank : of the slices, in place of ``sparsity``.
    roles : which matrices, as for ``find_sites(...).select``, or as text with commas. Stacked
        experts and routers stay dense.
    steps : updates of fine-tuning after the projection; 0 for none. Needs a model with a loss.
    lr, batch_size, seed : of the fine-tuning (AdamW; warm-up, then linearly to zero).

    Departs from the paper: fine-tuning trains the factors and the biases of the new layers, all
    else stays fixed; slices of rank above 1 are fitted jointly by one decomposition.

    Source: arXiv 2204.00595.
    """

    card: ClassVar = Card(
        title="Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
        year=2022,
        arxiv="2204.00595",
        system="monarch",
        family="weights",
        when="after training",
        start="dense to sparse",
        site="linear weight",
        score="none: the nearest matrix in Frobenius norm",
        pattern="two block-diagonal factors and a permutation",
        budget="blocks and rank, or sparsity",
        schedule="one shot, then fine-tuning",
        update="projection by singular values of slices; gradient steps on the factors",
        kernel="two batched matrix products",
        departs="fine-tuning trains the new layers only; ranks above 1 by truncated decompositions",
    )
    example: ClassVar = {"nblocks": 4, "steps": 2}
    exempt: ClassVar = {
        "dense at sparsity 0": "with as many parameters as a dense matrix it is still not any one",
        "encoders": "fine-tuning needs a loss, which bare encoders lack; projecting them is tested",
        "exact sparsity": "ranks are whole, so the sparsity reached is at least the one asked for",
    }

    nblocks: int = 4
    sparsity: float | None = None
    rank: int | None = None
    roles: tuple[str, ...] | str = ("attention", "mlp")
    steps: int = 0
    lr: float = 1e-3
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.roles, str):
            object.__setattr__(self, "roles", tuple(self.roles.split(",")))
        check_count("nblocks", self.nblocks, 1)
        if self.rank is not None:
            check_count("rank", self.rank, 1)
            if self.sparsity is not None:
                raise GossamerError("rank and sparsity both fix the parameters; give one of them")
        check_training(self.steps, self.lr, self.batch_size)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        undo: bool = True,
        progress: Progress | None = None,
    ) -> Replaced:
        """Project the chosen matrices, put the factors in their place, and fine-tune them.

        Parameters
        ----------
        data : tokens or text to fine-tune on; not looked at for ``steps`` = 0.
        undo : keep the dense layers so that ``restore`` works; False frees their memory.

        Raises
        ------
        GossamerError
            If no matrix has these roles, one is smaller than ``nblocks``, or another method holds
            one; the model is then as it was.
        """
        found = find_sites(model)
        chosen = found.select(self.roles)
        sites = tuple(s for s in chosen if s.expert is None and s.role != "experts.router")
        if not sites:
            raise GossamerError(
                f"no single matrix has the roles {', '.join(self.roles)}; choose others"
            )
        refuse_taken(model, sites, self.key())
        shapes = {site.name: self.shape_of(site) for site in sites}
        tokens = data if isinstance(data, Inputs) or not self.steps else as_tokens(data, model)
        work = Replaced(self, model, simulated=False)
        try:
            error, size = 0.0, 0.0
            for index, site in enumerate(sites):
                weight, bias = dense_of(model, site)
                shape = shapes[site.name]
                try:
                    layer = MonarchLinear.from_dense(
                        weight, bias, nblocks=shape.nblocks, rank=shape.rank
                    )
                except GossamerError as failure:
                    raise GossamerError(f"{site.name}: {failure}") from None
                error += float((weight - layer.dense()).float().square().sum())
                size += float(weight.float().square().sum())
                work.put(site, layer)
                if progress is not None:
                    progress(index + 1, len(sites), "projecting")
            stacks = len({s.module for s in found.sites if s.expert is not None})
            self._note(work, stacks, error / size)
            self._train(work, tokens, progress)
        except BaseException:
            work.restore()
            raise
        if not undo:
            work.drop_undo()
        return work

    def shape_of(self, site: Site) -> MonarchShape:
        """The Monarch shape that takes a site's place."""
        out_features, in_features = site.shape
        try:
            return MonarchShape.choose(
                in_features, out_features, self.nblocks, rank=self.rank, sparsity=self.sparsity
            )
        except GossamerError as error:
            raise GossamerError(f"{site.name}: {error}") from None

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Replaced:
        """Put the stored factors in the place of the matrices they were multiplied out to."""
        sites = {site.name: site for site in find_sites(model).sites}
        work = Replaced(self, model, simulated=False)
        try:
            for name in meta["sites"]:
                if name not in sites:
                    raise GossamerError(f"the saved factors name {name}, which this model lacks")
                held = held_tensors(tensors, name)
                weight, bias = dense_of(model, sites[name])
                shape = self.shape_of(sites[name])
                left, right = (held[side].to(weight) for side in ("left", "right"))
                layer = MonarchLinear.from_factors(shape, left, right, held.get("bias", bias))
                work.put(sites[name], layer.to(weight.device, weight.dtype))
        except BaseException:
            work.restore()
            raise
        work.notes, work.warnings = list(meta["notes"]), list(meta["warnings"])
        return work

    def _note(self, work: Replaced, stacks: int, error: float) -> None:
        modules = [layer for layer in work.modules.values() if isinstance(layer, MonarchLinear)]
        width = modules[0].left.element_size()
        dense = sum(site.size for site in work.sites.values()) * width
        held = sum(layer.shape.parameters for layer in modules) * width
        work.notes.append(
            f"{len(modules)} matrices: {held:,} bytes of factors for {dense:,} bytes of weights; "
            f"projected with a relative squared error of {error:.4f}"
        )
        if stacks:
            work.notes.append(f"{stacks} modules of stacked experts stay dense")
        larger = [n for n, m in work.modules.items() if m.shape.sparsity <= 0]  # type: ignore[union-attr]
        if larger:
            work.warnings.append(
                f"{len(larger)} matrices hold no fewer parameters than dense, such as {larger[0]}; "
                "give a smaller rank or more blocks"
            )

    def _train(self, work: Replaced, tokens: Any, progress: Progress | None) -> None:
        if not self.steps:
            return
        training = Training(
            steps=self.steps, lr=self.lr, batch_size=self.batch_size, seed=self.seed
        )
        modules = list(work.modules.values())
        losses = train(work.model, modules, tokens, training, progress=progress, what="monarch")
        few = max(1, len(losses) // 10)
        first, last = (float(torch.tensor(part).mean()) for part in (losses[:few], losses[-few:]))
        work.notes.append(
            f"{self.steps} steps of fine-tuning: training loss {first:.3f} to {last:.3f}"
        )
