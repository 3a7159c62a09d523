"""A small vision-language model for claims: it reads glyphs scattered over an image.

A few patches of an image carry a key and a value, drawn as black and white pixels; all other
patches repeat one background tile. After the image comes a key as a word; the model must answer
with the value drawn beside that key. Shapes: N images, K keys, P patches.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

__all__ = ["Glyphs", "trained"]

PATCH = 4


@dataclass(frozen=True)
class Glyphs:
    """The task.

    Parameters
    ----------
    grid : patches along a side. keys : informative patches, each with a key of its own.
    values : answers. noise : size of the background tile's pixels (glyphs have size 1).
    """

    grid: int
    keys: int
    values: int
    noise: float = 0.0

    @property
    def patches(self) -> int:
        """P."""
        return self.grid**2

    @property
    def first_value(self) -> int:
        """Word of the first value; keys begin at word 3."""
        return 3 + self.keys

    @property
    def image_word(self) -> int:
        """The word that stands for a patch."""
        return self.first_value + self.values

    def images(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (N, 1, side, side), the places of the keys (N, K), and their values (N, K)."""
        fixed = torch.Generator().manual_seed(0)
        key = torch.randint(2, (self.keys, PATCH, PATCH // 2), generator=fixed) * 2.0 - 1
        value = torch.randint(2, (self.values, PATCH, PATCH // 2), generator=fixed) * 2.0 - 1
        tile = torch.randn(count, 1, PATCH, PATCH, generator=generator) * self.noise
        patches = tile.repeat(1, self.patches, 1, 1)
        order = torch.rand(count, self.patches, generator=generator).argsort(1)
        places = order[:, : self.keys]
        values = torch.randint(self.values, places.shape, generator=generator)
        glyphs = torch.cat([key.expand(count, -1, -1, -1), value[values]], -1)
        patches[torch.arange(count)[:, None], places] = glyphs
        rows = patches.view(count, self.grid, self.grid, PATCH, PATCH).permute(0, 1, 3, 2, 4)
        side = self.grid * PATCH
        return rows.reshape(count, 1, side, side), places, values

    def prompt(self, count: int) -> Tensor:
        """The beginning and the image's words, (N, 1 + P)."""
        return torch.tensor([[1] + [self.image_word] * self.patches]).expand(count, -1)

    def dialogue(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """All keys in random order, each followed by its value, (N, 2 K)."""
        order = torch.rand(values.shape, generator=generator).argsort(1)
        pairs = [order + 3, values.gather(1, order) + self.first_value]
        return torch.stack(pairs, -1).flatten(1)

    def model(self, seed: int, blocks: int) -> LlavaForConditionalGeneration:
        """An untrained Llava: one CLIP layer, a ReLU Llama of some blocks."""
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=self.grid * PATCH,
            patch_size=PATCH,
            num_channels=1,
            initializer_range=0.1,
            initializer_factor=2.0,
        )
        text = LlamaConfig(
            vocab_size=self.image_word + 1,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            hidden_act="relu",
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.1,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=self.image_word,  # pyright: ignore[reportCallIssue]
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=self.patches,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlavaForConditionalGeneration(config)


@cache
@torch.enable_grad()
def trained(
    task: Glyphs, seed: int, steps: int, blocks: int = 2, batch: int = 16
) -> LlavaForConditionalGeneration:
    """A model that has learned the task, in eval mode; the answers carry the loss."""
    model, generator = task.model(seed, blocks), torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        pixels, _, values = task.images(batch, generator)
        dialogue = task.dialogue(values, generator)
        ids = torch.cat([task.prompt(batch), dialogue], 1)
        size = dialogue.shape[1]
        logits = model(
            input_ids=ids, pixel_values=pixels, use_cache=False, logits_to_keep=size
        ).logits
        loss = F.cross_entropy(logits[:, 0::2].flatten(0, 1), dialogue[:, 1::2].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval()
