"""Speed: tokens per second of the model as it runs here and now.

A number belongs to a machine, a thread count and a moment; all of them are in the result.
Simulated sparsity runs the dense arithmetic and earns no speed number: callers do not measure it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.evaluate.environment import device_name
from gossamer.evaluate.forward import Decoder, device_of, evaluating

__all__ = ["Rate", "Speed", "speed"]


@dataclass(frozen=True)
class Rate:
    """Tokens per second over repeated runs.

    Parameters
    ----------
    median, low, high : of the runs.
    iqr : distance between the quartiles: the spread without the outliers.
    runs : each run's rate, in order.
    """

    median: float
    low: float
    high: float
    iqr: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, tokens: int, seconds: list[float]) -> "Rate":
        """From the seconds that each run took for the same number of tokens."""
        runs = tuple(tokens / max(s, 1e-12) for s in seconds)
        iqr = 0.0
        if len(runs) > 1:
            first, _, third = statistics.quantiles(runs, n=4, method="inclusive")
            iqr = third - first
        return cls(statistics.median(runs), min(runs), max(runs), iqr, runs)

    def __str__(self) -> str:
        return f"{self.median:,.1f} tokens/s ({self.low:,.1f} to {self.high:,.1f})"


@dataclass(frozen=True)
class Speed:
    """How fast a model reads a prompt and writes after it.

    Parameters
    ----------
    prefill : prompt tokens per second, all sequences of the batch together.
    decode : generated tokens per second, prefill excluded.
    prompt_tokens, new_tokens, batch, repeats, warmup : what was run.
    threads : of the CPU; device : name of the device; dtype : of the weights.
    """

    prefill: Rate
    decode: Rate
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    warmup: int
    threads: int
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill}, decode {self.decode}: batch {self.batch}, "
            f"{self.prompt_tokens} + {self.new_tokens} tokens, {self.repeats} runs after "
            f"{self.warmup} of warm-up, {self.threads} threads, {self.device}, {self.dtype}"
        )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed(
    model: nn.Module,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time prefill and greedy decoding with a key-value cache.

    Each run reads one random prompt and decodes after it; the warm-up runs are not counted.
    The median is the figure to quote; ``low``, ``high`` and ``iqr`` say how steady it was.

    Parameters
    ----------
    prompt_tokens, new_tokens : per sequence, at least 1. The first new token comes from the
        prefill, so ``new_tokens`` more steps are timed as decoding.
    batch : sequences at once.
    repeats, warmup : counted and uncounted runs.
    clock : seconds, monotonic.

    Raises
    ------
    GossamerError
        If a count is too small.
    """
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch}
    for name, value in {**counts, "repeats": repeats}.items():
        if not isinstance(value, int) or value < 1:
            raise GossamerError(f"{name} is {value!r}; give a whole number, at least 1")
    if not isinstance(warmup, int) or warmup < 0:
        raise GossamerError(f"warmup is {warmup!r}; give a whole number, at least 0")
    device = device_of(model)
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(device)
    prefill: list[float] = []
    decode: list[float] = []
    with evaluating(model):
        for _ in range(warmup + repeats):
            decoder = Decoder(model)
            _synchronise(device)
            begin = clock()
            token = decoder.step(prompts)
            _synchronise(device)
            middle = clock()
            for _ in range(new_tokens):
                token = decoder.step(token)
            _synchronise(device)
            prefill.append(middle - begin)
            decode.append(clock() - middle)
    return Speed(
        prefill=Rate.of(batch * prompt_tokens, prefill[warmup:]),
        decode=Rate.of(batch * new_tokens, decode[warmup:]),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        repeats=repeats,
        warmup=warmup,
        threads=torch.get_num_threads(),
        device=device_name(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )
