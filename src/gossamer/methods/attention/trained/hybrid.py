"""Writing a model with full and sliding layers as one that plain transformers loads.

Transformers knows hybrid models by ``layer_types`` and ``sliding_window`` in the configuration,
and gives each sliding layer a cache of its window only. Architectures without such a field
(Llama, Mistral) are written as the one that equals them and has it (Ministral).
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.models.capture import evaluating
from gossamer.models.data import context_length
from gossamer.models.quiet import quiet
from gossamer.models.store import atomic_folder

__all__ = ["FULL", "SLIDING", "hybrid_config", "save_hybrid"]

FULL, SLIDING = "full_attention", "sliding_attention"

_KEEPS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
"""What a Llama and a Ministral configuration have in common."""

_TOLERANCE, _ROUNDED = 1e-3, 5e-2
"""Relative difference of logits allowed, in fp32 and in half precision."""

_LONGEST = 4096
"""Tokens of the text on which the two are compared, at most."""


def hybrid_config(model: nn.Module, full: Sequence[int], window: int) -> Any:
    """The configuration of the same model with full and sliding layers.

    Parameters
    ----------
    full : layers that read everything, counted from 0. window : latest keys the others read.

    Raises
    ------
    GossamerError
        If the architecture has no hybrid form, or has sliding layers already.
    """
    config: Any = model.config
    kinds = [FULL if i in set(full) else SLIDING for i in range(config.num_hidden_layers)]
    if config.model_type in ("llama", "mistral"):
        return _ministral(config, kinds, window)
    known = getattr(config, "layer_types", None)
    if known is None or not hasattr(config, "sliding_window"):
        raise GossamerError(
            f"{type(model).__name__} has no layer_types in its configuration; models of Llama, "
            "Mistral, Qwen2 and Qwen3 can be written as hybrid ones"
        )
    if SLIDING in known:
        raise GossamerError(
            f"{type(model).__name__} has sliding layers of its own ({known.count(SLIDING)} of "
            f"{len(known)}); save it with gossamer instead"
        )
    made = deepcopy(config)
    made.layer_types, made.sliding_window = kinds, window
    if hasattr(made, "use_sliding_window"):
        made.use_sliding_window = True
    return made


def _ministral(config: Any, kinds: list[str], window: int) -> Any:
    from transformers import MinistralConfig

    odd = [n for n in ("attention_bias", "mlp_bias") if getattr(config, n, False)]
    own = getattr(config, "sliding_window", None)
    if odd or own is not None:
        reason = f"{odd[0]}" if odd else f"a sliding window of {own}"
        raise GossamerError(
            f"a {config.model_type} model with {reason} has no hybrid form in transformers; "
            "save it with gossamer instead"
        )
    values = {name: getattr(config, name) for name in _KEEPS if hasattr(config, name)}
    return MinistralConfig(
        **deepcopy(values), layer_types=kinds, sliding_window=window, dtype=config.dtype
    )


def save_hybrid(
    model: nn.Module,
    folder: str | Path,
    full: Sequence[int],
    window: int,
    tokenizer: Any = None,
) -> Path:
    """Write the model, at work under these spans, as a hybrid one; the folder appears whole.

    It is loaded again and compared with the model on a random text before the folder appears.

    Raises
    ------
    GossamerError
        If there is no hybrid form, its outputs differ, or the folder holds something.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = hybrid_config(model, full, window)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    with atomic_folder(folder) as part, quiet():
        cast(Any, model).save_pretrained(part)
        config.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        weight = next(model.parameters())
        again: Any = AutoModelForCausalLM.from_pretrained(part, dtype=weight.dtype)
        _compare(model, again.to(weight.device), window)
    return Path(folder)


@torch.no_grad()
def _compare(model: nn.Module, again: nn.Module, window: int) -> None:
    """Raise if two models differ on a text long enough that the window bites."""
    config: Any = model.config
    length = min(2 * window + 8, context_length(model) or 2 * window + 8, _LONGEST)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    with evaluating(model), evaluating(again):
        expected, found = (m(input_ids=ids, use_cache=False).logits.float() for m in (model, again))
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
    limit = _TOLERANCE if next(model.parameters()).dtype == torch.float32 else _ROUNDED
    if not apart <= limit:
        raise GossamerError(
            f"the hybrid model's logits differ from the model's by {apart:.1e} of their size, over "
            f"{limit:.0e}; save the model with gossamer instead"
        )
