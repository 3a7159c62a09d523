"""MInference: every head keeps one pattern, found once; where it lies is found in every prompt.

Heads read long prompts in one of three ways: first and latest keys (A-shape), whole columns and
whole diagonals (vertical-slash), or scattered blocks (block-sparse). Which way, and how many,
hardly depends on the prompt and is searched for offline. Which columns, diagonals or blocks does,
and is estimated online from the last queries or from block means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.attention.applied import SparseAttention
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.head_search import (
    PAPER,
    Head,
    HeadSearch,
    Online,
    candidates,
    read_heads,
    retrieval_prompt,
    write_heads,
)
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import walk
from gossamer.methods.attention.selector import Selector
from gossamer.models import Progress, State, Tokens, as_tokens, context_length, find_sites

__all__ = ["MInference"]

Layers = tuple[tuple[Head, ...], ...]


@dataclass(frozen=True)
class HeadSelector(Selector):
    """Finds the place of every head's pattern.

    Attributes
    ----------
    layers : patterns of every layer: one per query head, one per key-value head, or one for all.
    block_size, last_queries, sink, local : as in :class:`MInference`.
    """

    layers: Layers
    block_size: int
    last_queries: int
    sink: int
    local: int

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        online = Online(call, layout, self.block_size, self.last_queries, self.sink, self.local)
        return online.index(self.of(layer, call.groups[0]))

    def of(self, layer: int, shared: int) -> Sequence[Sequence[Head]]:
        """Patterns that the heads of every key-value head name.

        Raises
        ------
        GossamerError
            If the patterns were made for another number of layers or heads.
        """
        heads = self.layers[layer] if layer < len(self.layers) else ()
        if len(heads) == 1:
            return [heads] * shared
        if not heads or len(heads) % shared:
            raise GossamerError(
                f"the patterns are of {len(self.layers)} layers, {len(heads)} heads in this one; "
                f"layer {layer} of the model has {shared} key-value heads; search on this model"
            )
        each = len(heads) // shared
        return [heads[at : at + each] for at in range(0, len(heads), each)]

    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int] | None:
        if all(head.kind == "dense" for head in self.layers[layer]):
            reach = length if own is None else own
            total = sum(min(at + 1, reach) for at in range(length))
            return total, total
        return None

    def state(self) -> State:
        layers = [[list(head) for head in layer] for layer in self.layers]
        return State(
            {
                "layers": layers,
                "block_size": self.block_size,
                "last_queries": self.last_queries,
                "sink": self.sink,
                "local": self.local,
            }
        )

    def notes(self) -> tuple[str, ...]:
        kinds = [head.kind for layer in self.layers for head in layer]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        note = f"patterns of heads: {counted}; decoding is full"
        sizes = {head._replace(score=1.0) for layer in self.layers for head in layer}
        if sizes <= set(PAPER):
            return note, "their counts suit prompts of 30,000 tokens; give a sparsity for shorter"
        return (note,)

    def save_heads(self, path: str, heads: int) -> None:
        """Write the patterns as a file MInference reads.

        Parameters
        ----------
        heads : query heads of a layer; those that share keys get the same pattern.
        """
        write_heads(path, self.layers, heads, self.block_size)


@dataclass(frozen=True, kw_only=True)
class MInference(AttentionMethod):
    """Give every head the pattern that serves it best, and find its place in every prompt.

    ``apply`` searches: one prompt runs with full attention while every layer tries the candidates
    on its own queries and keys. What it finds is saved with the model; ``heads`` takes it from a
    file instead. ``applied.selector.save_heads(path, heads)`` writes such a file.

    Parameters
    ----------
    sparsity : share of the causal pairs every head gives up at ``length`` tokens, at least; a head
        takes the candidate of most attention mass within it. None takes the paper's candidates
        (100 first and 800 latest keys; 30 columns and 800 diagonals; ...), made for prompts of
        30,000 tokens and more. 0 removes nothing.
    heads : a file in MInference's format to take the patterns from, instead of searching.
    block_size : queries and keys of a block.
    last_queries : queries whose attention stands for the whole prompt's.
    sink, local : first keys that columns, and nearest distances that diagonals, always hold.

    Data are the prompt to search on, its first row up to ``length``; without any, a made-up
    retrieval prompt of random tokens. Decoding is full; combine with a method for it:
    ``MInference() + Quest()``.

    Source: arXiv:2407.02490, Section 3 and Algorithms 1 to 3.
    Departs from the paper: one pattern per key-value head, estimated from the mean attention of
    the heads that share it; where a file gives them different patterns, all are read. Within 0.01
    of the most mass the cheaper kind wins. With a sparsity, candidates have sizes for the length
    at hand. The mass of the v1 search is measured on 256 rows of the prompt.

    Examples
    --------
    >>> MInference(sparsity=0.75).block_size
    64
    """

    card: ClassVar = Card(
        title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse "
        "Attention",
        system="minference",
        year=2024,
        arxiv="2407.02490",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores of prompts",
        score="attention of the last queries by key and by distance; block means",
        pattern="per head: A-shape, columns and diagonals, or blocks",
        budget="per head: the candidate of most attention mass",
        schedule="kind searched once, place found at every prefill call",
        kernel="block-sparse attention with single columns",
        departs="one pattern per key-value head, estimated from the mean of its heads; near ties "
        "go to the cheaper kind; candidates sized to the length where a sparsity is given",
    )
    phases: ClassVar = frozenset({"prefill"})
    full: ClassVar = {"sparsity": 0.0}
    example: ClassVar = {
        "sparsity": 0.5,
        "block_size": 4,
        "last_queries": 8,
        "sink": 1,
        "local": 4,
    }
    peeks: ClassVar = "columns and diagonals of all queries are those that the last queries read"
    chunked: ClassVar = "places are estimated from the last queries of each chunk"
    exempt: ClassVar = {
        "exact sparsity": "patterns are whole columns, diagonals and blocks; the sparsity is a "
        "limit for every head",
        "encoders": "the last queries of a decoder see all keys; an encoder has no last query",
    }

    sparsity: float | None = None
    heads: str | None = None
    block_size: int = 64
    last_queries: int = 64
    sink: int = 30
    local: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None and self.sparsity is not None:
            raise GossamerError(
                f"sparsity {self.sparsity} and heads {self.heads!r} both fix the patterns; give one"
            )
        for name, least in (("block_size", 1), ("last_queries", 1), ("sink", 0), ("local", 1)):
            check_count(name, getattr(self, name), least)

    def plan(self, model: nn.Module, data: Any, length: int) -> HeadSelector:
        return self.planned(model, data, length, None)

    def planned(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> HeadSelector:
        layers = len(find_sites(model).attentions)
        if self.heads is not None:
            config: Any = model.config
            found = read_heads(self.heads, config.num_attention_heads, self.block_size)
            if len(found) != layers:
                raise GossamerError(
                    f"{self.heads} holds {len(found)} layers, the model has {layers}; search on "
                    "this model by leaving heads out"
                )
            return self._selector(tuple(tuple(layer) for layer in found))
        if self.sparsity == 0.0:
            return self._selector(((Head("dense", 0, 0),),) * layers)
        return self._selector(self._search(model, data, length, progress))

    def _search(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> Layers:
        """The best candidate of every key-value head of every layer, on one prompt."""
        config: Any = model.config
        if data is None:
            limit = context_length(model) or length
            tokens = retrieval_prompt(config.get_text_config().vocab_size, min(length, limit))
        else:
            tokens = as_tokens(data, model)
            rows = tokens.attention_mask[0, :length]
            # Padding would count as rows that read nothing.
            tokens = Tokens.from_ids(tokens.input_ids[:1, :length][:, rows])
        search = HeadSearch(
            candidates(self.sparsity, tokens.length, self.block_size),
            1.0 if self.sparsity is None else 1.0 - self.sparsity,
            self.block_size,
            self.last_queries,
            self.sink,
            self.local,
            layers=len(find_sites(model).attentions),
            progress=progress,
        )
        plain = replace(self, backend="auto", dense_layers=0, min_length=0)
        with SparseAttention(plain, model, search, length):
            walk(model, tokens)
        return tuple(search.found[layer] for layer in sorted(search.found))

    def _selector(self, layers: Layers) -> HeadSelector:
        return HeadSelector(layers, self.block_size, self.last_queries, self.sink, self.local)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HeadSelector:
        layers = tuple(tuple(Head(*head) for head in layer) for layer in meta["layers"])
        return HeadSelector(
            layers, meta["block_size"], meta["last_queries"], meta["sink"], meta["local"]
        )
