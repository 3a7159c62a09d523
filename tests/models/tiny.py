"""Tiny random models of every supported architecture, built in code and seeded.

Two blocks, hidden size 32, vocabulary 128: small enough for every test, with the traits of the
real thing (grouped-query heads, sliding windows that bite, fused projections, stacked experts).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

__all__ = ["ARCHITECTURES", "DECODERS", "ENCODERS", "tiny_folder", "tiny_model", "tiny_tokenizer"]

VOCABULARY, HIDDEN, INNER, BLOCKS, HEADS, KV_HEADS, CONTEXT = 128, 32, 64, 2, 4, 2, 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": KV_HEADS}
# A window of 8 is shorter than the test sequences, so the two kinds of layer see other masks.
_SLIDING = {
    **_GROUPED,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=BLOCKS,
            n_head=HEADS,
            n_positions=CONTEXT,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=INNER,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


def _vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            image_size=16,
            patch_size=4,
            num_labels=4,
        )
    )


_MOE = {**_GROUPED, "num_experts_per_tok": 2}
_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SLIDING, query_pre_attn_scalar=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_SLIDING, query_pre_attn_scalar=16)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_GROUPED)),
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_COMMON)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_MOE, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_MOE,
            head_dim=16,
            num_experts=4,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            mlp_only_layers=[],
        )
    ),
    "bert": lambda: BertModel(BertConfig(**_COMMON), add_pooling_layer=True),
    "vit": _vit,
}

ARCHITECTURES: tuple[str, ...] = tuple(_BUILDERS)
ENCODERS: tuple[str, ...] = ("bert", "vit")
DECODERS: tuple[str, ...] = tuple(name for name in ARCHITECTURES if name not in ENCODERS)


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A fresh random model of an architecture in eval mode; equal for equal seeds.

    Weights are drawn larger than the usual 0.02, so that two blocks change the hidden states
    enough for a test to see a mistake.
    """
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = _BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def tiny_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; with ``bos``, texts open with token 1."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *characters]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)


def tiny_folder(folder: Path, name: str = "llama") -> Path:
    """A folder with a tiny model of an architecture and the tiny tokenizer."""
    tiny_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
