"""Analysis of embedded documents: what differs, what goes together, groups, and search.

Every finding carries a p-value, and one adjusted so that a share of at most q of the findings
with ``fdr`` <= q is expected to be false (Benjamini and Hochberg).
Shapes: N = documents, M = latents, C = kept latents.
"""

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans, SpectralClustering
from torch import Tensor

from gossamer.core import GossamerError, check_count
from gossamer.methods.features.embeddings.statistics import adjusted, enrichment, two_sided
from gossamer.methods.features.embeddings.store import Embeddings

__all__ = [
    "Association",
    "Clusters",
    "Difference",
    "Hit",
    "associations",
    "clusters",
    "differences",
    "retrieve",
    "weights_from_examples",
    "weights_from_words",
]


class Difference(NamedTuple):
    """A latent that is more common in one set of documents than in another.

    Parameters
    ----------
    first, second : share of the documents of each set in which it speaks.
    p, fdr : of Fisher's exact test, two-sided; see the module.
    """

    latent: int
    label: str
    first: float
    second: float
    p: float
    fdr: float

    @property
    def gap(self) -> float:
        """first - second."""
        return self.first - self.second


def differences(
    first: Embeddings,
    second: Embeddings,
    *,
    by: Literal["gap", "ratio"] = "gap",
    least: float = 0.01,
    most: float = 0.99,
) -> list[Difference]:
    """Latents that tell two sets of documents apart, the largest difference first.

    Parameters
    ----------
    by : order by the absolute difference of the shares, or by their ratio either way.
    least, most : latents that speak in a smaller or larger share of all documents are left out.

    Raises
    ------
    GossamerError
        If the sets are empty or of other latents.
    """
    if first.latents != second.latents or not len(first) or not len(second):
        raise GossamerError(
            f"sets of {len(first)} and {len(second)} documents over {first.latents} and "
            f"{second.latents} latents; give two of the same dictionary, not empty"
        )
    if by not in ("gap", "ratio"):
        raise GossamerError(f"by is {by!r}; give 'gap' or 'ratio'")
    counts = [np.asarray(part.present().sum(0)).ravel() for part in (first, second)]
    overall = (counts[0] + counts[1]) / (len(first) + len(second))
    at = np.nonzero((overall >= least) & (overall <= most) & (overall > 0))[0]
    yes, other = counts[0][at], counts[1][at]
    p = two_sided(yes, len(first), other, len(second))
    share, against = yes / len(first), other / len(second)
    if by == "gap":
        size = np.abs(share - against)
    else:
        # Half a document more on either side, so that absence has a finite ratio.
        odds = np.log((yes + 0.5) / (len(first) + 1)) - np.log((other + 0.5) / (len(second) + 1))
        size = np.abs(odds)
    fdr = adjusted(p)
    label = {**second.labels, **first.labels}
    order = np.argsort(-size, kind="stable")
    return [
        Difference(
            int(at[i]),
            label.get(int(at[i]), f"latent {at[i]}"),
            *(float(part[i]) for part in (share, against, p, fdr)),
        )
        for i in order
    ]


class Association(NamedTuple):
    """Two latents that speak in the same documents.

    Parameters
    ----------
    npmi : normalised pointwise mutual information, -1 to 1; 1: never one without the other.
    together : documents with both. p, fdr : of Fisher's exact test for more than chance.
    """

    first: int
    second: int
    labels: tuple[str, str]
    npmi: float
    together: int
    p: float
    fdr: float


def associations(
    documents: Embeddings,
    *,
    least: int = 5,
    most: float = 0.9,
    vectors: Tensor | None = None,
    alike: float = 0.5,
) -> list[Association]:
    """Pairs of latents that go together, the highest NPMI first.

    Pairs that never meet are left out. Two latents for one thing go together trivially: with
    ``vectors`` those are left out as well.

    Parameters
    ----------
    least : documents in which a latent speaks, at least. most : share of them, at most.
    vectors : (M, any), what latents stand for: embeddings of their labels, or their atoms.
    alike : largest cosine of the vectors of a pair that is kept.
    """
    check_count("least", least, 1)
    present, total = documents.present(), len(documents)
    counts = np.asarray(present.sum(0)).ravel()
    at = np.nonzero((counts >= least) & (counts <= most * total))[0]
    kept = present[:, at]
    pairs = (kept.T @ kept).tocoo()
    upper = pairs.row < pairs.col
    i, j, both = pairs.row[upper], pairs.col[upper], pairs.data[upper]
    tests = len(at) * (len(at) - 1) // 2
    if vectors is not None:
        unit = torch.nn.functional.normalize(vectors.double(), dim=1).numpy()[at]
        apart = (unit[i] * unit[j]).sum(1) <= alike
        i, j, both = i[apart], j[apart], both[apart]
    n_i, n_j = counts[at][i], counts[at][j]
    joint = np.log(both / total)
    with np.errstate(divide="ignore", invalid="ignore"):
        npmi = (joint - np.log(n_i / total) - np.log(n_j / total)) / -joint
    p = enrichment(both, n_i, n_j, total)
    fdr = adjusted(p, tests)
    order = np.lexsort((p, -npmi))
    return [
        Association(
            int(at[i[k]]),
            int(at[j[k]]),
            (documents.label(int(at[i[k]])), documents.label(int(at[j[k]]))),
            float(npmi[k]),
            int(both[k]),
            float(p[k]),
            float(fdr[k]),
        )
        for k in order
    ]


class Clusters(NamedTuple):
    """Groups of documents.

    Parameters
    ----------
    groups : int64 (N,). latents : those the grouping looked at.
    names : of each group, the latents that set it apart from all others, by FDR <= 0.05.
    """

    groups: Tensor
    latents: tuple[int, ...]
    names: tuple[tuple[Difference, ...], ...]


