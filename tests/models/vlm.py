"""A tiny random vision-language model, built in code and seeded."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

__all__ = ["IMAGE", "PATCHES", "image_prompt", "tiny_vlm"]

VOCABULARY, IMAGE, PATCHES = 64, 63, 16


def tiny_vlm(seed: int = 0, blocks: int = 3) -> PreTrainedModel:
    """Llava with a CLIP tower over 4 x 4 patches and a Llama of a few blocks, in eval mode."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_channels=1,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
    finally:
        torch.random.set_rng_state(state)
    model.eval()
    with torch.no_grad():
        # The first pass makes transformers hook its own vision tower; from then on no more.
        model(**image_prompt(1))
    return model


def image_prompt(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Beginning, an image, and six words of text for every row."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, IMAGE, (rows, 6), generator=generator)
    start = torch.tensor([[1] + [IMAGE] * PATCHES]).expand(rows, -1)
    pixels = torch.randn(rows, 1, 16, 16, generator=generator)
    return {"input_ids": torch.cat([start, words], 1), "pixel_values": pixels}
