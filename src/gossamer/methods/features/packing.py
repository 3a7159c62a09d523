"""Packing: documents laid into windows, and which of their tokens may see and teach what.

``none`` gives every document its own window; ``concat`` joins them and cuts, so that a window's
text runs on from document to document; ``varlen`` puts several in a window that do not see one
another: attention stays inside a document and positions start anew, so the activations are those
of ``none`` at the speed of ``concat``.
Shapes: W = windows, T = tokens of a window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count, unknown

__all__ = ["Packed", "chat_documents", "pack", "special_ids"]

Packing = Literal["none", "concat", "varlen"]
_PACKINGS = ("none", "concat", "varlen")
_BOS = ("add", "keep", "drop")


@dataclass(frozen=True, eq=False)
class Packed:
    """Documents in windows.

    Parameters
    ----------
    input_ids : int64 (W, T), 0 where padded.
    segments : int64 (W, T), number of the document a token belongs to; -1 is padding.
    positions : int64 (W, T), place of a token in what it can see.
    keep : bool (W, T), tokens that become rows.
    separate : attention stays inside a document.
    facts : JSON-able: how it was packed.
    """

    input_ids: Tensor
    segments: Tensor
    positions: Tensor
    keep: Tensor
    separate: bool
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def attention_mask(self) -> Tensor:
        """(W, T) bool, True for real tokens."""
        return self.segments >= 0

    @property
    def count(self) -> int:
        """Tokens that become rows."""
        return int(self.keep.sum())

    def rows(self, at: Tensor, *, skip_first: bool = False) -> Tensor:
        """Which tokens of some windows become rows; ``skip_first`` drops each document's first."""
        keep = self.keep[at]
        return keep & self._continues()[at] if skip_first else keep

    def _continues(self) -> Tensor:
        """Tokens whose left neighbour is of their document."""
        same = self.segments[:, 1:] == self.segments[:, :-1]
        return torch.cat([same.new_zeros(len(same), 1), same], 1)

    def batch(self, at: Tensor, model: nn.Module, device: Any) -> dict[str, Any]:
        """Keyword arguments of the model for some windows.

        Raises
        ------
        GossamerError
            If documents are to be kept apart and the model's attention cannot.
        """
        ids, segments = self.input_ids[at].to(device), self.segments[at].to(device)
        real = segments >= 0
        batch: dict[str, Any] = {"input_ids": ids}
        if not self.separate:
            return batch if bool(real.all()) else {**batch, "attention_mask": real.long()}
        _check_window(model, self.length)
        allowed = (segments[:, :, None] == segments[:, None, :]) & real[:, :, None]
        if _is_causal(model):
            allowed = allowed.tril()
        # A row of padding sees itself: a softmax over nothing is NaN.
        allowed |= torch.eye(self.length, dtype=torch.bool, device=device)
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        mask = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
        return {**batch, "attention_mask": mask, "position_ids": self.positions[at].to(device)}

    def describe(self) -> dict[str, Any]:
        """How it was packed, JSON-able."""
        return dict(self.facts)


