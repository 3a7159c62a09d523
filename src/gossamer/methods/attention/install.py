"""Installing an attention function in a transformers model, and taking it out again.

Transformers finds attention functions by name in two tables, one for the function and one for
the masks it is given; a name in only the first makes it drop padding in silence. The name sits
in the model's config, and a config object may be shared by several models. So each installation
registers one new name in both tables and gives the model its own copy of every config; undoing
puts the original objects back and removes the name from both tables.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.attention.layout import Layout

__all__ = ["Installation", "layout_mask", "layout_of"]

_PREFIX = "gossamer_"
_NUMBER = count()


class Installation:
    """One attention function at work in one model.

    Parameters
    ----------
    model : a transformers decoder.
    name : of the method, for the tables and messages.
    attentions : paths of the model's attention modules.
    forward : the attention function, in the signature transformers calls.

    Raises
    ------
    GossamerError
        If the model is no causal decoder, does not read the tables, or has a method installed
        already. The model and the tables are then as before.
    """

    def __init__(
        self, model: nn.Module, name: str, attentions: Iterable[str], forward: Callable[..., Any]
    ) -> None:
        _check(model, name, attentions)
        self.name = f"{_PREFIX}{name}_{next(_NUMBER)}"
        self._replaced: list[tuple[nn.Module, str, Any, Any]] = []
        try:
            for table, function in zip(_tables(), (forward, layout_mask), strict=True):
                # Which executor runs depends on values, so a compiled model runs it as it is.
                table.register(self.name, torch.compiler.disable(function))
            self._own_configs(model)
            cast(Any, model).set_attn_implementation(_request(model, self.name))
        except BaseException:
            self.undo()
            raise

    def _own_configs(self, model: nn.Module) -> None:
        from transformers import PreTrainedConfig

        copies: dict[int, Any] = {}
        for module in model.modules():
            for attribute, value in list(vars(module).items()):
                if isinstance(value, PreTrainedConfig):
                    copy = deepcopy(value, copies)
                    self._replaced.append((module, attribute, value, copy))
                    setattr(module, attribute, copy)

    def undo(self) -> None:
        """Give the model its configs back and forget the name. A second call does nothing."""
        for module, attribute, original, copy in self._replaced:
            if vars(module).get(attribute) is copy:
                setattr(module, attribute, original)
        self._replaced.clear()
        for table in _tables():
            # The tables offer no way to unregister; this is the mapping that register writes to.
            table._global_mapping.pop(self.name, None)


def _request(model: nn.Module, name: str) -> str | dict[str, str]:
    """The name, asked for the text part alone: a vision tower keeps its own attention."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parts = [key for key in getattr(config, "sub_configs", {}) if getattr(config, key) is text]
    return {"": name, **dict.fromkeys(parts, name)} if parts else name


def _tables() -> tuple[Any, Any]:
    from transformers import AttentionInterface, AttentionMaskInterface

    return AttentionInterface, AttentionMaskInterface


def _check(model: nn.Module, name: str, attentions: Iterable[str]) -> None:
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise GossamerError(f"{name} needs a transformers model; {kind} is none")
    current = str(config._attn_implementation)
    if current.startswith(_PREFIX):
        raise GossamerError(f"{kind} already runs {current}; restore that method first")
    if getattr(config, "is_encoder_decoder", False):
        raise GossamerError(f"{name} works on decoders; {kind} is an encoder-decoder model")
    for path in attentions:
        if not getattr(model.get_submodule(path), "is_causal", True):
            raise GossamerError(
                f"{name} works on causal decoders; the attention of {kind} at {path} is "
                "bidirectional"
            )
    if not cast(Any, model)._can_set_attn_implementation():
        raise GossamerError(
            f"{name} needs a model whose attention can be exchanged; {kind} has its own: "
            "use a transformers version in which it reads the attention interface"
        )


