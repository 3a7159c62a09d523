"""Natural patches: small squares of whitened photographs, as early vision might see them.

Whitening flattens the 1/f spectrum of natural images, as retina and thalamus are thought to do,
and cuts what the pixel grid cannot carry.
Shapes: N = patches, P = side of a patch, D = P².
"""

from functools import cache

import torch
from torch import Tensor

from gossamer.core import GossamerError, check_count

__all__ = ["natural_patches", "photographs", "whiten"]

_TRAINED_ON = 0.75
_LUMA = (0.299, 0.587, 0.114)


@cache
def photographs() -> tuple[Tensor, ...]:
    """The two photographs that scikit-learn bundles, grey, float32 (427, 640) each.

    Raises
    ------
    GossamerError
        Without Pillow, which scikit-learn decodes them with.
    """
    from sklearn.datasets import load_sample_images

    try:
        images = load_sample_images().images
    except ImportError:
        raise GossamerError(
            "decoding scikit-learn's photographs needs Pillow; pip install pillow"
        ) from None
    return tuple(torch.tensor(image).float() @ torch.tensor(_LUMA) for image in images)


def whiten(image: Tensor, cutoff: float = 0.4) -> Tensor:
    """A grey image (H, W) with a flat spectrum, mean 0 and variance 1.

    The filter is f exp(-(f / cutoff)⁴).

    Parameters
    ----------
    cutoff : in cycles a pixel, above 0; 0.5 is the finest that pixels show.

    Source: Olshausen and Field 1997 (Vision Research 37), their filter.
    """
    if not cutoff > 0:
        raise GossamerError(f"cutoff is {cutoff!r}; give a frequency above 0, at most 0.5")
    high, wide = image.shape
    f = torch.hypot(torch.fft.fftfreq(high)[:, None], torch.fft.rfftfreq(wide)[None])
    spectrum = torch.fft.rfft2(image.float() - image.float().mean())
    flat = torch.fft.irfft2(spectrum * f * torch.exp(-((f / cutoff) ** 4)), s=(high, wide))
    return flat / flat.std().clamp_min(1e-12)


@cache
def _whitened() -> tuple[Tensor, ...]:
    return tuple(whiten(image) for image in photographs())


def natural_patches(count: int, size: int = 12, *, seed: int = 0, held_out: bool = False) -> Tensor:
    """Patches (N, P²) of both photographs, each with mean 0; in all, a pixel has variance 1.

    Parameters
    ----------
    count : N. size : P. seed : of the places.
    held_out : from the right quarter of the photographs, which others never come from.

    Raises
    ------
    GossamerError
        If a patch does not fit, or Pillow is missing.
    """
    check_count("count", count, 1)
    check_count("size", size, 2)
    images = torch.stack(_whitened())
    high, wide = images.shape[1:]
    split = int(_TRAINED_ON * wide)
    if size > (most := min(high, wide - split)):
        raise GossamerError(f"size is {size}; patches of these photographs have at most {most}")
    first, last = (split, wide - size) if held_out else (0, split - size)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(images), (count,), generator=generator)
    top = torch.randint(high - size + 1, (count,), generator=generator)
    left = torch.randint(first, last + 1, (count,), generator=generator)
    steps = torch.arange(size)
    rows, columns = top[:, None] + steps, left[:, None] + steps
    patches = images[which[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)
    patches = patches - patches.mean(1, keepdim=True)
    return patches / patches.square().mean().sqrt()