def _is_causal(model: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def _check_window(model: nn.Module, length: int) -> None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(text, "sliding_window", None)
    used = getattr(text, "use_sliding_window", True)
    if isinstance(window, int) and used and window < length:
        raise GossamerError(
            f"the model attends to {window} tokens and the windows hold {length}; pack 'varlen' "
            f"into windows of at most {window}, or use packing 'none'"
        )


def pack(
    documents: Iterable[Sequence[int]],
    *,
    length: int,
    packing: Packing = "concat",
    bos: int | None = None,
    bos_policy: Literal["add", "keep", "drop"] = "keep",
    separator: int | None = None,
    special: Iterable[int] = (),
) -> Packed:
    """Lay tokenised documents into windows.

    Documents longer than a window go on in the next one, without the text before. With
    ``varlen`` a piece goes into the first window that has room for it.

    Parameters
    ----------
    documents : token ids of each. length : T, at least 2.
    packing : ``none``, ``concat`` or ``varlen``.
    bos : the token that opens a text, for ``bos_policy``.
    bos_policy : ``add`` one where a document, or with ``concat`` a window, lacks it; ``drop`` the
        one a document opens with; ``keep`` takes documents as they are. With ``concat`` a
        document's own opening token never lands in the middle of a window unless kept.
    separator : token between documents joined by ``concat``.
    special : ids whose tokens are computed and seen but become no rows.

    Raises
    ------
    GossamerError
        For unknown words, a missing ``bos``, or when there is not one token.
    """
    check_count("length", length, 2)
    if packing not in _PACKINGS:
        raise unknown("packing", packing, _PACKINGS)
    if bos_policy not in _BOS:
        raise unknown("bos_policy", bos_policy, _BOS)
    if bos is None and bos_policy != "keep":
        raise GossamerError(f"bos_policy {bos_policy!r} needs the opening token; give bos")
    texts = [list(map(int, document)) for document in documents]
    if bos_policy != "keep":
        texts = [text[1:] if text and text[0] == bos else text for text in texts]
    opening = [bos] if bos_policy == "add" and bos is not None else []
    if packing == "concat":
        windows = _concat(texts, length, opening, separator)
    else:
        pieces = _pieces(texts, length, opening)
        windows = [[piece] for piece in pieces] if packing == "none" else _fit(pieces, length)
    if not windows:
        raise GossamerError("the documents hold no tokens; give longer text")
    special = sorted(set(special))
    facts = {
        "packing": packing,
        "documents": len(texts),
        "bos_policy": bos_policy,
        "prepend_bos": bos_policy == "add",
        "special_tokens": "left out" if special else "kept",
        "special_ids": special,
    }
    return _lay(windows, packing, special, facts)


_Piece = tuple[int, list[int]]
"""Number of the document, and tokens."""


def _pieces(texts: list[list[int]], length: int, opening: list[int]) -> list[_Piece]:
    body = length - len(opening)
    return [
        (number, opening + text[start : start + body])
        for number, text in enumerate(texts)
        for start in range(0, len(text), body)
    ]


def _fit(pieces: list[_Piece], length: int) -> list[list[_Piece]]:
    windows: list[list[_Piece]] = []
    room: list[int] = []
    first = 0
    for piece in pieces:
        need = len(piece[1])
        place = next((i for i in range(first, len(room)) if room[i] >= need), len(room))
        if place == len(room):
            windows.append([])
            room.append(length)
        windows[place].append(piece)
        room[place] -= need
        # Windows that are nearly full are not looked at again: packing stays linear.
        while first < len(room) and (room[first] < length // 32 or len(room) - first > 64):
            first += 1
    return windows


def _concat(
    texts: list[list[int]], length: int, opening: list[int], separator: int | None
) -> list[list[_Piece]]:
    stream: list[tuple[int, int]] = []
    for number, text in enumerate(texts):
        stream += [(number, token) for token in text]
        if separator is not None and text:
            stream.append((number, separator))
    body = length - len(opening)
    windows: list[list[_Piece]] = []
    for start in range(0, len(stream), body):
        window: list[_Piece] = []
        for number, token in stream[start : start + body]:
            if not window or window[-1][0] != number:
                window.append((number, []))
            window[-1][1].append(token)
        window[0] = (window[0][0], opening + window[0][1])
        windows.append(window)
    return windows


def _lay(
    windows: list[list[_Piece]], packing: str, special: list[int], facts: dict[str, Any]
) -> Packed:
    width = max(sum(len(tokens) for _, tokens in window) for window in windows)
    ids = torch.zeros(len(windows), width, dtype=torch.int64)
    segments, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    for row, window in enumerate(windows):
        at = 0
        for place, (number, tokens) in enumerate(window):
            span = slice(at, at + len(tokens))
            ids[row, span] = torch.tensor(tokens)
            # Two pieces of one document in a window do not see each other either.
            segments[row, span] = number if packing == "concat" else number * width + place
            start = at if packing == "concat" else 0
            positions[row, span] = torch.arange(start, start + len(tokens))
            at += len(tokens)
    keep = segments >= 0
    if special:
        keep &= ~torch.isin(ids, torch.tensor(special))
    if packing != "concat":
        # Numbers of pieces, dense again.
        _, dense = segments[segments >= 0].unique(return_inverse=True)
        segments[segments >= 0] = dense
    return Packed(ids, segments, positions, keep, packing == "varlen", facts)


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids a tokenizer calls special: they carry roles, not text."""
    return tuple(sorted(set(getattr(tokenizer, "all_special_ids", None) or ())))


def chat_documents(
    tokenizer: Any, conversations: Iterable[Sequence[dict[str, str]]]
) -> list[list[int]]:
    """Conversations as documents, each through the model's own chat template.

    Parameters
    ----------
    conversations : of messages with ``role`` and ``content``.

    Raises
    ------
    GossamerError
        If the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GossamerError(
            f"{type(tokenizer).__name__} has no chat template; use the tokenizer of an instruction "
            "model, or give plain texts"
        )
    return [
        list(tokenizer.apply_chat_template(list(c), tokenize=True, return_dict=False))
        for c in conversations
    ]
