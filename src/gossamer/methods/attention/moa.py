"""MoA: each head gets a window of its own, and its own rule for how the window grows with the text.

Some heads look at neighbours whatever the length, others search the whole text. One backward pass
says what removing each pair would cost the loss; an integer programme then gives every head the
span alpha + beta * N that loses least under one density for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Stat, check_count
from gossamer.methods.attention.applied import SparseAttention
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.spans.influence import Influence, profile, samples_of
from gossamer.methods.attention.spans.plan import Spans, read_spans, round_up
from gossamer.methods.attention.spans.programme import Candidate, Problem, candidates, pareto
from gossamer.methods.attention.spans.selector import SpanSelector, span_pairs
from gossamer.models import Inputs, Progress, Tokens, as_tokens
from gossamer.models.capture import evaluating
from gossamer.models.gradient import own_loss

__all__ = ["MoA", "SpanSelector", "kv_heads"]

_FAR = 0.8
"""Share of the text from which a head counts as one that looks everywhere."""


@dataclass(frozen=True, kw_only=True)
class MoA(AttentionMethod):
    """Give every head a window whose length follows the text by a rule fitted to that head.

    Parameters
    ----------
    sparsity : share of the causal pairs removed at every profiled length, over all heads.
    sink : first tokens of a text that every query keeps.
    block_size : spans are multiples of this; at least one block.
    lengths : tokens at which the model is profiled; empty takes 1/6, 1/3 and 2/3 of the data's
        windows, which then are the unseen longer length at which plans compete.
    answer_tokens : the model continues every calibration text by so many tokens, and only these
        are scored; at most half of a length. 0 scores what it holds likeliest after every token.
    levels : caps tried on each shorter length's loss when the Pareto set is searched.
    spans : file of spans, ``{"alphas": [[...]], "betas": [[...]]}``; nothing is profiled then.
    evict : dynamic caches let go of keys that no later token reads, once decoding has begun;
        answers stay the same. False keeps every key.

    The data of :meth:`apply` should need what lies far back: questions on long texts; or inputs
    whose ``labels`` mark the places to score. Scored is always the model's own choice. The
    sequence's own length N sets the spans: of a prompt its length, while decoding the tokens so
    far. ``spans.plan.write_spans`` writes such a file.

    A question of more than 16 tokens over a cache that gave up keys reads what is left: under its
    longer spans the first of its tokens would have read further back. After ``restore()`` such a
    cache cannot be used any more and says so.
    """

    card: ClassVar = Card(
        title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        year=2024,
        arxiv="2406.14909",
        system="moa",
        family="attention",
        when="inference",
        start="dense",
        masks="static",
        site="attention scores",
        score="first-order change of the loss when a pair is removed and its row renormalised",
        pattern="sinks and a window alpha + beta * length per key-value head",
        budget="sparsity over causal pairs, split over heads by an integer programme",
        schedule="planned once, grows with the text",
        update="keys no later token reads are freed",
        kernel="heads of equal span as plain windows, fused attention",
        departs="influence is summed along diagonals, which windows need, not in 64 x 64 blocks; "
        "heads that share keys share a span; windows end at the query, not at a block's edge; "
        "alphas are steps of a quarter of the shortest profiled length; HiGHS solves the "
        "programmes (the official code uses Gurobi)",
    )
    needs: ClassVar = frozenset({Stat.GRADIENT})
    example: ClassVar = {
        "block_size": 2,
        "sink": 1,
        "answer_tokens": 2,
        "levels": 1,
        "lengths": (12, 20),
    }
    full: ClassVar = {"sparsity": 0.0}
    selects: ClassVar = False
    chunked: ClassVar = "spans follow the length known so far, which grows chunk by chunk"
    exempt: ClassVar = {
        "exact sparsity": "spans are whole blocks: the plan removes at least the sparsity",
        "encoders": "the family works on causal decoders",
    }

    sparsity: float = 0.5
    sink: int = 64
    block_size: int = 64
    lengths: tuple[int, ...] = ()
    answer_tokens: int = 32
    levels: int = 2
    spans: str | None = None
    evict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"sink": 0, "block_size": 1, "answer_tokens": 0, "levels": 0}
        for name, low in least.items():
            check_count(name, getattr(self, name), low)
        for length in self.lengths:
            check_count("a length to profile", length, 2)

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> SparseAttention:
        if not isinstance(data, Inputs):
            return super().apply(model, data, progress=progress)
        if not {"input_ids", "labels"} <= data.values.keys():
            raise GossamerError(
                f"the inputs hold {', '.join(data.values)}; give input_ids, and labels at the "
                "places that are to be scored"
            )
        length = self.length or data.values["input_ids"].shape[1]
        method = replace(self, length=length)
        return SparseAttention(method, model, method.planned(model, data, length, progress), length)

    def plan(self, model: nn.Module, data: Any, length: int) -> SpanSelector:
        return self.planned(model, data, length, None)

    def planned(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> SpanSelector:
        if self.spans is not None:
            spans = read_spans(self.spans, kv_heads(model), self.block_size)
            return SpanSelector(spans, self.sink, (f"spans of {self.spans}",), self.evict)
        if self.sparsity == 0.0:
            heads = kv_heads(model)
            none, all_of_it = (tuple((share,) * n for n in heads) for share in (0.0, 1.0))
            return SpanSelector(Spans(none, all_of_it, self.block_size), self.sink)
        texts = data if isinstance(data, Inputs) else as_tokens(data, model)
        lengths = self._lengths(_size(texts))
        found = profile(
            self,
            model,
            texts,
            lengths,
            answer=self.answer_tokens,
            sink=self.sink,
            progress=progress,
        )
        options = candidates(lengths, self.block_size)
        problem = self.problem(found, options, self._windows(model, len(found[0].lags)))
        selectors = [
            self._selector(found, options, choice) for choice in pareto(problem, self.levels)
        ]
        return self._best(model, texts, lengths, selectors)

    def _lengths(self, whole: int) -> tuple[int, ...]:
        if self.lengths:
            if max(self.lengths) > whole:
                raise GossamerError(
                    f"cannot profile {max(self.lengths)} tokens on windows of {whole}; give longer "
                    "windows or shorter lengths"
                )
            return tuple(sorted(set(self.lengths)))
        block = self.block_size
        return tuple(sorted({max(2, block, whole * k // 6 // block * block) for k in (1, 2, 4)}))

    def _windows(self, model: nn.Module, layers: int) -> list[int | None]:
        """The layers' own sliding windows."""
        none = SpanSelector(Spans(((0.0,),) * layers, ((1.0,),) * layers), self.sink)
        with SparseAttention(self, model, none, 2) as work:
            return [work._own_window(layer) for layer in range(layers)]

    def problem(
        self,
        found: tuple[Influence, ...],
        options: tuple[Candidate, ...],
        windows: list[int | None],
    ) -> Problem:
        """What every candidate loses and keeps, for every head at every length.

        Parameters
        ----------
        windows : each layer's own sliding window, or None.
        """
        lost, kept, total = [], [], []
        for one in found:
            size = one.length
            spans = [round_up(c.alpha + c.beta * size, self.block_size) for c in options]
            place = torch.tensor(spans).clamp_max(size)
            rows: list[np.ndarray] = []
            counts: list[list[int]] = []
            whole: list[int] = []
            for layer, own in enumerate(windows):
                outside = one.outside(layer).cpu()
                pairs = [span_pairs(size, self.sink, span, own) for span in spans]
                full = layer < self.dense_layers
                for head in range(len(outside)):
                    rows.append(outside[head, place].numpy() * (not full))
                    counts.append([every if full else left for left, every in pairs])
                    whole.append(pairs[0][1])
            lost.append(np.stack(rows))
            kept.append(np.array(counts, dtype=float))
            total.append(np.array(whole, dtype=float))
        bound = 1.0 - self.sparsity
        return Problem(np.stack(lost), np.stack(kept), np.stack(total), bound)

    def _selector(
        self, found: tuple[Influence, ...], options: tuple[Candidate, ...], choice: np.ndarray
    ) -> SpanSelector:
        chosen = iter(choice.tolist())
        layers = [
            [options[next(chosen)] for _ in range(len(lags))]
            if layer >= self.dense_layers
            # What a layer that stays dense was given is of no consequence.
            else [Candidate(0.0, 1.0) for _ in range(len(lags)) if next(chosen) >= 0]
            for layer, lags in enumerate(found[0].lags)
        ]
        spans = Spans(
            tuple(tuple(c.alpha for c in row) for row in layers),
            tuple(tuple(c.beta for c in row) for row in layers),
            self.block_size,
        )
        return SpanSelector(spans, self.sink)

    def _best(
        self,
        model: nn.Module,
        texts: Tokens | Inputs,
        lengths: tuple[int, ...],
        selectors: list[SpanSelector],
    ) -> SpanSelector:
        """The plan of the Pareto set with the least loss at the windows' full length."""
        size = _size(texts)
        losses = [0.0] if len(selectors) == 1 else self._losses(model, texts, selectors)
        best = selectors[losses.index(min(losses))]
        far = sum(
            span >= _FAR * size
            for layer in range(best.spans.layers)
            for span in best.spans.at(layer, size)
        )
        heads = sum(best.spans.heads(layer) for layer in range(best.spans.layers))
        facts = [
            f"profiled at {', '.join(map(str, lengths))} tokens on {len(texts)} texts",
            f"at {size} tokens {far} of {heads} key-value heads see {_FAR:.0%} of the text or more",
        ]
        if len(losses) > 1:
            facts.append(
                f"of {len(losses)} plans of the Pareto set, the one with the least loss at {size} "
                f"tokens: {min(losses):.3f}, the worst {max(losses):.3f}"
            )
        return replace(best, facts=tuple(facts), evict=self.evict)

    @torch.no_grad()
    def _losses(
        self, model: nn.Module, texts: Tokens | Inputs, selectors: list[SpanSelector]
    ) -> list[float]:
        size = _size(texts)
        with evaluating(model):
            samples = samples_of(model, texts, size, self.answer_tokens)
            losses = []
            for selector in selectors:
                with SparseAttention(self, model, selector, size):
                    each = [float(own_loss(model, sample)) for sample in samples]
                losses.append(sum(each) / len(each))
        return losses

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SpanSelector:
        alphas, betas = (
            tuple(tuple(float(x) for x in row) for row in meta[name])
            for name in ("alphas", "betas")
        )
        spans = Spans(alphas, betas, int(meta["block_size"]))
        return SpanSelector(spans, int(meta["sink"]), tuple(meta["facts"]), self.evict)


def _size(texts: Tokens | Inputs) -> int:
    """Tokens of a window."""
    return texts.values["input_ids"].shape[1] if isinstance(texts, Inputs) else texts.length


def kv_heads(model: nn.Module) -> list[int]:
    """Key-value heads of every layer, from the model's configuration."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [int(heads)] * int(config.num_hidden_layers)
