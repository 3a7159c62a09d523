"""What is known of the prompts behind one cache: their votes, their cores, their small matrices.

Nothing here is shared between prompts: a memory belongs to a cache, so prompts may be read in
any order, in batches, and their answers continued side by side.
Shapes: B rows, E experts, F neurons, K clusters.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.methods.activations.core.layers import Feedforward, Slice, gather
from gossamer.methods.activations.core.neurons import Ranking, Tally, contains, sentence_core

__all__ = ["Clusters", "Drift", "Memory", "Mode", "Plan"]

Mode = Literal["off", "prompt", "scored", "decode", "probe", "listen"]


@dataclass(frozen=True, eq=False)
class Clusters:
    """Neuron sets learned from a corpus, and how to tell which one a prompt belongs to.

    Parameters
    ----------
    layer : name of the layer whose sentence core tells the cluster.
    centroids : (K, E * F) float32, means of the sentence cores of each cluster.
    cores : layer name to bool (K, E, F), the cluster's most frequent neurons.
    """

    layer: str
    centroids: Tensor
    cores: dict[str, Tensor]

    def label(self, core: Tensor) -> Tensor:
        """Nearest centroid of each row's core, (B, E, F) to int64 (B,)."""
        if len(self.centroids) == 1:
            return torch.zeros(len(core), dtype=torch.int64, device=core.device)
        return torch.cdist(core.flatten(1).float(), self.centroids.to(core.device)).argmin(1)


@dataclass(frozen=True)
class Drift:
    """When a core is chosen anew.

    Parameters
    ----------
    threshold : a probed token must name at least this share of what the prompt's tokens named
        inside the core. probe : decoded tokens from one probe to the next.
    window : tokens listened to for the new choice, the probe included; at most ``probe``.
    """

    threshold: float
    probe: int
    window: int


@dataclass(frozen=True, eq=False)
class Plan:
    """How cores are chosen: what all memories of a method share.

    Parameters
    ----------
    layers : by name. norms : name to (E, F). keep : neurons kept, by name.
    """

    layers: dict[str, Feedforward]
    norms: dict[str, Tensor]
    keep: dict[str, int]
    ranking: Ranking
    alpha: float
    clusters: Clusters | None = None
    drift: Drift | None = None


@dataclass(eq=False)
class Memory:
    """The state of one batch of prompts.

    Attributes
    ----------
    cores : name to bool (B, E, F). slices : name to the gathered matrices.
    listening : (B,) bool, rows whose core has drifted and whose tokens vote for a new one.
    selections : choices made so far, the prompt's own included.
    """

    plan: Plan
    rows: int
    device: torch.device
    tallies: dict[str, Tally] = field(default_factory=dict)
    cores: dict[str, Tensor] = field(default_factory=dict)
    slices: dict[str, tuple[Slice, ...] | None] = field(default_factory=dict)
    stale: bool = True
    selections: int = 0
    step: int = 0
    heard: int = 0

    def __post_init__(self) -> None:
        self.fixed = torch.zeros(self.rows, device=self.device)
        self.listening = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        self.reset()

    def reset(self) -> None:
        """Forget all votes."""
        for name, layer in self.plan.layers.items():
            self.tallies[name] = Tally.empty(self.rows, layer.experts, layer.neurons, self.device)

    # -- choosing ------------------------------------------------------------------------------

    def sentence(self, name: str) -> Tensor:
        """The core that a layer's votes give, bool (B, E, F)."""
        tally, norm = self.tallies[name], self.plan.norms[name].to(self.device)
        norm = norm.expand_as(tally.votes)
        return sentence_core(tally.votes, tally.strength, norm, self.plan.keep[name])

    def choice(self, name: str) -> Tensor:
        """The core to use: the votes' own, or that of the cluster they point to."""
        clusters = self.plan.clusters
        if clusters is None:
            return self.sentence(name)
        return clusters.cores[name].to(self.device)[clusters.label(self.sentence(clusters.layer))]

    def choose(self, model: nn.Module, rows: Tensor | None = None) -> None:
        """Fix the cores (of some rows) and gather the weights of their union."""
        inside = []
        for name, layer in self.plan.layers.items():
            core = self.choice(name)
            if rows is not None:
                core = torch.where(rows[:, None, None], core, self.cores[name])
            self.cores[name] = core
            self.slices[name] = gather(model, layer, core)
            inside.append(contains(self.tallies[name].votes.flatten(1), core.flatten(1)))
        share = torch.stack(inside).mean(0)
        self.fixed = share if rows is None else torch.where(rows, share, self.fixed)
        if rows is None:
            self.stale, self.step = False, 0
        self.selections += 1

    # -- decoding ------------------------------------------------------------------------------

    def next_mode(self, model: nn.Module) -> Mode:
        """What the coming token is decoded with; called once before it."""
        if self.stale:
            self.choose(model)
        drift = self.plan.drift
        if drift is None:
            return "decode"
        self.step += 1
        # Counted from the prompt for all rows alike, so that none depends on its neighbours.
        if self.step % drift.probe == 0:
            self.reset()
            return "probe"
        return "listen" if bool(self.listening.any()) else "decode"

    def after(self, mode: Mode, model: nn.Module) -> None:
        """Called after a decoded token: look at a probe, or end a time of listening."""
        drift = self.plan.drift
        if drift is None:
            return
        if mode == "probe":
            shares = [
                contains(self.tallies[name].votes.flatten(1), self.cores[name].flatten(1))
                for name in self.plan.layers
            ]
            self.listening = torch.stack(shares).mean(0) < drift.threshold * self.fixed
            # The probe is the first token the new choice hears.
            self.heard = 1
        elif mode == "listen":
            self.heard += 1
        if bool(self.listening.any()) and self.heard >= drift.window:
            self.choose(model, self.listening)
            self.listening = torch.zeros_like(self.listening)
