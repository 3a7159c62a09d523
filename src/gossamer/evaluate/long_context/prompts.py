"""Prompts of one's own: questions with answers, or texts whose continuation is scored.

Shapes: B = prompts of a batch, T = tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from gossamer.core import GossamerError, check_count
from gossamer.evaluate.forward import device_of, evaluating
from gossamer.evaluate.long_context.fit import Sample
from gossamer.evaluate.long_context.scoring import Answers

__all__ = ["Kind", "Source", "continued", "prompts_of", "read_prompts", "read_source"]

Kind = Literal["answers", "text"]
"""Answers are matched exactly; of a text the loss of its continuation is compared."""

CONTINUATION = 64
"""Tokens at the end of a text that are predicted, or a quarter of a short one."""


@dataclass(frozen=True)
class Source:
    """A file of prompts, read and checked; no tokenizer has seen it.

    Parameters
    ----------
    path : of the file. kind : ``answers`` of JSONL, ``text`` of plain text. text : all of a plain
        text. asked : prompts with their answers, of JSONL.
    """

    path: str
    kind: Kind
    text: str = ""
    asked: tuple[tuple[str, tuple[str, ...]], ...] = ()


def read_source(path: str | Path, *, count: int | None = None) -> Source:
    """A file of prompts; whatever is wrong with it is found here, before a model is there.

    Parameters
    ----------
    path : JSONL (.jsonl, .json) whose lines are ``{"prompt": text, "answer": text or list of
        texts}``; or plain text. count : most prompts; None takes all.

    Raises
    ------
    GossamerError
        If the file cannot be read, holds nothing, or a line has no prompt or answer.
    """
    if count is not None:
        check_count("samples", count, 1)
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise GossamerError(
            f"{path} cannot be read ({reason}); give builtin, a JSONL file or a text file"
        ) from None
    if not text.strip():
        raise GossamerError(f"{path} is empty; give a JSONL file or a text file with something in")
    if file.suffix not in (".jsonl", ".json"):
        return Source(str(path), "text", text=text)
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    asked = tuple(_asked(line, f"{path}, line {i}") for i, line in lines[:count])
    return Source(str(path), "answers", asked=asked)


def read_prompts(
    path: str | Path, tokenizer: Any, *, length: int, count: int | None = None
) -> tuple[Kind, list[Sample]]:
    """Prompts from a file: :func:`read_source`, then :func:`prompts_of`."""
    return prompts_of(read_source(path, count=count), tokenizer, length=length, count=count)


def prompts_of(
    source: Source, tokenizer: Any, *, length: int, count: int | None = None
) -> tuple[Kind, list[Sample]]:
    """Prompts of a file, as tokens.

    Parameters
    ----------
    length : most tokens of a prompt with its answer; plain text is cut into windows of so many.
    count : most prompts; None takes all.

    Raises
    ------
    GossamerError
        If a prompt is too long, or a text too short for one.
    """
    check_count("length", length, 16)
    if source.kind == "answers":
        asked = source.asked[:count]
        return "answers", [_sample(source, i, tokenizer, length) for i in range(len(asked))]
    found = _windows(source.text, tokenizer, length, count)
    if not found:
        raise GossamerError(f"{source.path} fills no prompt of {length} tokens; give more text")
    return "text", found


def _asked(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    """Prompt and answers of one line."""
    try:
        value = json.loads(line)
    except ValueError:
        raise GossamerError(f"{where} is no JSON; write one object a line") from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    given = value.get("answer") if isinstance(value, dict) else None
    answers = [given] if isinstance(given, str) else given
    if not isinstance(prompt, str) or not isinstance(answers, list) or not answers:
        raise GossamerError(f'{where} needs {{"prompt": text, "answer": text}}')
    if not all(isinstance(one, str) and one.strip() for one in answers) or not prompt.strip():
        raise GossamerError(f"{where} has an empty prompt or answer; fill it in or leave it out")
    return prompt, tuple(answers)


def _sample(source: Source, index: int, tokenizer: Any, length: int) -> Sample:
    prompt, answers = source.asked[index]
    answer = ", ".join(answers)
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    answer_ids = tokenizer(" " + answer, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) + len(answer_ids) > length:
        raise GossamerError(
            f"{source.path}, prompt {index + 1} takes {len(ids) + len(answer_ids)} tokens and the "
            f"length is {length}; give a larger --length or shorten it"
        )
    return Sample(
        task="prompts",
        seed=0,
        index=index,
        context=prompt,
        question="",
        answer=answer,
        answers=answers,
        ids=tuple(ids),
        split=len(ids),
        answer_ids=tuple(answer_ids),
        depths=(),
        clear=0,
    )


def _windows(text: str, tokenizer: Any, length: int, count: int | None) -> list[Sample]:
    stream = tokenizer(text, verbose=False)["input_ids"]
    new = min(CONTINUATION, max(1, length // 4))
    starts = range(0, len(stream) - length + 1, length)
    return [
        Sample(
            task="prompts",
            seed=0,
            index=index,
            context="",
            question="",
            answer="",
            answers=(),
            ids=tuple(stream[start : start + length - new]),
            split=length - new,
            answer_ids=tuple(stream[start + length - new : start + length]),
            depths=(),
            clear=0,
        )
        for index, start in enumerate(starts)
        if count is None or index < count
    ]


def continued(
    model: nn.Module, samples: Sequence[Sample], *, batch_size: int = 8, stepwise: bool = True
) -> Answers:
    """Score how well texts are continued: minus the loss in nats per token, higher is better.

    Parameters
    ----------
    samples : with prompts and continuations of one length each.
    stepwise : give the continuation token by token over the cache, as decoding would; otherwise
        in one piece with the prompt.
    """
    device = device_of(model)
    found: list[float] = []
    began = perf_counter()
    with evaluating(model):
        for low in range(0, len(samples), batch_size):
            part = samples[low : low + batch_size]
            ids = torch.tensor([[*s.ids, *s.answer_ids] for s in part], device=device)
            first = len(part[0].ids)
            logits = _stepped(model, ids, first) if stepwise else _at_once(model, ids, first)
            picked = torch.log_softmax(logits.float(), -1)
            picked = picked.gather(-1, ids[:, first:, None])[..., 0]
            found += [float(x) for x in picked.double().mean(1)]
    scores = tuple(found)
    return Answers(("",) * len(scores), scores, scores, perf_counter() - began)


def _at_once(model: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, first - 1 : -1]


def _stepped(model: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    out = model(input_ids=ids[:, :first], use_cache=True)
    parts, cache = [out.logits[:, -1:]], out.past_key_values
    for at in range(first, ids.shape[1] - 1):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        parts.append(out.logits[:, -1:])
        cache = out.past_key_values
    return torch.cat(parts, dim=1)
