"""Collect: statistics of the inputs of a block's matrices, while the block runs.

Matrices that read the same tensor (q, k, v; gate, up) share one set of statistics.
Shapes: B sequences, T tokens, I in features, E experts, K experts chosen per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.core import Accumulator, GossamerError, Site, Stat, UnsupportedModel

__all__ = ["Collector", "expert_activation"]


class Collector:
    """Hooks on the modules that own a block's sites, feeding accumulators.

    Parameters
    ----------
    sites : of one block. needs : what to measure of their inputs.
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...], needs: frozenset[Stat]) -> None:
        self._model = model
        self._modules: dict[str, list[Site]] = {}
        for site in sites:
            self._modules.setdefault(site.module, []).append(site)
        self._sites = sites
        self._needs = needs
        # Made when first fed: a matrix that shares another's input needs none of its own.
        self._measured: dict[str, dict[Stat, Accumulator]] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None
        self._valid: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the modules; unhooked on any exit."""
        handles: list[Any] = []
        try:
            for path, sites in self._modules.items():
                stacked = sites[0].expert is not None
                hook = self._experts_hook(sites) if stacked else self._hook(sites[0])
                module = self._model.get_submodule(path)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, valid: Tensor | None) -> Iterator[None]:
        """While a batch runs; ``valid`` is (B, T) bool of real tokens, None when all are."""
        self._valid = None if valid is None else valid.flatten()
        try:
            yield
        finally:
            self._last = None

    def _hook(self, site: Site) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            shared = self._last is not None and self._last[0] is x
            leader = self._leader.setdefault(
                site.name, self._last[1] if shared and self._last else site.name
            )
            self._last = (x, leader)
            if leader == site.name:
                self._update(site, self._rows(x.reshape(-1, x.shape[-1]), site))
            else:
                assert shared, f"{site.name} stopped sharing its input with {leader}"

        return hook

    def _rows(self, rows: Tensor, site: Site) -> Tensor:
        if self._valid is None:
            return rows
        if len(rows) != len(self._valid):
            raise UnsupportedModel(
                f"{site.name} reads {len(rows)} rows for {len(self._valid)} tokens, so padding "
                "cannot be told apart there; give windows without padding"
            )
        return rows[self._valid.to(rows.device)]

    def _experts_hook(self, sites: list[Site]) -> Any:
        pairs: dict[int, dict[str, Site]] = {}
        for site in sites:
            assert site.expert is not None
            pairs.setdefault(site.expert, {})[site.role] = site

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            chosen = [v for v in values if not v.dtype.is_floating_point]
            if len(chosen) != 1:
                raise UnsupportedModel(
                    f"{sites[0].module} takes no token-to-expert indices, so what each of its "
                    "experts reads cannot be measured"
                )
            x = values[0].reshape(-1, values[0].shape[-1])
            index = chosen[0].reshape(len(x), -1)
            if self._valid is not None:
                x = self._rows(x, sites[0])
                index = index[self._valid.to(index.device)]
            for expert in index.unique().tolist():
                if expert in pairs:
                    self._expert(module, pairs[expert], x[(index == expert).any(1)])

        return hook

    def _expert(self, module: Any, pair: dict[str, Site], rows: Tensor) -> None:
        """Update one expert's statistics; its inner input is computed as the expert would."""
        first = pair["experts.gate_up"]
        self._update(first, rows)
        biases = getattr(module, f"{first.parameter}_bias", None)
        bias = None if biases is None else biases[first.expert]
        inner = linear(rows, first.weight(self._model), bias)
        self._update(pair["experts.down"], expert_activation(module, inner))

    def _update(self, site: Site, rows: Tensor) -> None:
        for accumulator in self._accumulators(site).values():
            try:
                accumulator.update(rows)
            except GossamerError as error:
                raise GossamerError(f"input of {site.name}: {error}") from None

    def _accumulators(self, site: Site) -> dict[Stat, Accumulator]:
        if site.name not in self._measured:
            device = site.weight(self._model).device
            fresh = {stat: stat.accumulator(site.shape[1], device) for stat in self._needs}
            self._measured[site.name] = fresh
        return self._measured[site.name]

    def _shared(self) -> dict[str, dict[Stat, Accumulator]]:
        by_name = {site.name: site for site in self._sites}
        return {name: self._accumulators(by_name[self._leader.get(name, name)]) for name in by_name}

    def values(self) -> dict[str, dict[Stat, Any]]:
        """Site name to statistics; sites that share an input share the value."""
        shared = self._shared()
        done = {id(own): {s: a.value() for s, a in own.items()} for own in shared.values()}
        return {name: done[id(own)] for name, own in shared.items()}

    def tokens(self) -> dict[str, int]:
        """Site name to the number of rows measured; 0 for an expert that no token reached."""
        shared = self._shared().items()
        return {n: max((a.tokens for a in own.values()), default=0) for n, own in shared}

    @property
    def nbytes(self) -> int:
        """Bytes of all accumulators."""
        return sum(a.nbytes for own in self._measured.values() for a in own.values())


def expert_activation(module: Any, inner: Tensor) -> Tensor:
    """What an expert's last matrix reads: the activation of its inner units, gated or not."""
    if not getattr(module, "has_gate", True):
        return module.act_fn(inner)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(inner)
    gate, up = inner.chunk(2, dim=-1)
    return module.act_fn(gate) * up
