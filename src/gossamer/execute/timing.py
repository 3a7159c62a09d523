"""Timing: tokens per second of ``generate``, dense and accelerated in turn."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gossamer.core import check_count
from gossamer.evaluate.environment import device_name
from gossamer.evaluate.speed import Rate
from gossamer.execute.accelerate import Accelerated

__all__ = ["Pair", "generation"]


@dataclass(frozen=True)
class Pair:
    """How fast a model writes, dense and accelerated, timed in turn.

    Parameters
    ----------
    dense, accelerated : tokens per second of ``generate``, prompt included.
    speedup : median of the rounds' ratios.
    prompt_tokens, new_tokens, batch, rounds, threads, device : what was run, and where.
    """

    dense: Rate
    accelerated: Rate
    speedup: float
    prompt_tokens: int
    new_tokens: int
    batch: int
    rounds: int
    threads: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"generate(), batch {self.batch}, {self.prompt_tokens} + {self.new_tokens} tokens, "
            f"{self.rounds} rounds in turn, {self.threads} threads, {self.device}: dense "
            f"{self.dense}, accelerated {self.accelerated}: {self.speedup:.2f}x"
        )


def generation(
    work: Accelerated,
    *,
    prompt_tokens: int = 8,
    new_tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
) -> Pair:
    """Time greedy ``generate`` of an accelerated model against its own dense layers.

    Parameters
    ----------
    work : what accelerate returned, with ``keep_dense=True``.
    prompt_tokens, new_tokens : per sequence. batch : sequences. rounds : of each, in turn, after
        one that is not counted.

    Raises
    ------
    GossamerError
        If a count is too small, or the dense weights were not kept.
    """
    for name, value in {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}.items():
        check_count(name, value, 1)
    check_count("batch", batch, 1)
    check_count("rounds", rounds, 1)
    model: Any = work.model
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(device)
    seconds: dict[str, list[float]] = {"dense": [], "accelerated": []}
    training = model.training
    model.eval()
    try:
        for turn in range(rounds + 1):
            with work.paused():
                dense = _generate(model, ids, new_tokens)
            fast = _generate(model, ids, new_tokens)
            if turn:
                seconds["dense"].append(dense)
                seconds["accelerated"].append(fast)
    finally:
        model.train(training)
    tokens = batch * new_tokens
    return Pair(
        Rate.of(tokens, seconds["dense"]),
        Rate.of(tokens, seconds["accelerated"]),
        statistics.median(
            d / a for d, a in zip(seconds["dense"], seconds["accelerated"], strict=True)
        ),
        prompt_tokens,
        new_tokens,
        batch,
        rounds,
        torch.get_num_threads(),
        device_name(device),
    )


def _generate(model: nn.Module, ids: torch.Tensor, count: int) -> float:
    """Seconds that writing so many tokens took."""
    own: Any = model
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    begin = time.perf_counter()
    with torch.no_grad():
        own.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - begin
