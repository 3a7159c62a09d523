"""Book: everything there is to say about each latent, worked out where it is asked for.

Shapes: M = latents, D = width of an atom, V = vocabulary, E = codes that are not zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.report.features.firing import Firing
from gossamer.report.features.records import Example, Feature, Group, Histogram, rounded
from gossamer.report.features.wording import Unembedding, Vocabulary

__all__ = ["Amounts", "Book", "histogram"]

_CHUNK = 32
"""Atoms multiplied with the vocabulary, or with all atoms, at a time."""
_LOOKED_AT = 4096
"""Codes tried, best first, for examples that do not overlap."""


@dataclass(frozen=True)
class Amounts:
    """How much is shown of a feature.

    Parameters
    ----------
    top : examples of the largest codes. each : examples of every interval.
    intervals : of equal width. before, after : tokens of context.
    logits : tokens on either side. neighbours : other latents. bins : of histograms.
    """

    top: int = 8
    each: int = 3
    intervals: int = 5
    before: int = 12
    after: int = 8
    logits: int = 10
    neighbours: int = 8
    bins: int = 32


def histogram(values: Tensor, bins: int) -> Histogram:
    """Counts of values between the smallest and the largest of them."""
    if not len(values):
        return Histogram(0.0, 0.0, ())
    low, high = float(values.min()), float(values.max())
    if low == high:
        return Histogram(low, high, (len(values),))
    counts = torch.histc(values.double(), bins, low, high)
    return Histogram(rounded(low), rounded(high), tuple(int(count) for count in counts))


class Book:
    """The latents of a dictionary, described from the codes of a text.

    Parameters
    ----------
    dictionary : whose latents. firing : its codes. vocabulary : spells tokens.
    unembedding : for logits; None leaves them out.
    explanations : words by latent. amounts : how much is shown. seed : of sampled examples.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        firing: Firing,
        vocabulary: Vocabulary,
        unembedding: Unembedding | None = None,
        *,
        explanations: Mapping[int, str] | None = None,
        amounts: Amounts | None = None,
        seed: int = 0,
    ) -> None:
        self.dictionary, self.firing, self.vocabulary = dictionary, firing, vocabulary
        self.unembedding = unembedding
        self.explanations = dict(explanations or {})
        self.amounts = Amounts() if amounts is None else amounts
        self.seed = seed

    def __len__(self) -> int:
        return self.dictionary.d_sae

    # -- of all latents --------------------------------------------------------------------

    @property
    def l0(self) -> float:
        """Codes of a token, on average."""
        return len(self.firing.values) / max(1, self.firing.rows)

    @cached_property
    def density(self) -> Tensor:
        """(M,), share of tokens each latent fires on."""
        return self.firing.counts.double() / max(1, self.firing.rows)

    @cached_property
    def top(self) -> Tensor:
        """(M,), largest code, 0 where there is none above."""
        return self._reduced("amax")

    @cached_property
    def bottom(self) -> Tensor:
        """(M,), smallest code, 0 where there is none below."""
        return self._reduced("amin")

    @cached_property
    def mean(self) -> Tensor:
        """(M,), mean of the codes that are not zero."""
        return self._reduced("sum") / self.firing.counts.clamp_min(1)

    def _reduced(self, how: str) -> Tensor:
        zero = torch.zeros(len(self))
        return zero.scatter_reduce_(0, self.firing.latents(), self.firing.values, how)

    @cached_property
    def fires(self) -> tuple[Tensor, Tensor]:
        """Tokens (K,) that latents fire on, by summed size, and where each latent's begin.

        Sorted by latent, and within a latent the largest sum first.
        """
        firing = self.firing
        ids = firing.tokens.input_ids.reshape(-1)
        size = int(ids.max()) + 1
        keys = firing.latents() * size + ids[firing.places.long()]
        pairs, which = keys.unique(return_inverse=True)
        sums = torch.zeros(len(pairs), dtype=torch.float64)
        sums.scatter_add_(0, which, firing.values.double().abs())
        latents = pairs // size
        order = torch.sort(sums, descending=True, stable=True).indices
        order = order[torch.sort(latents[order], stable=True).indices]
        counts = torch.bincount(latents, minlength=len(self))
        return (pairs % size)[order], torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def tokens_of(self, latent: int, most: int = 4) -> tuple[str, ...]:
        """The tokens a latent fires on most, by summed size of its codes."""
        tokens, starts = self.fires
        first, last = int(starts[latent]), int(starts[latent + 1])
        return self.vocabulary(tokens[first : min(last, first + most)].tolist())

    @cached_property
    def _unit(self) -> Tensor:
        return nn.functional.normalize(self.dictionary.W_dec.detach().float(), dim=1)

    # -- of some ---------------------------------------------------------------------------

    def effects(self, latents: Sequence[int]) -> Tensor | None:
        """(F, V), change of the logits by the atoms of some latents, or None."""
        if self.unembedding is None:
            return None
        first, last = self.dictionary.metadata.get("writes") or (0, None)
        return self.unembedding(self.dictionary.W_dec.detach()[list(latents), first:last])

    def features(self, latents: Sequence[int]) -> Iterator[Feature]:
        """Latents in the order given, each in full."""
        for start in range(0, len(latents), _CHUNK):
            some = list(latents[start : start + _CHUNK])
            effects = self.effects(some)
            cosines = (self._unit[some] @ self._unit.T).cpu()
            for place, latent in enumerate(some):
                effect = None if effects is None else effects[place]
                yield self._feature(latent, effect, cosines[place])

    def feature(self, latent: int) -> Feature:
        """One latent in full."""
        return next(self.features([latent]))

    def _feature(self, latent: int, effect: Tensor | None, cosine: Tensor) -> Feature:
        amounts, (places, values) = self.amounts, self.firing.of(latent)
        positive, negative = self._logits(effect)
        return Feature(
            index=latent,
            density=float(self.density[latent]),
            top=float(self.top[latent]),
            bottom=float(self.bottom[latent]),
            mean=float(self.mean[latent]),
            fires=self.tokens_of(latent),
            histogram=histogram(values, amounts.bins),
            positive=positive,
            negative=negative,
            logits=histogram(torch.empty(0) if effect is None else effect, amounts.bins),
            neighbours=self._neighbours(latent, cosine),
            groups=tuple(self._groups(latent, places.long(), values)),
            explanation=self.explanations.get(latent, ""),
        )

    def _logits(self, effect: Tensor | None) -> tuple[tuple[tuple[str, float], ...], ...]:
        if effect is None:
            return (), ()
        most = min(self.amounts.logits, len(effect))
        found = []
        for largest in (True, False):
            values, tokens = effect.topk(most, largest=largest)
            words = self.vocabulary(tokens.tolist())
            found.append(tuple(zip(words, map(rounded, values.tolist()), strict=True)))
        return tuple(found)

    def _neighbours(self, latent: int, cosine: Tensor) -> tuple[tuple[int, float], ...]:
        others = cosine.abs().clone()
        others[latent] = -1
        chosen = others.topk(min(self.amounts.neighbours, len(others) - 1)).indices.tolist()
        return tuple((index, rounded(float(cosine[index]))) for index in chosen)

    # -- examples --------------------------------------------------------------------------

    def _groups(self, latent: int, places: Tensor, values: Tensor) -> Iterator[Group]:
        if not len(values):
            return
        low, high, amounts = float(values.min()), float(values.max()), self.amounts

        def group(kind: str, order: Tensor, most: int, span: tuple[float, float], share: float):
            chosen = self._apart(order, places, most)
            if kind == "interval":
                chosen.sort(key=lambda one: -float(values[one]))
            examples = tuple(self._example(one, places, values) for one in chosen)
            return Group(kind, rounded(span[0]), rounded(span[1]), rounded(share), examples)

        if high > 0:
            order = torch.sort(values, descending=True, stable=True).indices
            above = order[: int((values > 0).sum())]
            yield group("top", above, amounts.top, (0.0, high), len(above) / len(values))
        if low < 0:
            order = torch.sort(values, stable=True).indices
            below = order[: int((values < 0).sum())]
            yield group("bottom", below, amounts.top, (low, 0.0), len(below) / len(values))
        if low == high:
            return
        generator = torch.Generator().manual_seed(self.seed + latent)
        shuffled = torch.randperm(len(values), generator=generator)
        edges = torch.linspace(low, high, amounts.intervals + 1, dtype=torch.float64)
        bins = torch.bucketize(values.double(), edges[1:-1], right=True)
        for number in reversed(range(amounts.intervals)):
            inside = shuffled[bins[shuffled] == number]
            span = float(edges[number]), float(edges[number + 1])
            if len(inside):
                share = len(inside) / len(values)
                yield group("interval", inside, amounts.each, span, share)

    def _apart(self, order: Tensor, places: Tensor, most: int) -> list[int]:
        """The first codes, in an order, whose contexts do not overlap."""
        chosen: list[int] = []
        taken: list[int] = []
        gap, length = self.amounts.before + self.amounts.after, self.firing.tokens.length
        for one in order[:_LOOKED_AT].tolist():
            place = int(places[one])
            near = (t for t in taken if t // length == place // length)
            if all(abs(place - t) > gap for t in near):
                chosen.append(one)
                taken.append(place)
                if len(chosen) == most:
                    break
        return chosen

    def _example(self, one: int, places: Tensor, values: Tensor) -> Example:
        place, length = int(places[one]), self.firing.tokens.length
        window = place // length * length
        first = max(window, place - self.amounts.before)
        last = min(window + length, place + self.amounts.after + 1)
        real = self.firing.tokens.attention_mask.reshape(-1)[first:last]
        ids = self.firing.tokens.input_ids.reshape(-1)[first:last]
        here = torch.zeros(last - first)
        low, high = torch.searchsorted(places, torch.tensor([first, last])).tolist()
        here[places[low:high] - first] = values[low:high]
        return Example(
            self.vocabulary(ids[real].tolist()),
            tuple(rounded(value) for value in here[real].tolist()),
            int(real[: place - first].sum()),
        )
