"""Firing: every code that a dictionary gives to a text, sorted by latent.

One forward pass, ended at the last module that is read, makes all of them; whatever is shown of
a latent is then a slice. Shapes: N = windows, T = tokens of a window, D = width, M = latents,
E = codes that are not zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import record
from gossamer.models import Progress, Tokens

__all__ = ["MOST_CODES", "Firing", "collect"]

MOST_CODES = 1 << 28
"""Codes kept in memory, at 16 bytes each while they are sorted."""


@dataclass(frozen=True, eq=False)
class Firing:
    """The codes of a text, latent by latent.

    Parameters
    ----------
    tokens : (N, T). rows : tokens that were encoded.
    starts : int64 (M + 1,), where each latent's codes begin.
    places : int32 (E,), token of each code, counted through the windows; rising for a latent.
    values : float32 (E,), not zero.
    """

    tokens: Tokens
    rows: int
    starts: Tensor
    places: Tensor
    values: Tensor

    @property
    def counts(self) -> Tensor:
        """(M,), tokens each latent fires on."""
        return self.starts.diff()

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """Places and values of a latent."""
        span = slice(int(self.starts[latent]), int(self.starts[latent + 1]))
        return self.places[span], self.values[span]

    def latents(self) -> Tensor:
        """(E,), the latent of each code."""
        return torch.repeat_interleave(torch.arange(len(self.starts) - 1), self.counts)


@torch.no_grad()
def collect(
    model: nn.Module,
    dictionary: Dictionary,
    paths: tuple[str, ...],
    tokens: Tokens,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Firing:
    """Encode the activations of a text.

    Padding has no code, nor have tokens above the dictionary's ``sink_norm``, which it was not
    trained on.

    Parameters
    ----------
    paths : modules read, side by side; see :func:`modules_read`.

    Raises
    ------
    GossamerError
        If the modules are of another width than the dictionary, or there are too many codes.
    """
    device = next(model.parameters()).device
    latents: list[Tensor] = []
    places: list[Tensor] = []
    values: list[Tensor] = []
    rows = codes = 0
    for start in range(0, len(tokens), batch_size):
        part = tokens.slice(start, start + batch_size)
        found = record(model, paths, next(part.batches(len(part), device)))
        hidden, valid = _joined(dictionary, paths, found, part)
        at = valid.nonzero()[:, 0]
        kept = dictionary.encode(hidden[at.to(hidden.device)]).to_padded()
        real = (kept.indices >= 0) & (kept.values != 0)
        owner = at[:, None].expand(-1, real.shape[1])[real.cpu()]
        latents.append(kept.indices[real].to("cpu", torch.int32))
        places.append((owner + start * tokens.length).int())
        values.append(kept.values[real].float().cpu())
        rows += len(at)
        codes += len(owner)
        if codes > MOST_CODES:
            raise GossamerError(
                f"{codes:,} codes in {start + len(part)} of {len(tokens)} windows, of at most "
                f"{MOST_CODES:,}; show fewer samples"
            )
        if progress is not None:
            progress(start + len(part), len(tokens), "encoding")
    latent = torch.cat(latents)
    order = torch.sort(latent, stable=True).indices
    counts = torch.bincount(latent, minlength=dictionary.d_sae)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Firing(tokens, rows, starts, torch.cat(places)[order], torch.cat(values)[order])


def _joined(
    dictionary: Dictionary, paths: tuple[str, ...], found: dict[str, Tensor], part: Tokens
) -> tuple[Tensor, Tensor]:
    """Rows of a batch, padding included, and which of them are to be encoded."""
    valid = part.attention_mask.reshape(-1)
    parts = [found[path].reshape(-1, found[path].shape[-1]).float() for path in paths]
    if any(len(one) != len(valid) for one in parts):
        raise GossamerError(
            f"module {', '.join(paths)} does not return one row a token; hook another"
        )
    hidden = torch.cat(parts, 1)
    if hidden.shape[1] != dictionary.d_in:
        raise GossamerError(
            f"the dictionary reads {dictionary.d_in} channels; {' and '.join(paths)} "
            f"{'has' if len(paths) == 1 else 'have'} {hidden.shape[1]}: name its model and --hook"
        )
    limit = dictionary.metadata.get("sink_norm")
    if limit is not None:
        valid = valid & (torch.linalg.vector_norm(parts[0], dim=1) <= limit).cpu()
    return hidden, valid
