"""Running a causal language model for measurement: log-probabilities and greedy decoding.

Shapes: B = batch, T = tokens, V = vocabulary, K = scored tokens of a chunk.
"""

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.evaluate.windows import Windows
from gossamer.models import Progress

__all__ = ["Chunk", "Decoder", "device_of", "evaluating", "log_probabilities"]

LOGIT_BYTES = 512 * 2**20
"""Most bytes of logits asked of a model at once, unless one window needs more."""
CHUNK_BYTES = {"cpu": 2 * 2**20}
"""Most bytes of fp32 log-probabilities made at once, by kind of device; 64 MiB elsewhere.

On a CPU a chunk that stays in its cache is ten times faster than one that does not.
"""


class Chunk(NamedTuple):
    """Predictions of some scored tokens.

    Parameters
    ----------
    start : how many scored tokens came before.
    log_probs : (K, V) float32, normalised.
    targets : (K,) the tokens that came.
    """

    start: int
    log_probs: Tensor
    targets: Tensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter lies, which is where its inputs go."""
    return next(model.parameters()).device


def _logits(output: Any, batch: int, length: int) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or tuple(logits.shape[:2]) != (batch, length):
        raise GossamerError(
            "the model gives no logits for each token; load it with AutoModelForCausalLM"
        )
    return logits


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    return int(getattr(config.get_text_config(), "vocab_size", 1)) if config is not None else 1


def log_probabilities(
    model: nn.Module,
    windows: Windows,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    what: str = "scoring",
) -> Generator[Chunk, None, None]:
    """Predict every scored token of some windows, in order, in bounded memory.

    Batches are cut so that one batch's logits take at most 512 MiB (never below one window),
    and turned into fp32 log-probabilities a few MiB at a time, only where a token is scored: a
    vocabulary of 150,000 does not need the (B, T, V) tensor twice. Gradients are off and the
    model is in evaluation mode until the iterator ends: wrap it in ``contextlib.closing``.

    Parameters
    ----------
    batch_size : windows run at once, at most.
    progress : called with (windows done, windows, what).

    Raises
    ------
    GossamerError
        If the model is no causal language model.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise GossamerError(f"batch_size is {batch_size!r}; give a whole number, at least 1")
    width = next(model.parameters()).element_size()
    window_bytes = windows.context * _vocabulary(model) * width
    size = max(1, min(batch_size, LOGIT_BYTES // window_bytes))
    start, done, total = 0, 0, len(windows.input_ids)
    with evaluating(model):
        for inputs, scored in windows.batches(size, device_of(model)):
            ids = inputs["input_ids"]
            logits = _logits(model(**inputs, use_cache=False), *ids.shape)
            rows, columns = scored.nonzero(as_tuple=True)
            chunk = CHUNK_BYTES.get(ids.device.type, 64 * 2**20)
            step = max(1, chunk // (4 * logits.shape[-1]))
            for low in range(0, len(rows), step):
                row, column = rows[low : low + step], columns[low : low + step]
                picked = logits[row, column - 1].float()
                yield Chunk(start, torch.log_softmax(picked, dim=-1), ids[row, column])
                start += len(row)
            done += len(ids)
            if progress is not None:
                progress(done, total, what)


class Decoder:
    """Greedy decoding with a key-value cache, one token at a time.

    The model's own generation settings (penalties, sampling, stop tokens) are left aside: the
    next token is the one of the highest logit, and among equal ones the lowest index.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        forward: Callable[..., Any] = model.forward
        # Asked for the last position only, a head of 150,000 rows does not run for the prompt.
        keeps = "logits_to_keep" in inspect.signature(forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
        self.cache: Any = None

    def step(self, ids: Tensor) -> Tensor:
        """Feed (B, T) tokens after those fed before; return the (B, 1) next ones."""
        output = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, **self.options
        )
        self.cache = output.past_key_values
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def decode(self, prompts: Tensor, new_tokens: int) -> Tensor:
        """Continue (B, T) prompts; return the (B, new_tokens) continuation."""
        token = self.step(prompts)
        parts = [token]
        for _ in range(new_tokens - 1):
            token = self.step(token)
            parts.append(token)
        return torch.cat(parts, dim=1)
