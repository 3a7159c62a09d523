"""Wording: tokens as text, and which of them an atom speaks for or against.

Shapes: D = width of the residual stream, V = vocabulary, F = atoms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.models import find_sites

__all__ = ["Unembedding", "Vocabulary"]


class Vocabulary:
    """Token ids as the text they stand for, spaces kept.

    Parameters
    ----------
    source : a tokenizer, or a list with every token's text.
    """

    def __init__(self, source: Any) -> None:
        self._list: Sequence[str] | None = source if isinstance(source, list | tuple) else None
        self._tokenizer: Any = source
        self._known: dict[int, str] = {}
        pieces = [] if self._list is not None else list(self._tokenizer.get_vocab())
        # WordPiece marks what continues a word; everything else begins one.
        self._continued = sum(piece.startswith("##") for piece in pieces) > len(pieces) // 100

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def __call__(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Texts of several tokens."""
        return tuple(self[token] for token in tokens)

    def _spell(self, token: int) -> str:
        if self._list is not None:
            return str(self._list[token]) if token < len(self._list) else f"<{token}>"
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"<{token}>"
        if self._continued:
            return piece[2:] if piece.startswith("##") else f" {piece}"
        if "▁" in piece:
            return piece.replace("▁", " ")
        # Part of a character is spelt as the sign for what cannot be shown.
        return self._tokenizer.decode([token]) or piece


class Unembedding:
    """The direct way from the residual stream to the logits: the last norm's gain, then the head.

    The norm's scale depends on the token and is left out, so changes of logits are right up to
    one positive factor. What later blocks make of an atom is not counted.

    Parameters
    ----------
    weight : (V, D). gain : (D,). centred : the norm subtracts the mean.
    """

    def __init__(self, weight: Tensor, gain: Tensor, *, centred: bool) -> None:
        self.weight, self.gain, self.centred = weight, gain, centred

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, width: int) -> "Unembedding | None":
        """That of a model; None where it has no head that reads so many channels."""
        try:
            sites = find_sites(model)
        except GossamerError:
            return None
        head = None if sites.head is None else model.get_submodule(sites.head)
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != width:
            return None
        base = model.get_submodule(sites.base)
        norms = [child for child in base.children() if "norm" in type(child).__name__.lower()]
        norm = norms[-1] if norms else nn.Identity()
        weight = weight.detach()
        gain, centred = _gain(norm, weight)
        return cls(weight, gain, centred=centred)

    @torch.no_grad()
    def __call__(self, atoms: Tensor) -> Tensor:
        """(F, D) to (F, V), float32: change of every logit."""
        if self.centred:
            atoms = atoms - atoms.mean(1, keepdim=True)
        moved = (atoms.to(self.weight.device) * self.gain).to(self.weight.dtype)
        return (moved @ self.weight.T).float().cpu()


def _gain(norm: nn.Module, like: Tensor) -> tuple[Tensor, bool]:
    """A norm's gain for each channel, and whether it centres: read off what it does.

    Alternating signs have mean 0 and mean square 1, so a norm returns its gain times them, plus
    its bias; so it is for any way of storing the gain.
    """
    width = like.shape[1]
    ones = torch.ones(1, width, dtype=like.dtype, device=like.device)
    signs = ones.clone()
    signs[:, 1::2] = -1
    gain = (norm(signs) - norm(-signs)) / 2 * signs
    level = (norm(ones) - norm(-ones)) / 2
    return gain[0].float(), float(level.abs().max()) < 1e-3 * float(gain.abs().max())
