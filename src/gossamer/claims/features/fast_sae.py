"""FAST: dialogues read apart give dictionaries that fit dialogues read apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from gossamer.claims.base import Claim, Figures, Tier, Verdict, mean
from gossamer.claims.features.beds import one_thread
from gossamer.claims.features.stream_bed import batches
from gossamer.claims.lm import nano
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.batch_topk_sae import BatchTopKSAE
from gossamer.methods.features.measure import score_rows
from gossamer.methods.features.packing import Packed, pack
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.training import train
from gossamer.models import read_documents

__all__ = ["CLAIMS"]

_TEMPLATE = ("<|user|>\n", "\n<|assistant|>\n", "\n<|end|>\n")
_LENGTH = 128


@dataclass(frozen=True)
class _Size:
    """Rows of each kind of data, block whose output is read, steps, and the dictionary's width."""

    rows: int
    block: int
    steps: int
    width: int


_SIZES: dict[Tier, _Size] = {
    "smoke": _Size(rows=2048, block=1, steps=80, width=256),
    "small": _Size(rows=32768, block=4, steps=900, width=512),
}


def _chats(texts: list[str], tokens: int, seed: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Two-turn dialogues cut from texts, so many tokens, and which of them are the template's."""
    tokenizer = nano().tokenizer
    opening, turn, end = tokenizer(list(_TEMPLATE), add_special_tokens=False)["input_ids"]
    stream = _stream(tuple(texts))
    generator = torch.Generator().manual_seed(seed)
    chats: list[list[int]] = []
    marks: list[list[bool]] = []
    while tokens > 0:
        parts = []
        for _ in range(2):
            long = int(torch.randint(8, 40, (), generator=generator))
            start = int(torch.randint(len(stream) - long, (), generator=generator))
            parts.append(stream[start : start + long])
        ask, answer = parts
        chats.append([*opening, *ask, *turn, *answer, *end])
        lengths = ((opening, True), (ask, False), (turn, True), (answer, False), (end, True))
        marks.append([flag for part, flag in lengths for _ in part])
        tokens -= len(chats[-1])
    return chats, marks


@cache
def _stream(texts: tuple[str, ...]) -> list[int]:
    return [t for ids in nano().tokenizer(list(texts), verbose=False)["input_ids"] for t in ids]


def _rows(data: Packed, size: _Size) -> Tensor:
    hook = f"model.layers.{size.block}"
    source = ActivationSource(nano().model, hook, data, windows=8, sink_multiple=None)
    return torch.cat(list(source.one_pass()))


def _fit(rows: Tensor, size: _Size, seed: int) -> Dictionary:
    method = BatchTopKSAE(k=16, width=size.width, seed=seed, lr=3e-3)
    return train(
        batches(rows, 256, seed),
        width=size.width,
        rule=method.rule(),
        recipe=method.recipe(size.steps, 256),
    )


@cache
def _plain(tier: Tier) -> Tensor:
    """Rows of the texts themselves, from places all over them."""
    size = _SIZES[tier]
    ids = nano().tokenizer(read_documents(None, "calibration"), verbose=False)["input_ids"]
    data = _first(pack(ids, length=_LENGTH, packing="concat"), size.rows, 0)
    return _rows(data, size)[: size.rows]


@cache
def _held(tier: Tier) -> tuple[Tensor, Tensor]:
    """Rows of dialogues cut from held-out texts, and which are of the template."""
    chats, marks = _chats(read_documents(None, "heldout"), 3072, 100)
    rows = _rows(pack(chats, length=_LENGTH, packing="none"), _SIZES[tier])
    return rows, torch.tensor([mark for row in marks for mark in row])


@one_thread()
def _apart(tier: Tier, seed: int) -> Figures:
    size = _SIZES[tier]
    chats, _ = _chats(read_documents(None, "calibration"), size.rows, seed)
    test, template = _held(tier)
    found: dict[str, float] = {}
    for name, rows in (
        ("apart", _rows(pack(chats, length=_LENGTH, packing="none"), size)),
        ("joined", _rows(pack(chats, length=_LENGTH, packing="concat"), size)),
        ("plain", _plain(tier)),
    ):
        made = _fit(rows[: size.rows], size, seed)
        score, marked = score_rows(made, [test]), score_rows(made, [test[template]])
        found |= {f"fvu_{name}": score.fvu, f"template_{name}": marked.fvu, f"l0_{name}": score.l0}
    return found | {"tokens": float(size.rows)}


def _first(data: Packed, tokens: int, seed: int) -> Packed:
    """Windows, drawn by a seed where there are more than needed, that hold so many tokens."""
    if data.count <= tokens:
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    need = 1 + int((data.keep[order].sum(1).cumsum(0) < tokens).sum())
    at = order[:need]
    return Packed(
        data.input_ids[at],
        data.segments[at],
        data.positions[at],
        data.keep[at],
        data.separate,
        data.facts,
    )


def _check(runs: Sequence[Figures]) -> Verdict:
    apart, joined = mean(runs, "fvu_apart"), mean(runs, "fvu_joined")
    plain = mean(runs, "fvu_plain")
    if apart >= plain or apart > 0.9:
        return Verdict.FAILS
    marked = mean(runs, "template_apart") <= 0.7 * mean(runs, "template_plain")
    return Verdict.HOLDS if apart < joined < plain and marked else Verdict.WEAKER


_TEXT = {
    "sentence": "A dictionary trained on dialogues read apart reconstructs dialogues read apart "
    "better than one trained on joined dialogues, and that better than one trained on plain text.",
    "paper": "Qwen2.5-7B-Instruct: squared error of a token 0.65, against 1.51 on joined dialogues "
    "and 5.20 on joined pre-training text",
    "check": _check,
    "ours": "FVU on held-out dialogues {fvu_apart:.3f} trained on dialogues apart, "
    "{fvu_joined:.3f} joined, {fvu_plain:.3f} on plain text; at template tokens "
    "{template_apart:.3f}, {template_joined:.3f}, {template_plain:.3f}; L0 {l0_apart:.1f}, "
    "{l0_joined:.1f}, {l0_plain:.1f}; {tokens:.0f} tokens each",
}

CLAIMS = (
    Claim(
        name="fits dialogues, in brief",
        **_TEXT,
        experiment="second block of the packaged model, which was not tuned on dialogues: two-turn "
        "dialogues cut from its texts under a template; the same BatchTopK dictionary (256 "
        "latents, k = 16, 80 steps) on equal tokens of each; holds when FVU rises in the order "
        "given and at template tokens is at most 0.7 of plain text's",
        run=partial(_apart, "smoke"),
    ),
    Claim(
        name="fits dialogues",
        **_TEXT,
        experiment="as above on the middle block, 512 latents and 900 steps",
        run=partial(_apart, "small"),
        tier="small",
    ),
)
