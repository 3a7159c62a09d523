"""A language model small enough to train inside a claim, and texts of its own."""

from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.claims.activations.digits import one_thread
from gossamer.methods.activations.training.loop import Training, fit
from gossamer.models import Tokens, read_documents

__all__ = ["LENGTH", "heldout", "new_lm", "text", "train_lm"]

LENGTH = 64
_CHARACTERS = 128


def _bytes(documents: list[str], windows: int) -> Tokens:
    """ASCII codes of joined documents, (windows, LENGTH); other characters are left out."""
    joined = "\n".join(documents).encode("ascii", "ignore")[: windows * LENGTH]
    ids = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
    return Tokens.from_ids(ids.view(-1, LENGTH))


@cache
def text() -> Tokens:
    """The packaged calibration text in characters, about half a million."""
    return _bytes(read_documents(None, "calibration"), 7000)


@cache
def heldout(windows: int = 320) -> Tokens:
    """The first characters of the packaged held-out text."""
    return _bytes(read_documents(None, "heldout"), windows)


def new_lm(act: str, seed: int) -> Any:
    """An untrained Llama of 2 blocks, width 64, 256 hidden units, over characters."""
    config = LlamaConfig(
        vocab_size=_CHARACTERS,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@cache
def _trained(act: str, seed: int, steps: int) -> dict[str, torch.Tensor]:
    model = new_lm(act, seed)
    with one_thread():
        plan = Training(steps=steps, lr=3e-3, batch_size=16, seed=seed)
        fit(model, text(), plan)
    return model.state_dict()


def train_lm(act: str, seed: int, steps: int) -> Any:
    """A trained model of that kind; trained once per process, a fresh copy every call."""
    model = new_lm(act, seed)
    model.load_state_dict(_trained(act, seed, steps))
    return model
