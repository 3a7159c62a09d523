"""A tiny masked-diffusion language model: a bidirectional transformer that fills masked tokens.

Given a sequence in which some tokens are the mask token, it gives a distribution for each of
them, all at once. Rotary positions, RMS norms, SwiGLU; attention is torch's fused function, as
in LLaDA and Dream.
Shapes: B = batch, T = tokens, C = width, H = heads, D = C / H, V = vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core import GossamerError, check_count

__all__ = ["DiffusionConfig", "MaskedDiffusionLM"]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Sizes of a masked-diffusion language model.

    Parameters
    ----------
    vocabulary : token ids, the mask token included. mask : id of the mask token.
    width : C, a multiple of ``heads`` times 2. layers, heads : numbers of them.
    inner : width of the SwiGLU layer; None for twice C.
    base : of the rotary frequencies.
    reach : neighbours on each side that a short convolution adds to every token's embedding, which
        spares the first layer from finding them; 0 for none.
    """

    vocabulary: int
    mask: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    inner: int | None = None
    base: float = 10_000.0
    reach: int = 0

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads"):
            check_count(name, getattr(self, name), 1)
        check_count("reach", self.reach, 0)
        if self.width % (2 * self.heads):
            raise GossamerError(
                f"width is {self.width} for {self.heads} heads; give a multiple of {2 * self.heads}"
            )
        if not 0 <= self.mask < self.vocabulary:
            raise GossamerError(f"mask is {self.mask}; give a token id, 0 to {self.vocabulary - 1}")


class _Attention(nn.Module):
    """Bidirectional multi-head attention with rotary positions."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = hidden.shape
        split = self.qkv(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(
            _rotate(query, turn), _rotate(key, turn), value
        )
        return self.out(out.transpose(1, 2).reshape(batch, length, width))


class _Block(nn.Module):
    """Attention and a SwiGLU layer, each behind an RMS norm and beside a residual."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        inner = config.inner or 2 * config.width
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = _Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.gate = nn.Linear(config.width, inner, bias=False)
        self.up = nn.Linear(config.width, inner, bias=False)
        self.down = nn.Linear(inner, config.width, bias=False)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), turn)
        normed = self.mlp_norm(hidden)
        return hidden + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class _Near(nn.Module):
    """Add a per-channel weighted sum of each token's neighbours."""

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.weight = nn.Parameter(torch.empty(width, 2 * reach + 1)) if reach else None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight is None:
            return hidden
        mixed = functional.conv1d(
            hidden.transpose(1, 2),
            self.weight[:, None],
            padding=self.reach,
            groups=hidden.shape[-1],
        )
        return hidden + mixed.transpose(1, 2)


class MaskedDiffusionLM(nn.Module):
    """Fill masked tokens, seeing both sides of each.

    Parameters
    ----------
    config : sizes. seed : of the initial weights; torch's random state is left as it was.
    """

    frequency: Tensor

    def __init__(self, config: DiffusionConfig, seed: int = 0) -> None:
        super().__init__()
        self.sizes, self.mask = config, config.mask
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(config.vocabulary, config.width)
            self.near = _Near(config.width, config.reach)
            self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width)
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        half = config.width // config.heads // 2
        power = torch.arange(half, dtype=torch.float32) / half
        self.register_buffer("frequency", config.base**-power, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of token ids (B, T); those at unmasked places mean nothing."""
        angle = torch.arange(input_ids.shape[1], device=input_ids.device)[:, None] * self.frequency
        turn = angle.cos(), angle.sin()
        hidden = self.near(self.embed(input_ids))
        for block in self.blocks:
            hidden = block(hidden, turn)
        return self.head(self.norm(hidden))


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of (B, H, T, D) by the angles of their position."""
    cos, sin = turn
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
