"""What the claims of the control family share: templated texts, and a marker of what is said."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gossamer.methods.control.base import Intervention
from gossamer.models import Tokens, templates
from gossamer.models.labelled import Labelled
from gossamer.models.templates.tasks import FEELINGS, TOPICS

__all__ = ["FEELING_NAMES", "Continued", "feelings", "moods", "net", "topic_texts", "topics"]

FEELING_NAMES = tuple(FEELINGS)
_LENGTH, _PROMPT, _NEW = 8, 6, 8


@cache
def net() -> Any:
    """The packaged model of the templated tasks."""
    return templates.load()


def _tokens(groups: list[tuple[str, ...]]) -> Tensor:
    return torch.tensor([[templates.vocabulary()[w] for w in group] for group in groups])


def feelings(groups: int, seed: int) -> Labelled:
    """Sentences alike but for the word of feeling: one of each feeling in every group."""
    made = templates.batch("feelings", groups, seed)
    said = _tokens([pair[0] for pair in FEELINGS.values()])
    count = len(FEELINGS)
    ids = made.ids.repeat_interleave(count, 0)
    word = (made.attributes["word"] % said.shape[1]).repeat_interleave(count)
    feeling = torch.arange(count).repeat(groups)
    at = ids == templates.vocabulary()["felt"]
    ids[at.roll(1, 1)] = said[feeling, word]
    group = torch.arange(groups).repeat_interleave(count)
    return Labelled(
        Tokens.from_ids(ids), {"label": feeling, "group": group}, {"label": FEELING_NAMES}
    )


@torch.no_grad()
def moods(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of sentences' next words: probability of each feeling's deeds, and whether one comes first.

    Returns
    -------
    (N, feelings) probabilities, and bool (N, feelings): the likeliest word is that feeling's.
    """
    done = _tokens([pair[1] for pair in FEELINGS.values()])
    chance = net()(ids, use_cache=False).logits[:, -1].softmax(-1)
    return chance[:, done].sum(-1), (chance.argmax(-1)[:, None, None] == done).any(-1)


def topic_texts(topic: int, count: int, seed: int, length: int = _LENGTH) -> Tensor:
    """(count, length) openings of sentences of a topic."""
    made = templates.batch("topics", 8 * count, seed)
    return made.ids[made.attributes["topic"] == topic][:count, :length]


def topics(source: int, target: int, count: int, seed: int) -> Labelled:
    """As many texts of one topic as of another, labelled ``source`` and ``target``."""
    ids = [topic_texts(source, count, 2 * seed), topic_texts(target, count, 2 * seed + 1)]
    label = torch.arange(2).repeat_interleave(count)
    return Labelled(Tokens.from_ids(torch.cat(ids)), {"label": label}, {"label": _SIDES})


_SIDES = ("source", "target")


class Continued:
    """Prompts of one topic, continued by sampling with the KV cache, and judged.

    Parameters
    ----------
    source, target : topics of the prompts and of what they are steered to.

    Attributes
    ----------
    own : share of words of the target in the model's own continuations of the target's prompts;
        a third of all words is from any topic, so it lies near 3/4, not at 1.
    plain : perplexity of the model's own continuations of the source's prompts.
    """

    def __init__(self, source: int, target: int, seed: int, count: int = 64) -> None:
        self.seed = seed
        self.said = _tokens(list(TOPICS.values()))[target]
        self.prompts = topic_texts(source, count, 900 + seed, _PROMPT)
        other = topic_texts(target, count, 950 + seed, _PROMPT)
        self.own = self._share(self._continue(other, seed))
        new = self._continue(self.prompts, seed)
        self.before, self.plain = self._share(new) / self.own, self._perplexity(new)

    def mark(self, steering: Intervention) -> tuple[float, float]:
        """The target's words as a share of :attr:`own`, and the perplexity relative to ``plain``.

        The judge is the untouched model. It reads the continuations without their prompts, whose
        topic they have left.
        """
        with steering.on(net()):
            new = self._continue(self.prompts, self.seed)
        return self._share(new) / self.own, self._perplexity(new) / self.plain

    @torch.no_grad()
    def _continue(self, prompts: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = net().generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=_NEW,
                do_sample=True,
                pad_token_id=0,
            )
        return out[:, prompts.shape[1] :]

    def _share(self, new: Tensor) -> float:
        return float(torch.isin(new, self.said).float().mean())

    @torch.no_grad()
    def _perplexity(self, new: Tensor) -> float:
        ids = torch.cat([self.prompts[: len(new), :1], new], 1)
        logits = net()(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, new.flatten()).exp())
