"""Footprint: what sparsity saves, as four numbers that must not stand in for each other.

Logical sparsity says how much is zero, bytes stored what a disk holds, bytes moved what a
decoded token pulls through memory, and measured time (:mod:`gossamer.evaluate.speed`) what a
user feels. One can be 50 % while the other three are unchanged.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Site
from gossamer.evaluate.forward import device_of, evaluating
from gossamer.models import SiteMap, find_sites
from gossamer.models.applied import Applied, Report
from gossamer.models.store import plain_tensors

__all__ = ["Footprint", "bitmask_bytes", "footprint"]


@dataclass(frozen=True)
class Footprint:
    """The sizes of a model, counted.

    Parameters
    ----------
    parameters : of the whole model, tied ones once.
    prunable : of those, the ones in the matrices methods may prune (the model's sites).
    sparsity : share removed of what the method works on; without a method, the share of zeros
        among the prunable parameters.
    sparsity_all : share removed of all parameters (of all the unit's elements where the unit is
        not weights).
    unit : what the two shares count.
    bytes_stored : tensors of the saved folder: weights with their zeros, buffers, masks at one
        bit a weight, thresholds, parameters of modules in a matrix's place beside the matrix that
        plain transformers reads. File headers (kilobytes) are not counted.
    bytes_moved : read per decoded token as the model runs now: all of it while simulated.
    bytes_moved_limit : what a kernel that skips everything removed must still read.
    bytes_blocks : the part of the dense ``bytes_moved`` that is the blocks' linear weights.
    bytes_cache : the part of ``bytes_moved`` that is keys and values.
    context : length of the text over which the cache's part is averaged; 0 leaves it out.
    simulated : the arithmetic runs densely; no method at work means False.
    """

    parameters: int
    prunable: int
    sparsity: float
    sparsity_all: float
    unit: str
    bytes_stored: int
    bytes_moved: int
    bytes_moved_limit: int
    bytes_blocks: int
    bytes_cache: int
    context: int
    simulated: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        state = "simulated, " if self.simulated else ""
        return (
            f"{self.sparsity:.1%} of {self.unit} removed ({self.sparsity_all:.1%} of all); "
            f"{self.bytes_stored:,} bytes stored; {state}{self.bytes_moved:,} bytes moved per "
            f"token, limit {self.bytes_moved_limit:,}"
        )


def bitmask_bytes(total: int, kept: int, width: int) -> int:
    """Least bytes to read of a matrix with zeros: kept values and one bit a weight.

    min(total * width, kept * width + ceil(total / 8)), ``width`` in bytes per weight. At fp16
    and sparsity 0.5 that is 9/16 of dense, not a half; 2:4 with two bits a kept weight is the
    same number.
    """
    return min(total * width, kept * width + -(-total // 8))


def footprint(
    model: nn.Module,
    applied: Applied | Sequence[Applied] | None = None,
    *,
    context: int = 0,
    sites: SiteMap | None = None,
) -> Footprint:
    """Count what a model stores and what decoding one token of one sequence reads.

    Bytes moved are the sum of: every weight once in its own dtype; of an embedding table only
    the row looked up, but all of it when it is tied to the head; of stacked experts only the
    share a token is routed to; and of the key-value cache (context + 1) / 2 positions, the mean
    over the tokens of a text of ``context`` tokens. Activations stay in the processor's caches.

    ``bytes_moved_limit`` takes from that the largest single saving: what the zeros in the
    weights allow (:func:`bitmask_bytes`, matrix by matrix), or what one of the methods at work
    states (``Applied.weight_bytes_saved``); savings of several methods are not added, for they
    may save the same bytes. Where a method reports attention pairs, their removed share of the
    cache's part goes too.

    Parameters
    ----------
    applied : the method or methods at work, in order; None counts the zeros that are there.
    context : tokens of the text decoded; 0 leaves the cache out.
    sites : of the model, where already known.

    Raises
    ------
    GossamerError
        On a negative context; UnsupportedModel if the sites of the model are not known.
    """
    if not isinstance(context, int) or context < 0:
        raise GossamerError(f"context is {context!r}; give a whole number of tokens, at least 0")
    at_work = [applied] if isinstance(applied, Applied) else list(applied or ())
    reports = [work.report() for work in at_work]
    sites = _present(sites or find_sites(model), model)
    active = _active_share(model, sites)
    parameters = sum(p.numel() for p in model.parameters())
    zeros = {site.name: _zeros(site, model) for site in sites.sites}
    prunable = sum(site.size for site in sites.sites)

    weights = _weight_bytes(model, sites, active)
    saved = sum(
        _bytes(site, model, active) - _limit(site, model, zeros[site.name], active)
        for site in sites.sites
    )
    for work, report in zip(at_work, reports, strict=True):
        saved = max(saved, _stated_saving(work, report, model, sites, active))
    cache = round(_cache_bytes_per_position(model) * (context + 1) / 2) if context else 0
    pairs = [report.sparsity for report in reports if report.unit == "attention pairs"]
    cache_limit = round(cache * (1.0 - max(pairs, default=0.0)))
    limit = round(weights - saved) + cache_limit
    simulated = any(work.simulated for work in at_work)

    if len(reports) == 1:
        sparsity, sparsity_all = reports[0].sparsity, reports[0].sparsity_all
        unit = reports[0].unit
    else:
        sparsity, unit = sum(zeros.values()) / max(1, prunable), "weights"
        sparsity_all = _all_zeros(model) / max(1, parameters)
    return Footprint(
        parameters=parameters,
        prunable=prunable,
        sparsity=sparsity,
        sparsity_all=sparsity_all,
        unit=unit,
        bytes_stored=_stored(model) + sum(_state_bytes(work) for work in at_work),
        bytes_moved=weights + cache if simulated or not at_work else limit,
        bytes_moved_limit=limit,
        bytes_blocks=round(sum(_bytes(site, model, active) for site in sites.sites)),
        bytes_cache=cache,
        context=context,
        simulated=simulated,
    )


def _present(sites: SiteMap, model: nn.Module) -> SiteMap:
    """The sites that are still matrices: a method may have put other modules in their place."""

    def there(site: Site) -> bool:
        stack = getattr(site.owner(model), site.parameter, None)
        return isinstance(stack, Tensor) and tuple(site.weight(model).shape) == site.shape

    return replace(sites, sites=tuple(site for site in sites.sites if there(site)))


def _active_share(model: nn.Module, sites: SiteMap) -> float:
    """Share of the experts that one token is routed to; 1 without stacked experts."""
    stacked = [site for site in sites.sites if site.expert is not None]
    if not stacked:
        return 1.0
    config: Any = model.config
    routed = getattr(config.get_text_config(), "num_experts_per_tok", None)
    experts = getattr(stacked[0].owner(model), stacked[0].parameter).shape[0]
    # Without a stated number of routed experts, all of them: an upper bound.
    return 1.0 if routed is None else min(1.0, routed / experts)


def _bytes(site: Site, model: nn.Module, active: float) -> float:
    share = 1.0 if site.expert is None else active
    return share * site.size * site.weight(model).element_size()


def _limit(site: Site, model: nn.Module, zeros: int, active: float) -> float:
    share = 1.0 if site.expert is None else active
    return share * bitmask_bytes(site.size, site.size - zeros, site.weight(model).element_size())


def _zeros(site: Site, model: nn.Module) -> int:
    return site.size - int(torch.count_nonzero(site.weight(model)))


def _all_zeros(model: nn.Module) -> int:
    return sum(p.numel() - int(torch.count_nonzero(p)) for p in model.parameters())


def _weight_bytes(model: nn.Module, sites: SiteMap, active: float) -> int:
    """Bytes of weights read per decoded token, dense."""
    stacks = {id(getattr(s.owner(model), s.parameter)) for s in sites.sites if s.expert is not None}
    total, seen, looked_up = 0.0, set[int](), 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                looked_up += parameter.shape[-1] * parameter.element_size()
            elif id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.nbytes * (active if id(parameter) in stacks else 1.0)
    return round(total) + looked_up


def _stated_saving(
    work: Applied, report: Report, model: nn.Module, sites: SiteMap, active: float
) -> float:
    """Bytes a method says a token need not read, scaled to the experts a token is routed to."""
    names = {row.name for row in report.rows}
    own = [site for site in sites.sites if site.name in names]
    whole = sum(_bytes(site, model, 1.0) for site in own)
    routed = sum(_bytes(site, model, active) for site in own)
    return work.weight_bytes_saved() * (routed / whole if whole else 1.0)


def _stored(model: nn.Module) -> int:
    """Bytes of the tensors a saved model holds; tied tensors are written once."""
    unique: dict[tuple[Any, ...], int] = {}
    plain = plain_tensors(model)
    for tensor in (model.state_dict() if plain is None else plain).values():
        if isinstance(tensor, Tensor):
            key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            unique[key] = tensor.nbytes
    return sum(unique.values())


def _state_bytes(work: Applied) -> int:
    return sum(tensor.nbytes for tensor in work.state().tensors.values())


def _cache_bytes_per_position(model: nn.Module) -> float:
    """Bytes of keys and values that one token adds, measured on a cache of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device_of(model))
    with evaluating(model):
        cache: Any = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    total = 0
    for layer in getattr(cache, "layers", ()):
        for tensor in (layer.keys, layer.values):
            total += tensor.nbytes if isinstance(tensor, Tensor) else 0
    return total / 2
