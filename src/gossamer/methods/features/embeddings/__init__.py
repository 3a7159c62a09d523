"""Documents as sparse vectors of named latents: store, compare, relate, group and find them."""

from gossamer.methods.features.embeddings.analysis import (
    Association,
    Clusters,
    Difference,
    Hit,
    associations,
    clusters,
    differences,
    retrieve,
    weights_from_examples,
    weights_from_words,
)
from gossamer.methods.features.embeddings.embed import POOLINGS, embed, token_labels
from gossamer.methods.features.embeddings.statistics import adjusted
from gossamer.methods.features.embeddings.store import Embeddings

__all__ = [
    "POOLINGS",
    "Association",
    "Clusters",
    "Difference",
    "Embeddings",
    "Hit",
    "adjusted",
    "associations",
    "clusters",
    "differences",
    "embed",
    "retrieve",
    "token_labels",
    "weights_from_examples",
    "weights_from_words",
]
