"""CoreInfer: the neurons that fire most over the prompt suffice for the answer.

Which neurons a text needs changes little from one token to the next, so they are chosen once
per prompt, gathered into small matrices, and used for the whole answer: no predictor per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count
from gossamer.methods.activations.core.applied import (
    CoreModel,
    blocks_between,
    make_plan,
    restore_clusters,
)
from gossamer.methods.activations.core.clusters import Corpus, cluster
from gossamer.methods.activations.core.memory import Clusters, Drift, Plan
from gossamer.methods.activations.core.session import Session
from gossamer.models import Progress, SiteMap, Tokens, as_tokens, find_sites

__all__ = ["CoreInfer"]

Guidance = Literal["stability", "similarity"]
Score = Literal["magnitude", "contribution", "positive"]
_ALPHA: dict[str, float] = {"stability": 0.2, "similarity": 0.4}
_TELLING = 25 / 32
"""Depth of the layer whose core tells the cluster: layer 25 of the paper's 32."""


@dataclass(frozen=True, kw_only=True)
class CoreInfer(Method):
    """Decode each prompt with the feed-forward neurons that its own tokens use most.

    Every prompt token names its strongest neurons; the neurons named by most tokens are the
    prompt's core. Rows of W_gate and W_up and columns of W_down outside it are not read while
    the answer is decoded. A pass of several tokens is a prompt (dense; its votes are added to
    those of earlier passes on the same cache, so a prompt may come in chunks and a dialogue in
    turns); a pass of one token is decoding. In a batch every row keeps its own core and the
    union of them is gathered, so an answer does not depend on its neighbours.

    Parameters
    ----------
    sparsity : share of the neurons of each layer not used in decoding, 1 - the paper's beta.
    guidance : ``stability`` uses the prompt's own core; ``similarity`` (for short prompts) the
        most frequent neurons of the nearest of some clusters learned from ``data``.
    score : what a token's neurons are ranked by: ``magnitude`` |a_j|, ``contribution`` |a_j| times
        the norm of W_down[:, j], or ``positive``, the official rule a_j > 0 only.
    alpha : a token names alpha times the mean number of positive activations; None: 0.2 for
        stability, 0.4 for similarity, as in the official code.
    layers : from and to which share of the depth blocks take part; the others stay dense.
    clusters : for ``similarity``; None takes the elbow over 4 to 16.
    drift : None, or 0 < drift <= 1: choose anew when a probed token names less than this share
        of what the prompt's tokens named inside the core.
    probe : decoded tokens from one (dense) probe to the next, with ``drift``.
    window : tokens decoded densely while a new core is chosen, the probe included; at most
        ``probe``.
    prompt : real tokens at the start of a text scored in one pass that count as its prompt.
    cluster_seed : of the clusters' starting points.

    Source: arXiv 2410.18311, sections 3 and 4.

    Departs from the paper: |a_j| ranks by default, because gated layers also write through
    large negative a_j; ties in votes go to the larger sum of |a_j|; states belong to caches, so
    batches and several prompts at once work; drift is watched on request; stacked experts choose
    per expert. The similarity variant's sentences are the windows of the data.
    """

    card: ClassVar[Card] = Card(
        title="CoreInfer: Accelerating Large Language Model Inference with "
        "Semantics-Inspired Adaptive Sparse Activation",
        system="coreinfer",
        year=2024,
        arxiv="2410.18311",
        family="activations",
        when="inference",
        masks="dynamic",
        site="feed-forward neurons of the middle blocks, while decoding",
        score="number of prompt tokens that name the neuron among their strongest",
        pattern="whole neurons, one set per prompt",
        budget="sparsity of each layer's neurons",
        schedule="once per prompt; anew on drift",
        update="none",
        kernel="gathered dense matrices",
        departs="ranks |a_j|; ties by strength; a core per row of a batch; drift option",
    )
    exempt: ClassVar[Mapping[str, str]] = {
        "encoders": "a core serves the decoding after a prompt, and encoders decode nothing",
        "reads data": "guided by stability it reads only the prompt",
    }
    example: ClassVar[Mapping[str, Any]] = {"prompt": 8}

    sparsity: float = 0.6
    guidance: Guidance = "stability"
    score: Score = "magnitude"
    alpha: float | None = None
    layers: tuple[float, float] = (6 / 32, 27 / 32)
    clusters: int | None = None
    drift: float | None = None
    probe: int = 16
    window: int = 16
    prompt: int = 64
    cluster_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("guidance", get_args(Guidance)), ("score", get_args(Score))):
            if getattr(self, name) not in known:
                raise GossamerError(
                    f"{name} is {getattr(self, name)!r}; choose from {', '.join(known)}"
                )
        for name in ("alpha", "drift"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise GossamerError(f"{name} is {value!r}; it is a share, so 0 < {name} <= 1")
        if len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1] <= 1:
            raise GossamerError(
                f"layers is {self.layers!r}; give two shares of the depth, 0 <= from < to <= 1"
            )
        for name, least in (("probe", 1), ("window", 1), ("prompt", 1)):
            check_count(name, getattr(self, name), least)
        if self.window > self.probe:
            raise GossamerError(
                f"window is {self.window}, longer than the {self.probe} tokens between probes; "
                "raise probe or lower window"
            )
        if self.clusters is not None:
            check_count("clusters", self.clusters, 1)
        check_count("cluster_seed", self.cluster_seed, 0)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> CoreModel:
        """Put the selection to work; learn clusters first if similarity guides it.

        Parameters
        ----------
        model : a decoder whose sites are known.
        data : the corpus for clusters, see :func:`gossamer.models.as_tokens`: one window is one
            sentence. Not read for ``stability``.
        """
        sites = find_sites(model)
        plan = self._plan(model, sites)
        if self.guidance == "similarity":
            tokens = as_tokens(data, model, length=128, samples=256)
            learned = self._learn(model, sites, plan, tokens, batch_size, progress)
            plan = replace(plan, clusters=learned)
        return CoreModel(self, model, sites, plan, self.prompt)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> CoreModel:
        """Put the method, and stored clusters, to work on a loaded model."""
        sites = find_sites(model)
        plan = self._plan(model, sites)
        plan = replace(plan, clusters=restore_clusters(plan, meta, tensors))
        return CoreModel(self, model, sites, plan, self.prompt)

    def _plan(self, model: nn.Module, sites: SiteMap) -> Plan:
        drift = None if self.drift is None else Drift(self.drift, self.probe, self.window)
        alpha = _ALPHA[self.guidance] if self.alpha is None else self.alpha
        blocks = blocks_between(len(sites.blocks), self.layers)
        return make_plan(model, sites, blocks, self.sparsity, self.score, alpha, drift)

    def _learn(
        self,
        model: nn.Module,
        sites: SiteMap,
        plan: Plan,
        tokens: Tokens,
        batch_size: int,
        progress: Progress | None,
    ) -> Clusters:
        """Read the corpus densely and cluster the cores of its sentences."""
        corpus = Corpus()
        session = Session(model, sites.base, plan, self.prompt)
        try:
            session.attach()
            session.read(tokens, corpus.add, batch_size, progress)
        finally:
            session.remove()
        # The last layer that takes part and is not deeper than the telling depth.
        early = [n for n, own in plan.layers.items() if own.block <= _TELLING * len(sites.blocks)]
        telling = (early or list(plan.layers))[-1]
        return cluster(plan, telling, corpus, self.clusters, self.cluster_seed)
