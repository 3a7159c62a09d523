"""A cache layer that gave up some of its keys for good, each head its own.

The layer keeps saying how long the sequence is, so positions, masks and ``generate`` go on as
before; only its tensors are shorter. What :meth:`Shortened.update` returns are plain tensors, the
kept keys of a head followed by the new ones, without a word on where they stood: attention must be
told which of them are padding (``eviction/packed.py``). After the method that shortened it was
restored nobody could tell, so it refuses then.
Shapes: B = sequences, G = key-value heads, D, E = widths of keys and values, M = most kept keys
of a head, N = kept keys in all, T = tokens that came later, Q = queries.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gossamer.core import GossamerError
from gossamer.methods.attention.eviction.ragged import Ragged
from gossamer.methods.attention.memory import watched

__all__ = ["Picked", "Shortened", "become", "held_bytes", "settle", "shorten", "why_not"]


def why_not(layer: Any) -> str | None:
    """Why a cache layer cannot be shortened, or None when it can."""
    if isinstance(layer, Shortened):
        return "it is shortened already"
    if getattr(layer, "is_sliding", False):
        return "it holds a sliding window only"
    names = [c.__name__ for c in type(layer).__mro__]
    plain = {"DynamicLayer", "CacheLayerMixin", "ABC", "object"}
    if "DynamicLayer" not in names or not plain.issuperset(names):
        return f"a {type(layer).__name__} keeps its own form of the keys"
    return None


def shorten(layer: Any, kept: Tensor) -> None:
    """Make a cache layer hold some of its keys only.

    The object stays the same and what others hung on it stays too; only its class and its
    tensors change.

    Parameters
    ----------
    layer : a ``DynamicLayer`` of transformers. kept : bool, (B, G, K); K up to the layer's length;
        keys beyond are all kept.

    Raises
    ------
    GossamerError
        If the layer cannot give up keys.
    """
    reason = why_not(layer)
    if reason is not None:
        raise GossamerError(f"this cache layer cannot be shortened: {reason}")
    keys, values, length = layer.keys, layer.values, kept.shape[2]
    assert kept.shape[:2] == keys.shape[:2]
    assert length <= keys.shape[2]
    become(layer, Shortened)
    layer.kept_keys = Ragged.gather(keys[:, :, :length], kept)
    layer.kept_values = Ragged.gather(values[:, :, :length], kept)
    # At 4 bytes a key; attention does not read them, a user who asks what stayed does.
    layer.places = Ragged(kept.nonzero()[:, 2:].int(), layer.kept_keys.counts)
    layer.removed = length
    # Cloned, because a slice would hold the whole of the old tensors.
    layer.keys, layer.values = keys[:, :, length:].clone(), values[:, :, length:].clone()


def settle(layer: "Shortened", kept: Tensor) -> None:
    """Let a shortened layer give up more: of what it kept, and of the tokens that came later.

    Parameters
    ----------
    kept : bool, (B, G, M + L), of the kept keys, each head's at the right end of its M places, and
        of the first L later tokens; later tokens beyond are all kept.
    """
    most = layer.kept_keys.most
    past = kept.shape[2] - most
    assert 0 <= past <= layer.keys.shape[2]
    for name, later in (("kept_keys", "keys"), ("kept_values", "values")):
        both = _joined(getattr(layer, name), getattr(layer, later)[:, :, :past])
        setattr(layer, name, Ragged.gather(both, kept))
        setattr(layer, later, getattr(layer, later)[:, :, past:].clone())
    places = layer.places.padded(extra=past)
    places[:, :, most:, 0] = torch.arange(past, device=places.device) + layer.removed
    layer.places = Ragged.gather(places, kept)
    layer.removed += past


class Picked(DynamicLayer):
    """A layer whose rows can be picked out; what holds more than keys and values extends _pick."""

    keys: Any
    values: Any

    def _pick(self, rows: Tensor) -> None:
        """Hold rows (n,), int64, in that order."""
        self.keys = self.keys.index_select(0, rows.to(self.keys.device))
        self.values = self.values.index_select(0, rows.to(self.values.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        rows = torch.arange(len(self.keys), device=self.keys.device)
        self._pick(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows only; int64, or bool (B,)."""
        self._pick(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)