def clusters(
    documents: Embeddings,
    count: int,
    *,
    latents: Collection[int] | None = None,
    by: Literal["spectral", "k-means"] = "spectral",
    most: float = 0.99,
    top: int = 5,
    seed: int = 0,
) -> Clusters:
    """Group documents along the axis that some latents span.

    Parameters
    ----------
    count : of groups, at least 2.
    latents : the axis, such as those of :func:`weights_from_words`; None: all. Latents that speak
        in more than ``most`` of the documents, or in none, tell nothing and are left out.
    by : spectral clustering of Jaccard similarities, or k-means on rows of 0 and 1 of norm 1.
    top : latents that name a group, at most.
    """
    check_count("count", count, 2)
    if by not in ("spectral", "k-means"):
        raise GossamerError(f"by is {by!r}; give 'spectral' or 'k-means'")
    present = documents.present()
    share = np.asarray(present.mean(0)).ravel()
    wanted = np.arange(documents.latents) if latents is None else np.array(sorted(latents), int)
    at = wanted[(share[wanted] > 0) & (share[wanted] <= most)]
    if not len(at) or len(documents) < count:
        raise GossamerError(
            f"{len(documents)} documents and {len(at)} telling latents for {count} groups; give "
            "more, or other latents"
        )
    rows = present[:, at]
    size = np.asarray(rows.sum(1)).ravel()
    if by == "spectral":
        both = (rows @ rows.T).toarray()
        # A little for every pair keeps documents without any of the latents in one graph.
        alike = both / np.maximum(size[:, None] + size[None] - both, 1) + 1e-4
        found = SpectralClustering(count, affinity="precomputed", random_state=seed).fit(alike)
    else:
        unit = rows.multiply(1 / np.sqrt(np.maximum(size, 1))[:, None]).tocsr()
        found = KMeans(count, n_init="auto", random_state=seed).fit(unit)
    groups = torch.as_tensor(found.labels_).long()
    names = []
    for group in range(count):
        inside = groups == group
        if not bool(inside.any()) or bool(inside.all()):
            names.append(())
            continue
        ranked = differences(documents.rows(inside), documents.rows(~inside))
        names.append(tuple(d for d in ranked if d.fdr <= 0.05 and d.gap > 0)[:top])
    return Clusters(groups, tuple(at.tolist()), tuple(names))


class Hit(NamedTuple):
    """A document that a query found.

    Parameters
    ----------
    score : weighted sum of its latents. p, fdr : that documents whose latents are drawn
        independently of one another score as much.
    """

    document: int
    name: str
    score: float
    p: float
    fdr: float


def weights_from_words(documents: Embeddings, query: str) -> dict[int, float]:
    """Latents whose label shares words with the query: the share of the label's words, 0 to 1.

    A stand-in for a language model's judgement of labels, which gives weights as well.
    """
    asked = set(re.findall(r"\w+", query.lower()))
    made = {}
    for latent, label in documents.labels.items():
        words = re.findall(r"\w+", label.lower())
        if hits := sum(word in asked for word in words):
            made[latent] = hits / len(words)
    return made


def weights_from_examples(
    documents: Embeddings, wanted: Tensor, *, level: float = 0.05
) -> dict[int, float]:
    """Latents more common in documents marked as wanted than in the others, by their log-odds.

    Parameters
    ----------
    wanted : bool (N,). level : largest FDR of a latent that is used.
    """
    if wanted.shape != (len(documents),) or bool(wanted.all()) or not bool(wanted.any()):
        raise GossamerError("mark some of the documents as wanted, and not all of them")
    found = differences(documents.rows(wanted), documents.rows(~wanted), least=0.0, most=1.0)
    few = 0.5 / int(wanted.sum())
    return {
        d.latent: float(np.log((d.first + few) / (d.second + few)))
        for d in found
        if d.fdr <= level and d.gap > 0
    }


def retrieve(
    documents: Embeddings, weights: Mapping[int, float], *, draws: int = 200, seed: int = 0
) -> list[Hit]:
    """Documents that say most of what is asked, the best first.

    A latent's values are scaled to a largest one of 1.

    Parameters
    ----------
    weights : of latents; see :func:`weights_from_words` and :func:`weights_from_examples`.
    draws : shuffles of every latent's values over the documents, which the p-values come from.

    Raises
    ------
    GossamerError
        If no latent is asked for, or one that is not there.
    """
    check_count("draws", draws, 1)
    if not weights:
        raise GossamerError("the query names no latent; label the latents or give examples")
    at = np.array(sorted(weights), int)
    if at[0] < 0 or at[-1] >= documents.latents:
        bad = int(at[0] if at[0] < 0 else at[-1])
        raise GossamerError(f"the query names latent {bad}; there are {documents.latents}, from 0")
    values = documents.matrix()[:, at].toarray()
    values /= np.maximum(np.abs(values).max(0), 1e-30)
    values *= np.array([weights[i] for i in at.tolist()])
    score = values.sum(1)
    generator = np.random.default_rng(seed)
    null = np.sort(
        np.concatenate([generator.permuted(values, axis=0).sum(1) for _ in range(draws)])
    )
    # Sums in another order differ in the last bit; such scores are equal.
    above = len(null) - np.searchsorted(null, score - 1e-9)
    p = (1 + above) / (1 + len(null))
    fdr = adjusted(p)
    order = np.argsort(-score, kind="stable")
    return [
        Hit(int(i), documents.names[i], float(score[i]), float(p[i]), float(fdr[i])) for i in order
    ]
