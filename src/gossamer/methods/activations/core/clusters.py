"""Neuron sets learned offline: sentences with alike cores share one set per layer.

Shapes: N sentences, E experts, F neurons, K clusters.
"""

import warnings
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.activations.core.memory import Clusters, Memory, Plan
from gossamer.methods.activations.core.neurons import chord_elbow, sentence_core

__all__ = ["Corpus", "cluster"]

_FEWEST, _MOST = 4, 16


class Corpus:
    """The sentence cores of a corpus, layer by layer; filled one memory at a time."""

    def __init__(self) -> None:
        self.cores: dict[str, list[Tensor]] = {}

    def add(self, memory: Memory) -> None:
        """Take in the cores of a batch of sentences."""
        for name in memory.plan.layers:
            self.cores.setdefault(name, []).append(memory.sentence(name).cpu())

    def stacked(self) -> dict[str, Tensor]:
        """Layer name to bool (N, E, F)."""
        return {name: torch.cat(parts) for name, parts in self.cores.items()}


def _means(points: Tensor, count: int, seed: int) -> Any:
    with warnings.catch_warnings():
        # Fewer distinct sentences than clusters: equal centroids do no harm.
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"n_init": 4, "random_state": seed}
        return KMeans(count, **options).fit(points.numpy())


def cluster(plan: Plan, layer: str, corpus: Corpus, count: int | None, seed: int) -> Clusters:
    """Group sentences by their core in one layer; a group's set is its most frequent neurons.

    Parameters
    ----------
    layer : name of the layer that tells the cluster.
    count : K; None takes the bend of the curve of within-cluster distances over 4 to 16 clusters.

    Raises
    ------
    GossamerError
        If the corpus has fewer sentences than clusters.
    """
    cores = corpus.stacked()
    points = cores[layer].flatten(1).float()
    least = _FEWEST if count is None else count
    if len(points) < least:
        raise GossamerError(
            f"{len(points)} sentences cannot form {least} clusters; give more data or set clusters"
        )
    if count is None:
        tries = [_means(points, k, seed) for k in range(_FEWEST, min(_MOST, len(points)) + 1)]
        means = tries[chord_elbow(torch.tensor([float(m.inertia_) for m in tries]))]
    else:
        means = _means(points, count, seed)
    labels = torch.from_numpy(means.labels_).long()
    total = int(labels.max()) + 1
    sets = {name: torch.stack([_frequent(plan, name, own[labels == k]) for k in range(total)])
            for name, own in cores.items()}  # fmt: skip
    centroids = torch.from_numpy(means.cluster_centers_[:total]).float()
    return Clusters(layer, centroids, sets)


def _frequent(plan: Plan, name: str, cores: Tensor) -> Tensor:
    """The neurons in most of the (n, E, F) cores: bool (E, F)."""
    votes = cores.float().sum(0)
    return sentence_core(votes, torch.zeros_like(votes), plan.norms[name].cpu(), plan.keep[name])