class Shortened(Picked):
    """A dynamic layer whose first ``removed`` keys are held in part.

    Attributes
    ----------
    kept_keys, kept_values : what is left of them. places : where those stood, 0 .. removed - 1.
    removed : tokens of which only some are held. keys, values : (B, G, T, D or E), all later ones.
    """

    kept_keys: Ragged
    kept_values: Ragged
    places: Ragged
    removed: int

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return what is held: (B, G, M + T, D or E), each head's keys at the end."""
        if "gossamer_state" not in vars(self):
            raise GossamerError(
                f"this cache holds {self.kept_keys.most} of its first {self.removed} keys and the "
                "method that took the others was restored; start with a new cache"
            )
        super().update(key_states, value_states, *args, **kwargs)
        return _joined(self.kept_keys, self.keys), _joined(self.kept_values, self.values)

    def get_seq_length(self) -> int:
        """Tokens the sequence has, those no longer held included."""
        return self.removed + self.keys.shape[-2] if self.is_initialized else 0

    @property
    def counts(self) -> Tensor:
        """(B, G) keys held of each head."""
        return self.kept_keys.counts + self.keys.shape[2]

    @property
    def size(self) -> int:
        """M + T, places of a head in what :meth:`update` returns."""
        return self.kept_keys.most + self.keys.shape[2]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens.

        Raises
        ------
        GossamerError
            If they reach back to where keys are missing.
        """
        later = self.keys.shape[2] if self.is_initialized else 0
        if abs(tokens_to_remove) > later:
            raise GossamerError(
                f"cannot take back {abs(tokens_to_remove)} tokens: all but the latest {later} keys "
                "of this cache were evicted; start with a new cache"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Hold nothing, as an ordinary layer."""
        super().reset()
        for name in ("kept_keys", "kept_values", "places", "removed"):
            vars(self).pop(name, None)
        become(self, DynamicLayer)

    def _pick(self, rows: Tensor) -> None:
        for name in ("kept_keys", "kept_values", "places"):
            setattr(self, name, getattr(self, name).rows(rows))
        super()._pick(rows)

    def offload(self) -> None:
        """Everything to the CPU."""
        super().offload()
        self._move("cpu")

    def prefetch(self) -> None:
        """Everything back to the device."""
        super().prefetch()
        self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        for name in ("kept_keys", "kept_values", "places"):
            setattr(self, name, getattr(self, name).to(device))


def become(layer: Any, kind: type) -> None:
    """Give a layer another class; one that a selector remembers something of stays watched."""
    layer.__class__ = watched(kind) if "gossamer_state" in vars(layer) else kind


def _joined(kept: Ragged, later: Tensor) -> Tensor:
    """(B, G, M + T, W): one buffer, filled in both parts."""
    out = kept.padded(extra=later.shape[2])
    if later.shape[2]:
        out[:, :, out.shape[2] - later.shape[2] :] = later
    return out


def held_bytes(cache: Any) -> int:
    """Bytes of keys and values a cache really holds, with what locates them.

    Counts memory, not shapes: a slice counts as all it keeps alive.
    """
    seen: dict[int, int] = {}

    def count(thing: Any) -> None:
        if isinstance(thing, Tensor):
            store = thing.untyped_storage()
            seen[store.data_ptr()] = store.nbytes()
        elif isinstance(thing, list):
            for one in thing:
                count(one)
        elif hasattr(thing, "__dataclass_fields__"):
            for name in thing.__dataclass_fields__:
                count(getattr(thing, name))

    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name != "gossamer_state":
                count(value)
    return sum(seen.values())
