"""Windows: where a latent fires and where it does not, as a judge is shown them.

Shapes: N = windows of the data, T = tokens, M = latents, W = tokens of a shown window.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import GossamerError, check_count

__all__ = ["Firings", "Sample", "Window", "samples_of"]

OPEN, CLOSE = "<<", ">>"


@dataclass(frozen=True)
class Window:
    """A piece of text with a latent's values.

    Parameters
    ----------
    words : one text a token. values : the latent's value at each, 0 where it is silent.
    """

    words: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def active(self) -> tuple[int, ...]:
        """Places where the latent fires."""
        return tuple(i for i, value in enumerate(self.values) if value)

    def text(self, marked: Sequence[int] = ()) -> str:
        """The window as text, with these places marked ``<<so>>``."""
        shown = (_marked(word) if i in set(marked) else word for i, word in enumerate(self.words))
        return "".join(shown).strip()


def _marked(word: str) -> str:
    body = word.strip()
    lead = word[: len(word) - len(word.lstrip())]
    return f"{lead}{OPEN}{body}{CLOSE}"


@dataclass(frozen=True)
class Sample:
    """What a judge sees of one latent.

    Parameters
    ----------
    latent : its number. shown : windows it fires in, to explain it by.
    active, silent : windows to test an explanation by, where it fires and where it does not.
    """

    latent: int
    shown: tuple[Window, ...]
    active: tuple[Window, ...]
    silent: tuple[Window, ...]


@dataclass(frozen=True, eq=False)
class Firings:
    """Every firing of every latent over some windows, as columns.

    Parameters
    ----------
    ids : (N, T) tokens. real : (N, T) bool; padding and tokens left out are False.
    row, place, latent, value : (E,) one entry a firing. width : M.
    """

    ids: Tensor
    real: Tensor
    row: Tensor
    place: Tensor
    latent: Tensor
    value: Tensor
    width: int

    def of(self, latent: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, place and value of the firings of a latent, at real tokens only."""
        at = (self.latent == latent) & self.real[self.row, self.place]
        return self.row[at], self.place[at], self.value[at]

    def alive(self, least: int) -> list[int]:
        """Latents that fire in at least so many windows."""
        at = self.real[self.row, self.place]
        pairs = torch.unique(self.latent[at] * len(self.ids) + self.row[at])
        counts = torch.bincount(pairs // len(self.ids), minlength=self.width)
        return (counts >= least).nonzero()[:, 0].tolist()


def _window(
    firings: Firings, row: int, centre: int, dense: Tensor, length: int, say: Callable[[int], str]
) -> Window:
    """``length`` tokens around a place, without padding."""
    real = firings.real[row].nonzero()[:, 0]
    first, last = int(real[0]), int(real[-1]) + 1
    start = max(first, min(centre - length // 2, last - length))
    span = range(start, min(start + length, last))
    ids = firings.ids[row].tolist()
    return Window(tuple(say(ids[i]) for i in span), tuple(float(dense[i]) for i in span))


def _by_quantile(values: Tensor, count: int, quantiles: int, generator: torch.Generator) -> Tensor:
    """Places of ``count`` values, as many from each tenth of their order as there are."""
    order = values.argsort(descending=True, stable=True)
    groups = [g[torch.randperm(len(g), generator=generator)] for g in order.tensor_split(quantiles)]
    picked: list[int] = []
    turn = 0
    while len(picked) < min(count, len(values)):
        picked += [int(g[turn]) for g in groups if turn < len(g)]
        turn += 1
    return torch.tensor(picked[:count])


def samples_of(
    firings: Firings,
    latents: Sequence[int],
    say: Callable[[int], str],
    *,
    shown: int = 40,
    tested: int = 50,
    length: int = 32,
    quantiles: int = 10,
    neighbours: Tensor | None = None,
    seed: int = 0,
) -> Iterator[Sample]:
    """Windows of latents, each from another window of the data.

    Windows to explain by and to test by are drawn evenly from the tenths of the peak values:
    the strongest alone would make explanations too narrow. The two never share a window of the
    data.

    Parameters
    ----------
    say : token to its text. shown, tested : windows to explain by, and to test by of each kind.
    length : tokens of a window. quantiles : groups of peak values.
    neighbours : (M, M') latents alike to each; silent windows are then those where one of them
        fires, hard to tell apart. None: any window without a firing.

    Raises
    ------
    GossamerError
        If a latent fires in fewer than 2 windows or is silent in none.
    """
    check_count("shown", shown, 1)
    check_count("tested", tested, 1)
    check_count("length", length, 1)
    for latent in latents:
        yield _sample(
            firings, latent, say, shown, tested, length, quantiles, neighbours, seed + latent
        )


def _sample(
    firings: Firings,
    latent: int,
    say: Callable[[int], str],
    shown: int,
    tested: int,
    length: int,
    quantiles: int,
    neighbours: Tensor | None,
    seed: int,
) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    row, place, value = firings.of(latent)
    dense = torch.zeros(firings.ids.shape, dtype=torch.float32)
    dense[row, place] = value.float()
    peak, centre = dense.abs().max(1)
    on = peak.nonzero()[:, 0]
    off = ((peak == 0) & firings.real.any(1)).nonzero()[:, 0]
    if len(on) < 2 or not len(off):
        raise GossamerError(
            f"latent {latent} fires in {len(on)} windows and is silent in {len(off)}; give more "
            "text or leave it out"
        )
    explain = min(shown, len(on) // 2)
    picked = _by_quantile(peak[on], explain + tested, quantiles, generator)
    # The order above goes round the quantiles, so every other one keeps both parts even.
    turn = torch.randperm(len(picked), generator=generator)
    first, second = on[picked[turn[:explain]]], on[picked[turn[explain:]]]

    def cut(rows: Tensor, centres: Tensor) -> tuple[Window, ...]:
        return tuple(_window(firings, int(r), int(centres[r]), dense[r], length, say) for r in rows)

    off, middle = _silent(firings, off, latent, neighbours, generator)
    off = off[: min(tested, len(second))]
    return Sample(latent, cut(first, centre), cut(second, centre), cut(off, middle))


def _silent(
    firings: Firings,
    off: Tensor,
    latent: int,
    neighbours: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Silent rows in random order, those where a neighbour fires first, and their centres (N,)."""
    counts = firings.real.sum(1).clamp_min(1)
    skip = (torch.rand(len(counts), generator=generator) * counts).long()
    first = firings.real.int().argmax(1)
    middle = first + skip
    off = off[torch.randperm(len(off), generator=generator)]
    if neighbours is None:
        return off, middle
    near = torch.isin(firings.latent, neighbours[latent])
    hit = torch.zeros(len(counts), dtype=torch.bool)
    hit[firings.row[near]] = True
    middle = middle.clone()
    middle[firings.row[near]] = firings.place[near]
    return torch.cat([off[hit[off]], off[~hit[off]]]), middle