def layout_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | Layout | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    cache_position: Tensor | None = None,
    **options: Any,
) -> Tensor | Layout:
    """Make the mask of a call: the layout itself, not evaluated.

    The signature is that of transformers' mask functions, both the present one and that of 5.0
    (``cache_position`` instead of ``q_length`` and ``q_offset``).

    Raises
    ------
    GossamerError
        If the model asks for a bidirectional mask.
    """
    if options.get("allow_is_bidirectional_skip"):
        raise GossamerError(
            "this attention method is causal; the model asks for a bidirectional mask"
        )
    if isinstance(attention_mask, Layout):
        # ``generate`` makes the masks of a static cache ahead and hands them back.
        return attention_mask
    assert mask_function is not None
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    assert q_length is not None
    start = int(q_offset)
    known = max(start + q_length, kv_offset + kv_length)
    padding = attention_mask
    if padding is not None:
        padding = nn.functional.pad(padding.bool(), (0, max(0, known - padding.shape[1])))[
            :, :known
        ]
        seen = padding[:, : start + q_length]
        padding = None if bool(seen.all()) else padding
    # Without leave to skip, the rule may be packed or look ahead; a single query does neither
    # (a static cache withholds leave there only because the step may be compiled).
    regular = not use_vmap and (allow_is_causal_skip or q_length == 1)
    layout = Layout(
        batch=batch_size,
        queries=q_length,
        keys=kv_length,
        query_offset=start,
        key_offset=kv_offset,
        rule=mask_function,
        padding=padding,
        causal=regular and (local_size is None or kv_length < local_size),
        regular=regular,
        elementwise=use_vmap,
        device=torch.device(device or "cpu"),
    )
    if q_length == 1 and not allow_is_causal_skip:
        return _numbered(layout)
    return layout


def _numbered(layout: Layout) -> Tensor:
    """A single query's layout as a plain tensor, for steps that may be compiled.

    Returns
    -------
    int64, (B, 1, 1, K): logical position of every key the query sees, -1 at the others.
    """
    query, key = layout.query_index.view(1, 1, 1, 1), layout.key_index.view(1, 1, 1, -1)
    position = layout.position[:, layout.key_index][:, None, None]
    numbered = torch.where(layout.sees(query, key), position, -1)
    return numbered.expand(layout.batch, -1, -1, -1).contiguous()


def _from_numbers(numbered: Tensor) -> Layout:
    """Undo :func:`_numbered`; the query stands where the positions are largest."""
    position = numbered[:, 0, 0]
    rows, keys = position.shape
    at = torch.arange(keys, device=position.device)
    query = position.amax(0).argmax()
    # Every row sees all keys up to the query: causality is the whole rule. Asked in one go.
    plain = (position == torch.where(at <= query, at, -1)).all()
    offset, is_plain = torch.stack([query, plain.long()]).tolist()
    if is_plain:
        return Layout(rows, 1, keys, query_offset=offset, device=position.device)
    layout = Layout(
        rows,
        1,
        keys,
        query_offset=offset,
        padding=position >= 0,
        causal=False,
        device=position.device,
    )
    layout.__dict__["position"] = position
    return layout


def layout_of(mask: Tensor | Layout | None, query: Tensor, key: Tensor) -> Layout:
    """The layout behind the mask an attention function was given.

    A ready-made 4-D mask, bool or additive, is read as the model's own rule. It must cover a
    whole prompt: then a token is real where it sees itself.

    Raises
    ------
    GossamerError
        For a ready-made mask over a cache: it does not say where each sequence begins.
    """
    if isinstance(mask, Layout):
        return mask
    if mask is not None and mask.dtype == torch.int64:
        return _from_numbers(mask)
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        return Layout(batch, queries, keys, query_offset=keys - queries, device=query.device)
    if queries != keys or mask.dim() != 4 or mask.shape[1] != 1:
        raise GossamerError(
            f"a ready-made attention mask of shape {tuple(mask.shape)} hides where each sequence "
            "begins; pass the 2-D (batch, length) mask instead"
        )
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen.expand(batch, 1, queries, keys)[:, 0]
    real = seen.diagonal(dim1=1, dim2=2)
    return Layout(
        batch,
        queries,
        keys,
        rule=lambda row, head, at, of: seen[row, at, of],
        padding=None if bool(real.all()) else real,
        causal=False,
        regular=False,
        device=query.device,
    )
