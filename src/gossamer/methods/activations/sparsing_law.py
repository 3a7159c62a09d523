"""Sparsing Law: how many neurons a model can leave out before its perplexity grows by 1 %.

Counting exact zeros says nothing of SiLU models, and a fixed threshold says little across layers
and models. One error level for all layers, raised until the perplexity has grown by p %, gives a
number that can be compared between any two models: their PPL-p% sparsity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, fsum
from typing import Any, ClassVar

from torch import nn

from gossamer.core import Card, GossamerError, Stat, check_count
from gossamer.methods.activations.base import Gated
from gossamer.methods.activations.calibration import active_experts, token_loss
from gossamer.methods.activations.gates import Gate, Tap, input_taps
from gossamer.methods.activations.laws.rules import Rule, gates_by
from gossamer.methods.activations.levels import (
    DOWN_ROLES,
    LevelGates,
    PerplexityLevel,
    perplexity_level,
)
from gossamer.methods.activations.neurons import NEURONS, neuron_taps
from gossamer.models import Inputs, Progress, SiteMap, Tokens, as_tokens, find_sites

__all__ = ["ActivationSparsity", "SparsingLaw"]


@dataclass(frozen=True)
class ActivationSparsity:
    """How sparse a model's neurons are at a price in perplexity.

    Parameters
    ----------
    percent : growth of the perplexity that was searched for. level : that gives it.
    fitted : perplexity over dense perplexity on the text searched on. growth : on other text.
    sparsity : share of neurons removed on the other text, over all layers and tokens.
    shares : the same by gate.
    """

    percent: float
    level: float
    fitted: float
    growth: float
    sparsity: float
    shares: dict[str, float]

    @property
    def active(self) -> float:
        """The activation ratio, 1 - sparsity."""
        return 1.0 - self.sparsity


@dataclass(frozen=True, kw_only=True)
class SparsingLaw(Gated):
    """Gate neurons at the highest error level that lets perplexity grow by no more than p %.

    :meth:`apply` finds the gates on calibration text and puts them to work; :meth:`measure` says
    what they remove and cost on other text, which is the figure to quote. The laws of how that
    figure moves with training are in :mod:`gossamer.methods.activations.laws.fit`.

    Parameters
    ----------
    percent : growth of the perplexity, above 0; the paper's p.
    rule : ``cett`` bisects one error level of all layers; its baselines ``topk`` (the same count
        for every token and layer, by the activated gate), ``fat`` (one threshold on the activated
        gate), ``plain`` (one threshold on |a_j|), and the ablation ``unweighted`` (CETT's levels,
        neurons dropped in the order of |a_j|).
    tokens : most calibration tokens the perplexity is searched on; thresholds use all of them.

    Source: arXiv 2411.02335, section 3 and appendix.

    Departs from the paper: the search ends within 1 % of the growth asked for, or after 20
    evaluations; the text searched on is not the text reported on; every token but a short prefix
    is masked.
    """

    card: ClassVar[Card] = Card(
        title="Sparsing Law: Towards Large Language Models with Greater Activation Sparsity",
        system="sparsing_law",
        year=2024,
        arxiv="2411.02335",
        family="activations",
        when="inference",
        masks="dynamic",
        site="input of the down projection",
        score="|a_j| ||W_d[:, j]||",
        pattern="any neuron, per token",
        budget="growth of perplexity, as one error level for all layers",
        schedule="searched once",
        update="none",
        kernel="masked dense",
        departs="searched to 1 % of the growth; reported on other text; all tokens but a prefix",
    )
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.INPUT_QUANTILES})
    paper_dense: ClassVar[float | None] = 0.0
    exempt: ClassVar[dict[str, str]] = {
        "encoders": "perplexity is a causal language model's",
        "dense at sparsity 0": "its sparsity follows from a perplexity",
    }
    roles: ClassVar[tuple[str, ...]] = (*DOWN_ROLES, NEURONS)

    percent: float = 1.0
    rule: Rule = "cett"
    tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("rule", Rule)
        check_count("tokens", self.tokens, 2)
        if not isinstance(self.percent, int | float) or not self.percent > 0:
            raise GossamerError(f"percent is {self.percent!r}; give a growth of perplexity above 0")

    def find(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> PerplexityLevel:
        """Search the level; the model is as before.

        Parameters
        ----------
        data : calibration text or tokens, see :func:`gossamer.models.as_tokens`.

        Raises
        ------
        GossamerError
            If the data are no tokens, or the model has no language-model head.
        """
        if isinstance(data, Inputs):
            raise GossamerError("perplexity needs tokens; the data holds ready-made inputs")
        tokens, sites = as_tokens(data, model), find_sites(model)
        if not sites.head:
            raise GossamerError(
                f"{type(model).__name__} has no language-model head, so it has no perplexity; "
                "load the model with AutoModelForCausalLM"
            )
        gates_at = gates_by(
            self.rule, model, sites, tokens, batch_size=batch_size, progress=progress
        )
        search = tokens.slice(max(1, self.tokens // tokens.length))
        return perplexity_level(
            model,
            search,
            _told(gates_at, progress),
            percent=self.percent,
            dense_prefix=self.dense[0],
        )

    def measure(
        self, model: nn.Module, data: Any = None, other: Any = None, **options: Any
    ) -> ActivationSparsity:
        """PPL-p% sparsity: found on one text, reported on another; the model is as before.

        Parameters
        ----------
        data : calibration text or tokens. other : text or tokens to report on.
        options : of :meth:`find`.
        """
        found = self.find(model, data, **options)
        tokens, sites = as_tokens(other, model), find_sites(model)
        dense, _ = token_loss(model, sites, tokens)
        loss, shares = token_loss(model, sites, tokens, found.gates, self.dense[0])
        size = fsum(gate.size for gate in found.gates)
        return ActivationSparsity(
            percent=self.percent,
            level=found.level,
            fitted=found.ratio,
            growth=exp(min(loss - dense, 700.0)),
            sparsity=fsum(shares[g.name] * g.size for g in found.gates) / size,
            shares=shares,
        )

    def _places(self, model: nn.Module, sites: SiteMap, block: int) -> tuple[Tap, ...]:
        active, inside = active_experts(model, sites), sites.in_block(block)
        if self.rule not in ("topk", "fat"):
            return input_taps(inside, DOWN_ROLES, active)
        return neuron_taps(model, inside, active)

    def _plan(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        batch_size: int,
        progress: Progress | None,
    ) -> list[Gate]:
        found = self.find(model, data, batch_size=batch_size, progress=progress)
        return LevelGates(
            found.gates,
            f"level found: {found.level:.4f}, where the perplexity on the text searched grows by "
            f"{found.growth - 1:.2%}",
        )

    def _facts(self, gates: list[Gate]) -> tuple[str, ...]:
        return (gates.fact,) if isinstance(gates, LevelGates) else ()


def _told(
    gates_at: Callable[[float], list[Gate]], progress: Progress | None
) -> Callable[[float], list[Gate]]:
    """The same, with the levels tried shown as progress."""
    tried = 0

    def gates(level: float) -> list[Gate]:
        nonlocal tried
        tried += 1
        if progress is not None:
            progress(min(tried, 22), 22, f"perplexity at level {level:.4f}")
        return gates_at(level)

    return gates if progress is not None else gates_at
