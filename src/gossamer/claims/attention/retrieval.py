"""One decoded token that asks for one key among many, without a model.

Keys come in stretches that share a topic, as neighbouring tokens of a text do, channels differ in
loudness, and all keys of a head share an offset. The query points at one key, the needle. Every key
carries a random code as its value: the answer is right if the output is nearest to the needle's.
Shapes: B = trials, G = key-value heads, R = query heads of one, T = keys, D = head width,
C = codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import execute
from gossamer.methods.attention.index import FullIndex, KeyIndex, WindowIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector

__all__ = [
    "Retrieval",
    "ask",
    "overlap",
    "retrieval",
    "run_stack",
    "stack",
    "true_top",
    "window_right",
]

STRETCH = 24
"""Keys that share a topic."""
TOPIC = 0.5
"""Share of a key's variance that is its topic."""
HEIGHT = 18.0
"""Score of the needle, in nats above the mean."""
CODES = 64


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Trials side by side, as the batch of one call.

    Parameters
    ----------
    query : (B, G * R, 1, D). key : (B, G, T, D); the last is the query's own. value : (B, G, T, C).
    needle : (B, G) places. loud : (G, D), what channels are multiplied by.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    needle: Tensor
    loud: Tensor

    @property
    def call(self) -> Call:
        """As selectors and executors take it, with a memory of its own."""
        return Call(self.query, self.key, self.value)

    @property
    def layout(self) -> Layout:
        """One query behind all keys."""
        batch, _, keys, _ = self.key.shape
        return Layout(batch, 1, keys, query_offset=keys - 1)

    def right(self, out: Tensor) -> float:
        """Share of the heads whose output (B, H, 1, C) is nearest to the needle's code."""
        shared = self.key.shape[1]
        code = self.value.argmax(-1).gather(2, self.needle[..., None])
        found = out.argmax(-1).unflatten(1, (shared, -1))[..., 0]
        return float((found == code).float().mean())

    def shuffled(self, seed: int) -> "Retrieval":
        """The same keys in another order: attention is the same, neighbours are not."""
        generator = torch.Generator().manual_seed(seed)
        last = self.key.shape[2] - 1
        order = torch.cat([torch.randperm(last, generator=generator), torch.tensor([last])])
        back = order.argsort()
        key, value = self.key[:, :, order], self.value[:, :, order]
        return replace(self, key=key, value=value, needle=back[self.needle])


@cache
def retrieval(
    seed: int, trials: int = 32, heads: int = 2, repeat: int = 2, keys: int = 1024, width: int = 128
) -> Retrieval:
    """Draw trials."""
    generator = torch.Generator().manual_seed(4000 + seed)
    needle = torch.randint(keys // 16, keys - keys // 8, (trials, heads), generator=generator)
    return _drawn(needle, repeat, keys, width, generator)


@cache
def stack(seed: int, groups: tuple[int, ...], trials: int = 16) -> tuple[Retrieval, ...]:
    """Layers that ask one after another; those of a group ask for the same places.

    Parameters
    ----------
    groups : layers of each group. Keys and queries are every layer's own.
    """
    generator = torch.Generator().manual_seed(5000 + seed)
    heads, repeat, keys, width = 2, 2, 1024, 64
    layers: list[Retrieval] = []
    for size in groups:
        shape = (trials, heads)
        needle = torch.randint(keys // 16, keys - keys // 8, shape, generator=generator)
        layers += [_drawn(needle, repeat, keys, width, generator, 0.25) for _ in range(size)]
    return tuple(layers)


def _drawn(
    needle: Tensor,
    repeat: int,
    keys: int,
    width: int,
    generator: torch.Generator,
    spread: float = 0.5,
) -> Retrieval:
    trials, heads = needle.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    loud = (spread * normal(heads, width)).exp()
    loud = loud / loud.square().mean(1, keepdim=True).sqrt()
    topic = normal(trials, heads, -(-keys // STRETCH), width).repeat_interleave(STRETCH, 2)
    own = normal(trials, heads, keys, width)
    centred = TOPIC**0.5 * topic[:, :, :keys] + (1 - TOPIC) ** 0.5 * own
    centred = centred * loud[:, None]
    aim = centred.gather(2, needle[..., None, None].expand(-1, -1, 1, width))
    stir = 0.3 * normal(trials, heads, repeat, width) * loud[:, None]
    query = aim + stir
    scale = HEIGHT * width**0.5 / (query * aim).sum(-1, keepdim=True)
    code = torch.randint(CODES, (trials, heads, keys), generator=generator)
    return Retrieval(
        (query * scale).flatten(1, 2)[:, :, None],
        centred + 3.0 * normal(heads, 1, width) * loud[:, None],
        torch.nn.functional.one_hot(code, CODES).float(),
        needle,
        loud,
    )


def run_stack(
    layers: tuple[Retrieval, ...], selector: Selector, order: Sequence[int] | None = None
) -> tuple[float, float]:
    """Share answered rightly over all layers, and share of the layers that read all keys.

    Parameters
    ----------
    order : heads whose chosen keys each head is given instead of its own.
    """
    step: dict[str, Any] = {}
    right, full = 0.0, 0
    for layer, task in enumerate(layers):
        call = replace(task.call, step=step)
        index = selector.select(call, task.layout, layer)
        if order is not None and layer in step.get("chosen", {}):
            choice = step["chosen"][layer]
            step["chosen"][layer] = choice._replace(place=choice.place[:, list(order)])
        right += task.right(execute(call, index)[0])
        full += index.whole
    return right / len(layers), full / len(layers)


def ask(task: Retrieval, selector: Selector | None, layer: int = 0) -> tuple[float, float]:
    """Share answered rightly, and of the keys read, under a selector; None reads all."""
    call, layout = task.call, task.layout
    index: KeyIndex = FullIndex(layout)
    if selector is not None:
        index = selector.select(call, layout, layer)
    kept, total = index.pairs()
    return task.right(execute(call, index)[0]), kept / total


def window_right(task: Retrieval, keys: int, sink: int = 4) -> float:
    """Share answered rightly from the first keys and the latest, so many in all."""
    return task.right(execute(task.call, WindowIndex(task.layout, sink, keys - sink))[0])


def true_top(task: Retrieval, count: int) -> Tensor:
    """Bool (B, G, T): the keys with the largest attention, the mean over the heads of a group."""
    query = task.call.grouped_query()
    score = torch.einsum("bgrqd,bgkd->bgrqk", query, task.key) * task.call.factor
    mass = score.softmax(-1).mean(2)[:, :, 0]
    kept = torch.zeros_like(mass, dtype=torch.bool)
    return kept.scatter(2, mass.topk(count).indices, True)


def overlap(index: KeyIndex, true: Tensor) -> float:
    """Share of the true keys that an index reads."""
    read = index.mask()[:, :, 0]
    return float((read & true).sum() / true.sum())
