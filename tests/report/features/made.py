"""A tiny dictionary at work on a tiny model, and its codes worked out densely beside it."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import TopK
from gossamer.models import Tokens
from gossamer.report.features import Amounts, Book, Unembedding, Vocabulary, collect
from tests.models.tiny import tiny_model, tiny_tokenizer

HOOK = "model.layers.0"
AMOUNTS = Amounts(top=3, each=2, intervals=4, before=3, after=2, logits=5, neighbours=4, bins=6)


class Made(NamedTuple):
    """A book; ``codes`` are (tokens, latents), zero for padding."""

    model: torch.nn.Module
    dictionary: Dictionary
    tokens: Tokens
    codes: Tensor
    book: Book


def tokens() -> Tokens:
    """Seven windows of 24 characters; the last is padded on the right."""
    ids = torch.randint(4, 101, (7, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[6, 15:] = False
    return Tokens(ids, mask)


def dense_codes(model: torch.nn.Module, dictionary: Dictionary, data: Tokens, k: int) -> Tensor:
    """Codes by the definition, from a whole forward pass."""
    with torch.no_grad():
        out = model(input_ids=data.input_ids, output_hidden_states=True)
    rows = out.hidden_states[1].reshape(-1, dictionary.d_in)
    pre = (rows - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    values, indices = pre.relu().topk(k, dim=1)
    codes = torch.zeros_like(pre).scatter_(1, indices, values)
    codes[~data.attention_mask.reshape(-1)] = 0
    return codes.detach()


@cache
def made() -> Made:
    """Built once; nobody changes it."""
    model = tiny_model("llama").float()
    torch.nn.init.uniform_(model.get_submodule("model.norm").weight, 0.5, 1.5)
    dictionary = Dictionary.random(32, 40, TopK(3), seed=1).eval().requires_grad_(False)
    dictionary.W_enc[:, 5] = -100 * dictionary.W_enc[:, 5].abs()
    dictionary.b_enc[5] = -1e4
    dictionary.metadata["hook_name"] = HOOK
    data = tokens()
    firing = collect(model, dictionary, (HOOK,), data, batch_size=3)
    book = Book(
        dictionary,
        firing,
        Vocabulary(tiny_tokenizer()),
        Unembedding.of(model, 32),
        explanations={7: "Capital letters"},
        amounts=AMOUNTS,
        seed=4,
    )
    return Made(model, dictionary, data, dense_codes(model, dictionary, data, 3), book)
