"""What the claims on a language model share: the packaged model, its texts, its dense loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from gossamer.evaluate import score
from gossamer.models import Loaded, Tokens, load_model, read_documents

__all__ = ["calibration", "heldout", "loss", "nano", "outlier_channels"]


@cache
def nano() -> Loaded:
    """The packaged model, loaded once; every claim must leave it as it was."""
    return load_model("nano")


@cache
def heldout(windows: int = 8, length: int = 256) -> Tokens:
    """The first windows of the packaged held-out text, (windows, length)."""
    documents = read_documents(None, "heldout")
    tokens = Tokens.from_documents(documents, nano().tokenizer, length=length)
    return tokens.slice(windows)


@cache
def calibration(seed: int, samples: int = 16, length: int = 256) -> Tokens:
    """Windows of the packaged calibration text, drawn by the seed."""
    documents = read_documents(None, "calibration")
    return Tokens.from_documents(
        documents, nano().tokenizer, length=length, samples=samples, seed=seed
    )


def loss(model: Any) -> float:
    """Held-out loss of a model in nats per token on :func:`heldout`."""
    return score(model, heldout(), batch_size=4).loss


@contextmanager
def outlier_channels(model: Any, seed: int, count: int = 8, factor: float = 32.0) -> Iterator[None]:
    """The same function with loud channels: what large language models grow by themselves.

    In every block, ``count`` gains of both norms are multiplied by ``factor`` and the matching
    input columns of the consuming projections divided by it. With a power of two both are exact
    in floating point, so the network's outputs do not change by one bit.

    Parameters
    ----------
    model : Llama-style. factor : a power of two.
    """
    generator = torch.Generator().manual_seed(seed)

    def rescale(by: float) -> None:
        generator.manual_seed(seed)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                loud = torch.randperm(len(norm.weight), generator=generator)[:count]
                norm.weight.data[loud] *= by
                for reader in readers:
                    reader.weight.data[:, loud] /= by

    rescale(factor)
    try:
        yield
    finally:
        rescale(1.0 / factor)
