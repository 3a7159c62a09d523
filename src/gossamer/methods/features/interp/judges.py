"""Judges: what explains a latent and tests explanations. Text goes in, text or losses come out.

``WordJudge`` is a rule that reads the prompts and answers from the words alone: it costs nothing
and shows whether prompts and scores are right. Language models judge through :mod:`.endpoints`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gossamer.methods.features.interp.prompts import DETECT, EXPLAIN, read_task

__all__ = ["Embedder", "Judge", "WordEmbedder", "WordJudge"]

_WORD = re.compile(r"[^\s<>,]+")
_MARKED = re.compile(r"<<(.*?)>>")


class Judge(Protocol):
    """Answers prompts, and says how surprising a text is after another."""

    def complete(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """An answer to each prompt."""
        ...

    def loss(self, given: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Mean nats per token of each text after what is given before it."""
        ...


class Embedder(Protocol):
    """Texts to vectors whose cosine is likeness."""

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Tensor:
        """(len(texts), width)."""
        ...


def _words(text: str) -> list[str]:
    return _WORD.findall(text.replace("<<", " ").replace(">>", " "))


class WordJudge:
    """A judge without a model: an explanation is a list of words, and words are what it looks for.

    Explaining lists the words most often marked. A window is said to fire if it holds one; a
    marking is right if more than half of the marked words are listed. The loss is that of a word
    drawn half of the time from what is given and half of the time from ``vocabulary`` words.

    Parameters
    ----------
    most : words of an explanation. vocabulary : equally likely words otherwise.
    """

    def __init__(self, *, most: int = 12, vocabulary: int = 10_000) -> None:
        self.most, self.vocabulary = most, vocabulary

    def complete(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: str) -> str:
        kind, explanation, texts = read_task(prompt)
        if kind == EXPLAIN:
            counts = Counter(w.strip() for text in texts for w in _MARKED.findall(text))
            return ", ".join(word for word, _ in counts.most_common(self.most))
        listed = set(_words(explanation))
        found = [self._fires(kind, listed, text) for text in texts]
        return json.dumps([int(one) for one in found])

    def _fires(self, kind: str, listed: set[str], text: str) -> bool:
        if kind == DETECT:
            return bool(listed & set(_words(text)))
        marked = [w.strip() for w in _MARKED.findall(text)]
        return sum(w in listed for w in marked) * 2 > len(marked)

    def loss(self, given: Sequence[str], texts: Sequence[str]) -> list[float]:
        return [self._loss(_words(g), _words(t)) for g, t in zip(given, texts, strict=True)]

    def _loss(self, given: list[str], words: list[str]) -> float:
        seen, size = Counter(given), max(1, len(given))
        odds = (0.5 * seen[w] / size + 0.5 / self.vocabulary for w in words)
        return -sum(math.log(p) for p in odds) / max(1, len(words))


class WordEmbedder:
    """Counts of words, rare ones weighing more: texts that share words are alike."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Tensor:
        """Vectors as wide as the words known so far; earlier ones are to be padded with zeros."""
        rows = [Counter(_words(text)) for text in texts]
        for row in rows:
            for word in row:
                self._places.setdefault(word, len(self._places))
        made = torch.zeros(len(texts), max(1, len(self._places)), dtype=torch.float64)
        for i, row in enumerate(rows):
            for word, count in row.items():
                made[i, self._places[word]] = count
        return made
