"""Spans: for every key-value head a window alpha + beta * N that grows with the text's length N.

The file form is that of the official code of MoA: ``{"alphas": [[...]], "betas": [[...]]}``, one
list a layer, one number a query head.
Shapes: L = layers, G = key-value heads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any

from gossamer.core import GossamerError

__all__ = ["Spans", "read_spans", "write_spans"]

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Spans:
    """Window lengths by layer and key-value head.

    Parameters
    ----------
    alphas : tokens, (L, G); may be negative. betas : share of the length, (L, G), 0 to 1.
    block : spans are rounded up to a multiple of this.

    Examples
    --------
    >>> Spans(((0.0, 64.0),), ((0.5, 0.0),), block=64).at(0, 1000)
    (512, 64)
    """

    alphas: Rows
    betas: Rows
    block: int = 64

    def __post_init__(self) -> None:
        shapes = [[len(row) for row in rows] for rows in (self.alphas, self.betas)]
        if shapes[0] != shapes[1] or not shapes[0] or min(shapes[0]) < 1:
            raise GossamerError(
                f"alphas have {shapes[0]} heads a layer and betas {shapes[1]}; "
                "give one of each for every head"
            )
        numbers = [x for rows in (self.alphas, self.betas) for row in rows for x in row]
        if not all(isfinite(x) for x in numbers):
            raise GossamerError("alphas or betas hold a value that is no finite number")
        if any(not 0 <= x <= 1 for row in self.betas for x in row):
            raise GossamerError("a beta lies outside 0 to 1; it is a share of the text's length")

    def at(self, layer: int, length: int) -> tuple[int, ...]:
        """Latest keys a query reads, the query's own included, per head; at least one block."""
        pairs = zip(self.alphas[layer], self.betas[layer], strict=True)
        return tuple(round_up(alpha + beta * length, self.block) for alpha, beta in pairs)

    def reach(self, layer: int, length: int) -> tuple[int, ...]:
        """Per head, a position before which no query reads once the text has so many tokens.

        Spans grow by whole blocks, so a query may read further back than the one before it; the
        positions are those that no later query falls behind. Negative: everything is read.
        """
        found = []
        spans = self.at(layer, length)
        for alpha, beta, span in zip(self.alphas[layer], self.betas[layer], spans, strict=True):
            oldest = length - span
            # The span becomes a block longer at the first length with alpha + beta N > span; from
            # there on lengths grow no slower than spans.
            longer = (span - alpha) / beta if beta > 0 else inf
            if longer < oldest + span + self.block + 2:
                oldest = min(oldest, max(length + 1, int(longer)) - span - self.block - 1)
            found.append(oldest)
        return tuple(found)

    @property
    def layers(self) -> int:
        return len(self.alphas)

    def heads(self, layer: int) -> int:
        """Key-value heads of a layer."""
        return len(self.alphas[layer])


def round_up(span: float, block: int) -> int:
    """The next multiple of a block, at least one.

    >>> round_up(65.0, 64), round_up(-3.0, 64)
    (128, 64)
    """
    # Products such as 0.3 * 640 must not fall just above the multiple they mean.
    return max(1, ceil(span / block - 1e-9)) * block


def read_spans(path: str | Path, heads: Sequence[int], block: int = 64) -> Spans:
    """Spans from a file; heads that share keys take the longest span among them.

    Parameters
    ----------
    heads : key-value heads of every layer of the model.

    Raises
    ------
    GossamerError
        If there is no such file, or it is of another model.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise GossamerError(f"no spans can be read from {path}: {error.strerror}") from None
    except ValueError:
        raise GossamerError(f"{path} is no JSON; spans are stored as alphas and betas") from None
    if not isinstance(found, Mapping) or not {"alphas", "betas"} <= found.keys():
        raise GossamerError(f"{path} holds no 'alphas' and 'betas'; give a file of spans")
    alphas, betas = found["alphas"], found["betas"]
    if len(alphas) != len(heads) or len(betas) != len(heads):
        raise GossamerError(
            f"{path} holds spans of {len(alphas)} layers, the model has {len(heads)}; "
            "plan them on this model"
        )
    layers = [
        _shared(a, b, count, layer, path)
        for layer, (a, b, count) in enumerate(zip(alphas, betas, heads, strict=True))
    ]
    return Spans(tuple(a for a, _ in layers), tuple(b for _, b in layers), block)


def _shared(
    alphas: Any, betas: Any, count: int, layer: int, path: str | Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Alphas and betas by key-value head, from those by query head."""
    if len(alphas) != len(betas) or not alphas or len(alphas) % count:
        raise GossamerError(
            f"{path} holds {len(alphas)} alphas and {len(betas)} betas in layer {layer}, where "
            f"the model has {count} key-value heads; plan the spans on this model"
        )
    group = len(alphas) // count
    chosen = []
    for head in range(count):
        members = list(zip(alphas, betas, strict=True))[head * group : (head + 1) * group]
        # Longest at long texts: that is what keeps every member's keys.
        chosen.append(max(members, key=lambda pair: (pair[1], pair[0])))
    return tuple(float(a) for a, _ in chosen), tuple(float(b) for _, b in chosen)


def write_spans(spans: Spans, path: str | Path, repeat: int = 1) -> None:
    """Write spans as the official code reads them.

    Parameters
    ----------
    repeat : query heads that share a key-value head; each gets its own entry.
    """
    plain = {
        name: [[value for value in row for _ in range(repeat)] for row in rows]
        for name, rows in (("alphas", spans.alphas), ("betas", spans.betas))
    }
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    partial.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    partial.replace(target)
