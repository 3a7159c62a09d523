"""A planted latent: it fires at two words, in half of the windows."""

import torch

from gossamer.methods.features.interp.windows import Firings, samples_of

__all__ = ["firings", "sample", "say"]


def say(token):
    return f" w{token}"


def firings(windows=80, length=12, seed=0):
    """Latent 0 fires at words 50 and 51 (even windows), latent 1 at word 60 (every third)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (windows, length), generator=generator)
    at = torch.arange(windows)
    ids[at % 2 == 0, 3] = 50 + (at[at % 2 == 0] // 2) % 2
    ids[at % 3 == 0, 7] = 60
    row, place = (ids >= 50).nonzero().unbind(1)
    latent = (ids[row, place] == 60).long()
    value = 0.1 + torch.rand(len(row), generator=generator)
    real = torch.ones_like(ids, dtype=torch.bool)
    return Firings(ids, real, row, place, latent, value, 2)


def sample(**options):
    (found,) = samples_of(firings(), [0], say, shown=10, tested=12, length=8, **options)
    return found
