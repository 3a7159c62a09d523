"""Loss: how well a model predicts some data, window by window, for methods that measure.

Tokens are scored as :func:`gossamer.evaluate.score` scores them; one figure a window, so that the
uncertainty of a mean can be drawn from the windows.
Shapes: N windows of T tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError, check_count
from gossamer.models.calibrate import Progress
from gossamer.models.capture import evaluating
from gossamer.models.data import Inputs, Tokens
from gossamer.models.gradient import own_loss

__all__ = ["WindowLosses", "window_losses"]

# fp32 logits made at once: a chunk that stays in a CPU's cache is several times faster.
_CHUNK_BYTES = {"cpu": 2 * 2**20}


@dataclass(frozen=True, eq=False)
class WindowLosses:
    """Losses of separate windows, which add up to the mean over all scored tokens.

    Parameters
    ----------
    total : (N,) float64, summed negative log-probabilities in nats.
    count : (N,) float64, scored tokens of each window.
    """

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> float:
        """Mean in nats per scored token, the ``loss`` of :func:`gossamer.evaluate.score`."""
        return float(self.total.sum() / self.count.sum())


@torch.no_grad()
def window_losses(
    model: nn.Module,
    data: Tokens | Inputs,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> WindowLosses:
    """Measure a model's loss on every window, in evaluation mode and without gradients.

    Parameters
    ----------
    data : tokens, scored by a causal language model from the second real token of a window on;
        or inputs with ``labels``, each sample counting once with the model's own loss.
    batch_size : windows run at once; changes the result by rounding only.

    Raises
    ------
    GossamerError
        If no token can be scored, or the model computes no loss on such data.
    """
    check_count("batch_size", batch_size, 1)
    device = next(model.parameters()).device
    totals: list[Tensor] = []
    counts: list[Tensor] = []
    with evaluating(model):
        if isinstance(data, Tokens):
            parts = _tokens(model, data, batch_size, device)
        else:
            parts = _samples(model, data, device)
        for total, count in parts:
            totals.append(total.double().cpu())
            counts.append(count.double().cpu())
            if progress is not None:
                progress(sum(map(len, totals)), len(data), "scoring")
    found = WindowLosses(torch.cat(totals), torch.cat(counts))
    if not float(found.count.sum()):
        raise GossamerError(
            f"no token can be scored in {len(data)} windows; give windows of at least two tokens"
        )
    return found


def _tokens(
    model: nn.Module, tokens: Tokens, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(tokens), batch_size):
        part = tokens.slice(start, start + batch_size)
        ids, mask = part.input_ids.to(device), part.attention_mask.to(device)
        padding: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long()}
        logits = getattr(model(input_ids=ids, **padding), "logits", None)
        if logits is None or logits.shape[:2] != ids.shape:
            raise GossamerError(
                f"{type(model).__name__} gives no logits for each token; measure a causal language "
                "model, or give inputs with labels"
            )
        scored = mask[:, 1:] & mask[:, :-1]
        rows, columns = scored.nonzero(as_tuple=True)
        total = torch.zeros(len(ids), dtype=torch.float64, device=device)
        step = max(1, _CHUNK_BYTES.get(device.type, 64 * 2**20) // (4 * logits.shape[-1]))
        for low in range(0, len(rows), step):
            row, column = rows[low : low + step], columns[low : low + step]
            picked = logits[row, column].float()
            lost = cross_entropy(picked, ids[row, column + 1], reduction="none")
            total.index_add_(0, row, lost.double())
        yield total, scored.sum(1)


def _samples(
    model: nn.Module, data: Inputs, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    # One at a time: a model's own loss is a mean, from which single samples cannot be told.
    for batch in data.batches(1, device):
        yield own_loss(model, batch).reshape(1), torch.ones(1)
