"""Natural patches: flat spectrum, no mean, training and held-out ones apart."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.vision import natural_patches, patches, whiten


def power(image, low, high):
    """Mean power of the frequencies between two, in cycles a pixel."""
    f = torch.hypot(
        torch.fft.fftfreq(image.shape[0])[:, None], torch.fft.rfftfreq(image.shape[1])[None]
    )
    spectrum = torch.fft.rfft2(image - image.mean()).abs().square()
    return float(spectrum[(f >= low) & (f < high)].mean())


def test_whitening_flattens_the_spectrum_of_a_photograph():
    raw = patches.photographs()[0]
    ratio = power(raw, 0.02, 0.05) / power(raw, 0.15, 0.2)
    flat = whiten(raw)
    assert ratio > 20
    assert 0.2 < power(flat, 0.02, 0.05) / power(flat, 0.15, 0.2) < 5
    assert power(flat, 0.47, 0.5) < 0.2 * power(flat, 0.15, 0.2)
    assert float(flat.mean()) == pytest.approx(0, abs=1e-4)
    assert float(flat.var()) == pytest.approx(1, abs=1e-3)


def test_whitening_multiplies_a_wave_by_the_filter():
    x = torch.arange(64.0)
    waves = [torch.cos(2 * torch.pi * f * x / 64).expand(64, 64) for f in (8, 16)]
    flat = whiten(waves[0] + waves[1], cutoff=0.3)
    gain = torch.tensor([f / 64 * torch.tensor(-((f / 64 / 0.3) ** 4)).exp() for f in (8, 16)])
    expected = gain[0] * waves[0] + gain[1] * waves[1]
    torch.testing.assert_close(flat, expected / expected.std(), atol=1e-4, rtol=1e-4)


def test_patches_have_no_mean_and_variance_one():
    found = natural_patches(500, 8, seed=3)
    assert found.shape == (500, 64)
    torch.testing.assert_close(found.mean(1), torch.zeros(500), atol=1e-5, rtol=0)
    assert float(found.square().mean()) == pytest.approx(1)
    assert torch.equal(found, natural_patches(500, 8, seed=3))
    assert not torch.equal(found, natural_patches(500, 8, seed=4))


def test_held_out_patches_share_no_pixel_with_the_others(monkeypatch):
    columns = torch.arange(40.0).square().expand(30, 40)
    monkeypatch.setattr(patches, "_whitened", lambda: (columns, columns))
    # Where a patch lies shows in its slope, which grows to the right.
    slope = {h: natural_patches(400, 4, held_out=h) for h in (False, True)}
    step = {h: (x[:, 1] - x[:, 0]) / (x[:, 2] - 2 * x[:, 1] + x[:, 0]) for h, x in slope.items()}
    assert float(step[False].max()) < 30 - 3
    assert float(step[True].min()) >= 30


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(GossamerError, match="at most 160"):
        natural_patches(1, 161)
    with pytest.raises(GossamerError, match="cutoff"):
        whiten(torch.zeros(4, 4), 0.0)


def test_without_pillow_one_line_says_what_to_install(monkeypatch):
    def missing():
        raise ImportError("The Python Imaging Library (PIL) is required")

    monkeypatch.setattr("sklearn.datasets.load_sample_images", missing)
    patches.photographs.cache_clear()
    with pytest.raises(GossamerError, match="pip install pillow"):
        patches.photographs()
