"""Tokens leave a prompt at one block: later blocks and the cache never see them again.

Behind the block the hidden states, rotary tables and masks of the kept tokens are gathered, so
later blocks compute less and write shorter caches; the caches of earlier blocks are cut to the
same tokens. Positions stay the original ones. Behind the last block removed tokens reappear with
the state they left with, so that outputs have the shape everybody expects.
Shapes: B rows, T tokens of the prompt, T' kept, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.activations.vlm.tokens import keep_tokens
from gossamer.models import SiteMap
from gossamer.models.capture import hidden_of

__all__ = ["Kept", "TokenPruner", "image_token", "pick"]


@dataclass(frozen=True, eq=False)
class Kept:
    """The tokens of one prompt that are in the cache.

    Parameters
    ----------
    places : int64 (B, T'), their places in the prompt. length : T.
    """

    places: Tensor
    length: int

    @property
    def removed(self) -> int:
        """Tokens taken out of every row."""
        return self.length - self.places.shape[1]


def image_token(model: nn.Module) -> int:
    """The id that stands for image features in a model's input.

    Raises
    ------
    GossamerError
        If the model has none.
    """
    config: Any = getattr(model, "config", None)
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise GossamerError(
            f"{type(model).__name__} has no image tokens to prune; give a vision-language model "
            "whose config names image_token_id"
        )
    return int(token)


def pick(tensor: Tensor, places: Tensor, axis: int) -> Tensor:
    """Rows of a tensor at each batch row's own places along an axis.

    Parameters
    ----------
    tensor : batch first, of size B or 1. places : int64 (B, n).
    """
    if tensor.shape[0] == 1 and len(places) > 1:
        tensor = tensor.expand(len(places), *tensor.shape[1:])
    shape = [1] * tensor.dim()
    shape[0], shape[axis] = places.shape
    wide = list(tensor.shape)
    wide[axis] = places.shape[1]
    return tensor.gather(axis, places.view(shape).expand(wide))


class TokenPruner:
    """The hooks that take image tokens out of prompts.

    Parameters
    ----------
    block : tokens leave behind this block.
    score : (activation (B, T, F), real (B, T), prunable (B, T)) to scores (B, T).
    shrunk : told the (B, T') kept places when tokens leave.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: SiteMap,
        block: int,
        score: Callable[[Tensor, Tensor, Tensor], Tensor],
        shrunk: Callable[[Tensor], None],
    ) -> None:
        self.model, self.sites, self.block = model, sites, block
        self.score, self.shrunk = score, shrunk
        self.token = image_token(model)
        self.base = model.get_submodule(sites.base)
        self.memories: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()
        self.last: Kept | None = None
        self._handles: list[Any] = []
        self._images: Tensor | None = None
        self._end()

    def attach(self) -> None:
        """Put the hooks in place; :meth:`remove` takes them away, also after a failure here."""
        parent = self.model.get_submodule(self.sites.base.rpartition(".")[0])
        names = tuple(signature(parent.forward).parameters)
        blocks = [self.model.get_submodule(path) for path in self.sites.blocks]
        down = next(s for s in self.sites.in_block(self.block) if s.role == "mlp.down")

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = {**dict(zip(names, args, strict=False)), **kwargs}.get("input_ids")
            self._images = None if ids is None else ids == self.token

        def forget(module: nn.Module, args: Any, output: Any) -> None:
            self._images = None

        self._handles += [
            parent.register_forward_pre_hook(see, with_kwargs=True),
            parent.register_forward_hook(forget, always_call=True),
            self.base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.base.register_forward_hook(self._leave, always_call=True),
            self.model.get_submodule(down.module).register_forward_pre_hook(self._measure),
            blocks[self.block].register_forward_hook(self._shrink),
            blocks[-1].register_forward_hook(self._expand),
        ]
        for block in blocks[self.block + 1 :]:
            handle = block.register_forward_pre_hook(self._gather, with_kwargs=True)
            self._handles.append(handle)

    def remove(self) -> None:
        """Take every hook away. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    # -- the pass ------------------------------------------------------------------------------

    def _end(self) -> None:
        self._prunable: Tensor | None = None
        self._real: Tensor | None = None
        self._places: Tensor | None = None
        self._before: Tensor | None = None
        self._cache: Any = None

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._end()
        cache = self._cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        tokens = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        if past:
            kept = self.memories.get(cache)
            return None if kept is None or tokens is None else (args, _later(kept, past, kwargs))
        if self._images is None or tokens is None or not bool(self._images.any()):
            return None
        if cache is not None and getattr(cache, "is_compileable", False):
            raise GossamerError(
                f"a {type(cache).__name__} has fixed places, so tokens cannot leave it; "
                "generate with the default cache"
            )
        self._prunable = self._images
        self._real = torch.ones_like(self._images)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._real = mask.to(self._images.device) != 0
        self._prunable = self._prunable & self._real
        return None

    def _measure(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._prunable is None or self._real is None or self._places is not None:
            return
        scores = self.score(args[0].detach(), self._real, self._prunable)
        self._places = keep_tokens(scores, self._prunable)

    def _shrink(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._places is None:
            return None
        self._before = hidden_of(output)
        self.shrunk(self._places)
        return _replace(output, pick(self._before, self._places, 1))

    def _gather(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        places = self._places
        if places is None:
            return None
        changed = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor):
            square = mask.dim() == 4
            once = pick(mask, places, 2 if square else 1)
            changed["attention_mask"] = pick(once, places, 3) if square else once
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            changed["position_embeddings"] = tuple(pick(table, places, 1) for table in tables)
        ids = kwargs.get("position_ids")
        if isinstance(ids, Tensor):
            changed["position_ids"] = pick(ids, places, 1)
        return args, changed

    def _expand(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._places is None or self._before is None:
            return None
        hidden = hidden_of(output)
        index = self._places[..., None].expand(-1, -1, hidden.shape[-1])
        return _replace(output, self._before.scatter(1, index, hidden))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        prunable, places, cache = self._prunable, self._places, self._cache
        self._end()
        if prunable is None or output is None:
            return
        length = prunable.shape[1]
        if places is None:
            places = torch.arange(length, device=prunable.device).expand(prunable.shape)
        self.last = Kept(places, length)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is None or not self.last.removed:
            return
        for layer in cache.layers[: self.block + 1]:
            layer.keys, layer.values = (pick(t, places, 2) for t in (layer.keys, layer.values))
        self.memories[cache] = self.last


def _later(kept: Kept, past: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pass behind a pruned prompt: a mask of the kept keys, original positions."""
    changed = dict(kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + kept.removed:
        first = pick(mask[:, : kept.length], kept.places.to(mask.device), 1)
        changed["attention_mask"] = torch.cat([first, mask[:, kept.length :]], 1)
    if kwargs.get("position_ids") is None:
        tokens: Tensor = kwargs["inputs_embeds"]
        start = past + kept.removed
        place = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        changed["position_ids"] = place[None]
    return changed


def _replace(output: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])
