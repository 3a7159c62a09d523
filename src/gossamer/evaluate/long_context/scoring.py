"""Scoring: greedy answers matched exactly, or the answer's tokens checked without generating.

Generated answers are the measure: the model writes as many tokens as the answer has, reading its
cache as it would in use. Checking the true answer's tokens in one pass is cheaper and knows
nothing of decoding, so methods that act on decoding only leave it as it is.
Shapes: B = samples of a batch, T = tokens of the longest prompt, A = tokens of an answer.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from gossamer.core import GossamerError, check_count
from gossamer.evaluate.forward import device_of, evaluating
from gossamer.evaluate.long_context.fit import Sample
from gossamer.models import Progress, context_length
from gossamer.models.quiet import quiet

__all__ = ["Answers", "Question", "answered", "expected", "generate", "matches"]

Question = Literal["seen", "unseen"]
"""Whether the context is read together with its question, or alone before it."""


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Parameters
    ----------
    texts : generated answers. exact : 1.0 where every answer was said, else 0.0.
    part : share of the answers said. seconds : of all prompts and answers, encoding left out.
    """

    texts: tuple[str, ...]
    exact: tuple[float, ...]
    part: tuple[float, ...]
    seconds: float

    @property
    def score(self) -> float:
        """Share of the samples answered exactly."""
        return sum(self.exact) / len(self.exact)


def matches(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that a text says, as whole words, before its first full stop.

    >>> matches(" kalo 0000001, mire 0000002. Question", ["0000002", "0000003"])
    0.5
    """
    said = re.split(r"[.\n]", text.lstrip(), maxsplit=1)[0]
    found = [re.search(rf"(?<!\w){re.escape(one)}(?!\w)", said) is not None for one in answers]
    return sum(found) / len(found)


def _batches(samples: Sequence[Sample], batch_size: int, order: bool = True) -> Iterator[list[int]]:
    """Indices of samples run together: alike in length, so that little is padded."""
    check_count("batch_size", batch_size, 1)
    indices = list(range(len(samples)))
    if order:
        indices.sort(key=lambda i: samples[i].length)
    for low in range(0, len(indices), batch_size):
        yield indices[low : low + batch_size]


def _check(model: nn.Module, samples: Sequence[Sample]) -> None:
    if not samples:
        raise GossamerError("there is no sample to answer; give at least one")
    longest = max(s.length + len(s.answer_ids) for s in samples)
    limit = context_length(model)
    if limit is not None and longest > limit:
        raise GossamerError(
            f"a prompt with its answer takes {longest} tokens and the model's limit is {limit}; "
            f"give a length of at most {limit}"
        )


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded on the left, and where they are real."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _padding(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    return 0


def generate(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    question: Question = "seen",
    slack: int = 1,
    progress: Progress | None = None,
) -> Answers:
    """Answer greedily, prompts of a batch padded on the left.

    Parameters
    ----------
    question : ``unseen`` lets the model read the contexts before the questions are there, so that
        what is kept of a context cannot depend on what will be asked.
    slack : tokens an answer may take beyond the true one's.

    Raises
    ------
    GossamerError
        If there is no sample, or a prompt exceeds the model's limit.
    """
    _check(model, samples)
    device, fill = device_of(model), _padding(tokenizer)
    texts = [""] * len(samples)
    seconds, done = 0.0, 0
    with evaluating(model), quiet():
        for group in _batches(samples, batch_size):
            part = [samples[i] for i in group]
            new = max(len(s.answer_ids) for s in part) + slack
            began = _now(device)
            out = _answer(model, part, new, fill, device, question)
            seconds += _now(device) - began
            for i, row in zip(group, out.tolist(), strict=True):
                room = len(samples[i].answer_ids) + slack
                texts[i] = tokenizer.decode(row[:room], skip_special_tokens=True)
            done += len(part)
            if progress is not None:
                progress(done, len(samples), "answering")
    shares = tuple(matches(t, s.answers) for t, s in zip(texts, samples, strict=True))
    exact = tuple(float(share == 1.0) for share in shares)
    return Answers(tuple(texts), exact, shares, seconds)


def _answer(
    model: Any, part: list[Sample], new: int, fill: int, device: torch.device, question: Question
) -> Tensor:
    """(B, new) generated tokens."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=fill, use_cache=True
    )
    if question == "seen":
        ids, mask = padded([s.ids for s in part], fill, device)
        out = model.generate(ids, attention_mask=mask, generation_config=settings)
        return out[:, ids.shape[1] :]
    # Contexts end at one place and so do questions: the cache then stands for whole columns.
    before, real = padded([s.ids[: s.split] for s in part], fill, device)
    cache = DynamicCache(config=model.config)
    body = getattr(model, "base_model", model)
    # The places that generate() gives to padded rows, told here too.
    place = (real.cumsum(1) - 1).clamp_min(0)
    out = body(
        input_ids=before,
        attention_mask=real,
        position_ids=place,
        past_key_values=cache,
        use_cache=True,
    )
    after, asked = padded([s.ids[s.split :] for s in part], fill, device)
    ids, mask = torch.cat([before, after], 1), torch.cat([real, asked], 1)
    full = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=out.past_key_values,
        generation_config=settings,
    )
    return full[:, ids.shape[1] :]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def answered(expected_ids: Sequence[int], sample: Sample, pieces: Sequence[Sequence[int]]) -> bool:
    """Whether predictions made after the true answer's tokens are right.

    Where a new answer begins, any answer not yet said may come, for the order is free.

    Parameters
    ----------
    expected_ids : (A,) tokens the model expects at the places of ``sample.answer_ids``.
    pieces : tokens of the answers, in the order in which the answer says them.
    """
    truth, at = sample.answer_ids, 0
    for number, piece in enumerate(pieces):
        start = _find(truth, piece, at)
        for i in range(at, start):
            if expected_ids[i] != truth[i]:
                return False
        if expected_ids[start] not in {left[0] for left in pieces[number:]}:
            return False
        if any(expected_ids[start + i] != piece[i] for i in range(1, len(piece))):
            return False
        at = start + len(piece)
    return True


def _find(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    size = len(part)
    for i in range(start, len(ids) - size + 1):
        if tuple(ids[i : i + size]) == tuple(part):
            return i
    raise GossamerError("this tokenizer joins an answer with what surrounds it; generate instead")


def expected(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
) -> tuple[float, ...]:
    """1.0 for every sample whose true answer's tokens the model expects, each after the others.

    One pass over prompt and answer: decoding is not exercised.
    """
    _check(model, samples)
    device, fill = device_of(model), _padding(tokenizer)
    found = [0.0] * len(samples)
    with evaluating(model):
        for group in _batches(samples, batch_size):
            rows = [[*samples[i].ids, *samples[i].answer_ids] for i in group]
            ids, mask = padded(rows, fill, device)
            keep = max(len(samples[i].answer_ids) for i in group) + 1
            logits = model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep
            ).logits
            best = logits[:, :-1].argmax(-1).tolist()
            for i, row in zip(group, best, strict=True):
                sample = samples[i]
                own = row[len(row) - len(sample.answer_ids) :]
                found[i] = float(answered(own, sample, _pieces(tokenizer, sample)))
    return tuple(found)


def _pieces(tokenizer: Any, sample: Sample) -> list[list[int]]:
    """Tokens of each answer as they stand in the whole answer, each with a space before."""
    return [
        tokenizer(" " + one, add_special_tokens=False, verbose=False)["input_ids"]
        for one in sample.answers
    ]
