"""Embed: run a model over documents, encode what a module says, and pool over tokens.

Shapes: N = documents, T = tokens, R = rows, M = latents.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor, nn

from gossamer.core import GossamerError, SparseRows, check_count, unknown
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.embeddings.store import Embeddings
from gossamer.methods.features.source import ActivationSource
from gossamer.models import Tokens

__all__ = ["POOLINGS", "Pooling", "embed", "token_labels"]

Pooling = Literal["max", "mean", "top"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def _kept(data: Tokens, exclude: Sequence[int]) -> Tensor:
    """Tokens (N, T) that count."""
    real = data.attention_mask
    return real & ~torch.isin(data.input_ids, torch.tensor(list(exclude), dtype=torch.int64))


@torch.no_grad()
def _coded(
    model: nn.Module, dictionary: Dictionary, hook: str, data: Tokens, batch_size: int
) -> tuple[csr_matrix, np.ndarray, np.ndarray]:
    """Codes (R, M) of all real tokens, and the document and token of every row."""
    source = ActivationSource(model, hook, data, windows=batch_size, sink_multiple=None)
    limit = dictionary.metadata.get("sink_norm")
    parts = []
    for rows in source.one_pass():
        codes = dictionary.encode(rows).to_csr()
        assert codes.indptr is not None
        values = codes.values.double()
        if limit is not None:
            # Rows it was not trained on say nothing.
            sink = torch.linalg.vector_norm(rows.float(), dim=1) > limit
            values = values * ~torch.repeat_interleave(sink, codes.indptr.diff())
        made = (values.numpy(), codes.indices.numpy(), codes.indptr.numpy())
        parts.append(csr_matrix(made, shape=codes.shape))
    where = data.attention_mask.nonzero().numpy()
    stacked = csr_matrix(vstack(parts, format="csr"))
    stacked.eliminate_zeros()
    return stacked, where[:, 0], data.input_ids[data.attention_mask].numpy()


def embed(
    model: nn.Module,
    dictionary: Dictionary,
    hook: str,
    data: Tokens,
    *,
    pooling: Pooling = "max",
    share: float = 0.1,
    exclude: Sequence[int] = (),
    names: Sequence[str] = (),
    batch_size: int = 8,
) -> Embeddings:
    """Every document, a window of ``data``, as one sparse vector.

    Parameters
    ----------
    dictionary : of the module at ``hook``.
    pooling : over a document's tokens: ``max`` (the largest value), ``mean`` (of the values that
        are not zero) or ``top`` (the mean of the largest ``share`` of its tokens). Long documents
        fill a maximum with chance; ``top`` does not saturate.
    exclude : token ids that do not count, such as special tokens.
    names : of the documents.

    Raises
    ------
    GossamerError
        For an unknown pooling, or a dictionary of another width.
    """
    if pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    if not 0 < share <= 1:
        raise GossamerError(f"share is {share!r}; give a share of tokens above 0, at most 1")
    check_count("batch_size", batch_size, 1)
    codes, document, ids = _coded(model, dictionary, hook, data, batch_size)
    counts = _kept(data, exclude).sum(1).numpy()
    entries = codes.tocoo()
    real = ~np.isin(ids[entries.row], list(exclude))
    at = document[entries.row[real]].astype(np.int64)
    cells = at * dictionary.d_sae + entries.col[real]
    pooled = _pooled(cells, entries.data[real], pooling, share, counts, dictionary.d_sae)
    keys, values = pooled
    row, column = np.divmod(keys, dictionary.d_sae)
    indptr = np.concatenate([[0], np.bincount(row, minlength=len(data)).cumsum()])
    sparse = SparseRows(
        torch.from_numpy(values).float(),
        torch.from_numpy(column).long(),
        (len(data), dictionary.d_sae),
        torch.from_numpy(indptr).long(),
    )
    facts: dict[str, Any] = {"hook": hook, "pooling": pooling, "excluded": list(exclude)}
    return Embeddings(
        sparse, tuple(names), metadata=facts | ({"share": share} if pooling == "top" else {})
    )


def _pooled(
    cells: np.ndarray,
    values: np.ndarray,
    pooling: Pooling,
    share: float,
    counts: np.ndarray,
    latents: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct cells in order, and the value of each."""
    # Largest size first within a cell, so that the first entries are those that count.
    order = np.lexsort((-np.abs(values), cells))
    cells, values = cells[order], values[order]
    keys, first, many = np.unique(cells, return_index=True, return_counts=True)
    if pooling == "max":
        return keys, values[first]
    if pooling == "mean":
        return keys, np.add.reduceat(values, first) / many if len(keys) else values
    quota = np.ceil(share * counts[keys // latents]).astype(np.int64)
    place = np.arange(len(values)) - np.repeat(first, many)
    counted = np.where(place < np.repeat(quota, many), values, 0.0)
    return keys, np.add.reduceat(counted, first) / quota if len(keys) else values


def token_labels(
    model: nn.Module,
    dictionary: Dictionary,
    hook: str,
    data: Tokens,
    words: Sequence[str],
    *,
    count: int = 4,
    batch_size: int = 8,
) -> dict[int, str]:
    """Latents named by the tokens on which they speak most, loudest first.

    A stand-in for a language model's explanations that needs none; those of one's own go into
    :meth:`Embeddings.labelled` as well. A token counts from a tenth of the loudest one's sum.

    Parameters
    ----------
    words : of the vocabulary, by token id. count : most tokens of a label.
    """
    codes, _, ids = _coded(model, dictionary, hook, data, batch_size)
    entries = codes.tocoo()
    weights = csr_matrix(
        (np.abs(entries.data), (entries.col, ids[entries.row])),
        shape=(dictionary.d_sae, len(words)),
    )
    labels = {}
    for latent in range(dictionary.d_sae):
        row = weights[[latent]]
        if row.nnz:
            loud = np.argsort(-row.data, kind="stable")[:count]
            kept = [i for i in loud if row.data[i] >= 0.1 * row.data[loud[0]]]
            labels[latent] = " ".join(str(words[int(row.indices[i])]) for i in kept)
    return labels
