"""Recall of facts: what the claims on attention patterns that models are trained under measure.

A sample states facts and then asks for each of them in another order. A fact is one token that
names a key and its value, a question one that names a key; the answer is the value. So one layer
of attention can answer, if it reads the fact: what a pattern hides cannot be recalled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from gossamer.models import Inputs

__all__ = ["answered", "facts", "one_thread", "recall_model"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small run slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def facts(samples: int, seed: int, count: int = 16, values: int = 4) -> Inputs:
    """Samples of ``count`` facts and as many questions, (samples, 2 count + 1) tokens.

    Ids: ``key * values + value`` for a fact, ``count * values + key`` for a question. Labels are
    the values, one place after their question, where a causal model's loss looks for them.
    """
    generator = torch.Generator().manual_seed(seed)

    def order() -> Tensor:
        return torch.rand(samples, count, generator=generator).argsort(1)

    key, asked = order(), order()
    value = torch.randint(values, (samples, count), generator=generator)
    question = key.gather(1, asked) + count * values
    ids = torch.cat([key * values + value, question, question[:, :1]], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, count + 1 :] = value.gather(1, asked)
    return Inputs({"input_ids": ids, "labels": labels})


def recall_model(
    seed: int, *, layers: int = 1, count: int = 16, values: int = 4, width: int = 64
) -> nn.Module:
    """An untrained Llama for :func:`facts`: 4 heads, each with keys and values of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=count * (values + 1),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * count + 1,
            # Small weights make so small a model stay on the plateau of guessing for long.
            initializer_range=0.1,
        )
        return LlamaForCausalLM(config)


@torch.no_grad()
def answered(model: nn.Module, data: Inputs) -> float:
    """Share of the questions whose likeliest answer is right."""
    ids, labels = data.values["input_ids"], data.values["labels"][:, 1:]
    asked = labels >= 0
    found = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    return float((found == labels)[asked].float().mean())
