"""BLASST: skip a tile of attention when all of its weights would be tiny.

Attention visits tiles of keys one after the other and knows the largest score so far. A tile
whose scores all lie below it by more than -ln(lambda) adds next to nothing: its softmax, its
values and their product are left out. The scores themselves are always computed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.attention.applied import SparseAttention
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.head_search import retrieval_prompt
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import walk
from gossamer.methods.attention.selector import Selector
from gossamer.methods.attention.tile_skip import (
    Scale,
    ThresholdIndex,
    TileCounter,
    fit_scale,
    read_scales,
    scales_of,
    write_scales,
)
from gossamer.models import Progress, State, Tokens, as_tokens, context_length

__all__ = ["BLASST"]

_SAMPLES = 8
"""Rows of the data that are looked at."""

_DECODED = 10
"""Tokens of each that are given one by one."""

_BINS = 3
"""Lengths of each: all of it, a half, a quarter."""


@dataclass(frozen=True)
class ThresholdSelector(Selector):
    """Hands every call its threshold; which tiles go is decided while it runs.

    Attributes
    ----------
    sparsity : share of the tiles to skip. scales : by phase; a phase without one stays full.
    threshold : lambda itself, whatever the length, instead.
    block_size : queries and keys of a tile.
    """

    sparsity: float | None
    scales: Mapping[str, Scale]
    threshold: float | None
    block_size: int

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        if self.threshold is not None:
            value = torch.tensor([self.threshold], dtype=torch.float64, device=layout.device)
        elif not self.sparsity or layout.phase not in self.scales:
            return FullIndex(layout)
        else:
            length = (layout.end - layout.first).clamp_min(1)
            value = self.scales[layout.phase].threshold(self.sparsity, length)
        return ThresholdIndex(layout, call, value, (self.block_size, self.block_size))

    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int] | None:
        if self.threshold or (self.sparsity and self.scales):
            return None
        total = sum(min(at + 1, own or length) for at in range(length))
        return total, total

    def state(self) -> State:
        return State(
            {
                "sparsity": self.sparsity,
                "scales": {phase: list(scale) for phase, scale in self.scales.items()},
                "threshold": self.threshold,
                "block_size": self.block_size,
            }
        )

    def notes(self) -> tuple[str, ...]:
        if self.threshold is not None:
            return (f"tiles whose weights are all below {self.threshold:g} are skipped",)
        fits = [
            f"{phase}: {s.a:.3g} * exp({s.b:.3g} * {self.sparsity:g}) / length"
            for phase, s in sorted(self.scales.items())
        ]
        return ("threshold " + "; ".join(fits),) if fits else ()

    def save_config(self, folder: str, model: nn.Module) -> None:
        """Add the calibration to a saved model's config.json, in ModelOpt's layout.

        Raises
        ------
        GossamerError
            If there is no calibration, or no config.json.
        """
        if not self.scales or self.sparsity is None:
            raise GossamerError(f"threshold {self.threshold} is fixed; there is no scale to save")
        write_scales(folder, self.scales, self.sparsity, model)


@dataclass(frozen=True, kw_only=True)
class BLASST(AttentionMethod):
    """Skip the tiles of attention whose weights are all negligible, found while it runs.

    ``apply`` calibrates: full attention on some samples counts which tiles each threshold would
    skip, and scale(s) = a exp(b s) is fitted per phase; at run time lambda = scale(sparsity) /
    length. ``applied.selector.save_config(folder, model)`` writes the fit into a config.json.

    Parameters
    ----------
    sparsity : share of the causal tiles to skip in prefill and in decoding, 0.5 when nothing else
        is given; 0 skips nothing.
    threshold : lambda itself instead, 0 to 1, the same at every length. A weight in a skipped
        tile is below lambda times the largest of its row.
    scales : a config.json, or a folder with one, whose ``sparse_attention_config`` holds a and b,
        instead of calibrating. Without data the model's own config is asked for it.
    block_size : queries and keys of a tile.

    Data are long samples of the kind the model will read: up to 8 rows, at three lengths each, the
    last 10 tokens given one by one. Without any, made-up retrieval prompts of random tokens.

    Source: arXiv:2512.12087, Section 3; the calibration as in NVIDIA's Model-Optimizer.
    Departs from the paper: the tile of the first key and those on the diagonal are visited first
    and never skipped, so that the score to beat is known; decoding decides for the heads that
    share keys together. Fine-tuning with the skip is not offered.

    Examples
    --------
    >>> BLASST(threshold=0.001).sparsity is None
    True
    """

    card: ClassVar = Card(
        title="BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding",
        system="blasst",
        year=2025,
        arxiv="2512.12087",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores",
        score="largest score of a tile below the largest so far",
        pattern="tiles of queries and keys",
        budget="threshold lambda = a exp(b sparsity) / length, calibrated per phase",
        schedule="every call, while it runs",
        kernel="fused: softmax and values of a tile are skipped, its scores are not",
        departs="the first tile and the diagonal are visited first and never skipped; no "
        "fine-tuning with the skip",
    )
    full: ClassVar = {"sparsity": 0.0}
    example: ClassVar = {"block_size": 4, "sparsity": 0.4}
    peeks: ClassVar = "a tile is skipped only if all of its queries agree, the later ones too"
    chunked: ClassVar = "the threshold falls with the keys known, which are fewer in early chunks"
    exempt: ClassVar = {
        "exact sparsity": "the threshold is calibrated; what it skips depends on the text",
        "encoders": "the tiles of a decoder reach its diagonal",
    }

    sparsity: float | None = None
    threshold: float | None = None
    scales: str | None = None
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is None and self.threshold is None:
            object.__setattr__(self, "sparsity", 0.5)
        if self.sparsity is not None and self.threshold is not None:
            raise GossamerError(
                f"sparsity {self.sparsity} and threshold {self.threshold} both fix what is "
                "skipped; give one"
            )
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise GossamerError(
                f"threshold is {self.threshold}; it is relative to the largest weight: 0 to 1"
            )
        check_count("block_size", self.block_size, 1)

    def plan(self, model: nn.Module, data: Any, length: int) -> ThresholdSelector:
        return self.planned(model, data, length, None)

    def planned(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> ThresholdSelector:
        scales: Mapping[str, Scale] = {}
        if self.sparsity:
            own = getattr(getattr(model, "config", None), "sparse_attention_config", None)
            if self.scales is not None:
                scales = read_scales(self.scales)
            elif data is None and own is not None:
                scales = scales_of(own, "this model's config")
            else:
                scales = self._calibrate(model, data, length, progress)
        return ThresholdSelector(self.sparsity, scales, self.threshold, self.block_size)

    def _calibrate(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> dict[str, Scale]:
        """Fit both phases on full attention."""
        counter = TileCounter(self.block_size)
        plain = replace(self, backend="auto", dense_layers=0, min_length=0)
        runs = list(self._samples(model, data, length))
        with SparseAttention(plain, model, counter, length):
            for done, (tokens, decode) in enumerate(runs, 1):
                walk(model, tokens, decode)
                if progress is not None:
                    progress(done, len(runs), f"tiles at {tokens.length} tokens")
        return {phase: fit_scale(counter.points(phase)) for phase in sorted(self.phases)}

    def _samples(self, model: nn.Module, data: Any, length: int) -> Iterator[tuple[Tokens, int]]:
        """Rows at several lengths; only the longest is decoded from."""
        if data is None:
            config: Any = model.config
            limit = min(length, context_length(model) or length)
            words = config.get_text_config().vocab_size
            rows = [retrieval_prompt(words, limit, seed).input_ids for seed in range(_SAMPLES // 2)]
        else:
            tokens = as_tokens(data, model)
            pairs = zip(tokens.input_ids, tokens.attention_mask, strict=True)
            rows = [ids[mask][None, :length] for ids, mask in list(pairs)[:_SAMPLES]]
        for row in rows:
            for halvings in range(_BINS):
                part = row[:, : row.shape[1] >> halvings]
                if halvings and part.shape[1] < 4 * self.block_size:
                    break
                yield Tokens.from_ids(part), 0 if halvings else _DECODED

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ThresholdSelector:
        scales = {phase: Scale(*scale) for phase, scale in meta["scales"].items()}
        return ThresholdSelector(meta["sparsity"], scales, meta["threshold"], meta["block_size"])
