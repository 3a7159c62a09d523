"""A model that answers each prompt with the core neurons of that prompt."""

from collections.abc import Iterable, Mapping
from math import fsum
from typing import Any

from torch import Tensor, nn

from gossamer.core import GossamerError, Method, Selection, kept_count, pack_bits, unpack_bits
from gossamer.methods.activations.core.layers import Feedforward, feedforwards, output_norms
from gossamer.methods.activations.core.memory import Clusters, Drift, Plan
from gossamer.methods.activations.core.neurons import Ranking
from gossamer.methods.activations.core.session import Session
from gossamer.models import Applied, Report, SiteMap, SiteRow, State

__all__ = ["CoreModel", "blocks_between", "make_plan", "restore_clusters"]


def blocks_between(count: int, span: tuple[float, float]) -> tuple[int, ...]:
    """Blocks i of ``count`` with ``span[0] <= i / count < span[1]``.

    Raises
    ------
    GossamerError
        If none lies there.
    """
    low, high = span
    found = tuple(i for i in range(count) if low <= i / count < high)
    if not found:
        raise GossamerError(
            f"no block of {count} lies between {low} and {high} of the depth; widen layers"
        )
    return found


def make_plan(
    model: nn.Module,
    sites: SiteMap,
    blocks: Iterable[int],
    sparsity: float,
    ranking: Ranking,
    alpha: float,
    drift: Drift | None = None,
) -> Plan:
    """The plan of a method on a model, without clusters."""
    found = {layer.name: layer for layer in feedforwards(sites, tuple(blocks))}
    return Plan(
        layers=found,
        norms={name: output_norms(model, layer) for name, layer in found.items()},
        keep={name: kept_count(layer.neurons, sparsity) for name, layer in found.items()},
        ranking=ranking,
        alpha=alpha,
        drift=drift,
    )


def restore_clusters(
    plan: Plan, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Clusters | None:
    """The clusters of a saved state, checked against the model's layers.

    Raises
    ------
    GossamerError
        If they were learned on a model with other layers.
    """
    if meta.get("cluster_layer") is None:
        return None
    cores = {}
    centroids = tensors["centroids"].float()
    for name, layer in plan.layers.items():
        shape = (len(centroids), layer.experts, layer.neurons)
        stored = tensors.get(f"core.{name}")
        if meta["neurons"].get(name) != layer.neurons or stored is None:
            raise GossamerError(
                f"the saved clusters have {meta['neurons'].get(name, 'no')} neurons for {name}, "
                f"this model {layer.neurons}; use the model they were learned on"
            )
        cores[name] = unpack_bits(stored, shape)
    return Clusters(meta["cluster_layer"], centroids, cores)


class CoreModel(Applied):
    """A model whose prompts are read densely and whose answers are decoded with few neurons.

    Decoding runs on gathered matrices, so ``simulated`` is False: the memory they take comes on
    top of the model's. A text scored in one pass runs densely under a mask that gives the same
    numbers; it earns no speed figure.

    Attributes
    ----------
    session : the hooks and the memories of the caches filled so far.
    """

    simulated = False

    def __init__(
        self, method: Method, model: nn.Module, sites: SiteMap, plan: Plan, prompt: int
    ) -> None:
        super().__init__(method, model)
        self.sites, self.plan = sites, plan
        self.session = Session(model, sites.base, plan, prompt)
        try:
            self.session.attach()
        except BaseException:
            self.session.remove()
            raise
        self._join()

    def _undo(self) -> None:
        self.session.remove()

    def cores(self, cache: Any = None) -> dict[str, Selection]:
        """The neurons in use, layer by layer, as selections of shape (rows x experts, neurons).

        Parameters
        ----------
        cache : the ``past_key_values`` whose prompts are meant; None means the latest pass.

        Raises
        ------
        GossamerError
            If no prompt was read, or not into this cache.
        """
        memory = self.session.last if cache is None else self.session.memories.get(cache)
        if memory is None:
            raise GossamerError("no prompt was read here yet; call generate or the model first")
        if (memory.stale and cache is not None) or not memory.cores:
            memory.choose(self.model)
        return {n: Selection.from_mask(c.flatten(0, 1).cpu()) for n, c in memory.cores.items()}

    @property
    def selections(self) -> int:
        """Choices of cores made for the latest prompts; more than 1 after a drift."""
        return 0 if self.session.last is None else self.session.last.selections

    def state(self) -> State:
        """The clusters, if any; cores belong to prompts and are not saved."""
        clusters = self.plan.clusters
        if clusters is None:
            return State({"cluster_layer": None})
        tensors = {f"core.{name}": pack_bits(core) for name, core in clusters.cores.items()}
        neurons = {name: layer.neurons for name, layer in self.plan.layers.items()}
        meta = {"cluster_layer": clusters.layer, "neurons": neurons}
        return State(meta, {**tensors, "centroids": clusters.centroids})

    def report(self) -> Report:
        """Share of every matrix that a decoded token does not read."""
        rows = tuple(
            SiteRow(site.name, site.role, site.block, self._read_size(site, layer), 1 - kept)
            for layer in self.plan.layers.values()
            for kept in (self.plan.keep[layer.name] / layer.neurons,)
            for site in (*layer.readers, *layer.writers)
        )
        return Report(
            method=self.method.to_dict(),
            rows=rows,
            unit="weight reads",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=self._notes(),
        )

    def weight_bytes_saved(self) -> int:
        """Bytes of the rows and columns that a decoded token of one prompt does not read."""
        return int(
            fsum(
                (1 - self.plan.keep[layer.name] / layer.neurons)
                * self._read_size(site, layer)
                * site.weight(self.model).element_size()
                for layer in self.plan.layers.values()
                for site in (*layer.readers, *layer.writers)
            )
        )

    def _read_size(self, site: Any, layer: Feedforward) -> int:
        """Weights of a site that a dense token reads on average: experts take turns."""
        if site.expert is None:
            return site.size
        active: Any = getattr(self.model, "config", None)
        return round(site.size * active.get_text_config().num_experts_per_tok / layer.experts)

    def _notes(self) -> tuple[str, ...]:
        blocks = sorted({layer.block for layer in self.plan.layers.values()})
        notes = [
            f"blocks {blocks[0]} to {blocks[-1]} of {len(self.sites.blocks)} decode with core "
            "neurons; prompts are read densely",
            f"in texts scored in one pass the first {self.session.prompt} real tokens are the "
            "prompt; the others see core neurons only (under a mask: no speed figure)",
            "prompts of a batch keep their own neurons; a token reads the union of them",
        ]
        if self.session.unknown:
            notes.append(
                f"{self.session.unknown} tokens continued a cache that was not filled here; "
                "they ran densely"
            )
        memory = self.session.last
        if memory is not None and any(memory.slices.values()):
            held = sum(s.nbytes for parts in memory.slices.values() if parts for s in parts)
            notes.append(
                f"gathered matrices of the latest prompts: {held:,} bytes beside the model; "
                f"{memory.selections} choices of neurons"
            )
        return tuple(notes)
