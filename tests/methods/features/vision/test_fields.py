"""Receptive fields: Gabor functions are found, blobs and noise are not."""

import numpy as np
import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.vision import gabor_fit, gabor_like, mosaic, orientation


def gabor(size, x0, y0, angle, frequency, along, across, phase):
    y, x = np.mgrid[:size, :size].astype(float)
    u = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
    v = -(x - x0) * np.sin(angle) + (y - y0) * np.cos(angle)
    window = np.exp(-(u**2) / (2 * along**2) - v**2 / (2 * across**2))
    wave = window * np.cos(2 * np.pi * frequency * u + phase)
    return torch.tensor(wave - wave.mean(), dtype=torch.float32).flatten()


def test_gabors_anywhere_are_found():
    generator = np.random.default_rng(0)
    atoms = torch.stack(
        [
            gabor(
                12,
                *generator.uniform(3, 8, 2),
                generator.uniform(0, np.pi),
                generator.uniform(0.12, 0.35),
                *generator.uniform(1.5, 3, 2),
                generator.uniform(0, 2 * np.pi),
            )
            for _ in range(24)
        ]
    )
    assert float(gabor_fit(atoms).min()) > 0.95
    # R² is a share of the energy: noise of a third of the signal's energy takes a quarter.
    noise = torch.randn(atoms.shape, generator=torch.Generator().manual_seed(0))
    noise *= atoms.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True) * 3**-0.5
    fit = gabor_fit(atoms + noise)
    assert 0.7 < float(fit.mean()) < 0.85


def test_scale_and_sign_do_not_matter():
    atom = gabor(8, 3.2, 4.1, 0.4, 0.2, 2, 2, 0.3)[None]
    torch.testing.assert_close(gabor_fit(atom), gabor_fit(-5 * atom), atol=1e-4, rtol=0)


def test_noise_and_blobs_are_no_gabors():
    noise = torch.randn(200, 144, generator=torch.Generator().manual_seed(1))
    assert float((gabor_fit(noise) > 0.6).float().mean()) == 0
    # Centre and surround without orientation, as in the retina.
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    square = (x - 5.5) ** 2 + (y - 5.5) ** 2
    blob = torch.exp(-square / 4.5) - 0.25 * torch.exp(-square / 18)
    assert float(orientation(blob.reshape(1, -1))) < 0.05
    assert not bool(gabor_like(blob.reshape(1, -1)))


def test_orientation_is_one_for_a_line_whatever_its_angle():
    line = torch.zeros(12, 12)
    line[5] = 1
    assert float(orientation(line.reshape(1, -1))) > 0.85
    for angle in (0.0, 0.5, 1.2, 2.5):
        wave = gabor(12, 5.5, 5.5, angle, 0.25, 2.5, 2.5, 0.4)[None]
        assert float(orientation(wave)) > 0.7
        assert bool(gabor_like(wave))


def test_mosaic_lays_atoms_row_by_row():
    atoms = torch.tensor([[0.0, 1, -1, 0], [2, 2, 2, 2], [0, 0, 0, -4]])
    picture = mosaic(atoms, columns=2)
    assert picture.shape == (7, 7)
    assert picture.dtype == torch.uint8
    assert picture[1:3, 1:3].tolist() == [[128, 255], [0, 128]]
    assert bool((picture[1:3, 4:6] == 255).all())
    assert picture[4:6, 1:3].tolist() == [[128, 128], [128, 0]]
    assert bool((picture[4:6, 4:6] == 255).all())


def test_what_is_no_square_is_refused():
    with pytest.raises(GossamerError, match="square"):
        gabor_fit(torch.zeros(3, 10))
    with pytest.raises(GossamerError, match="columns"):
        mosaic(torch.zeros(3, 9), columns=0)
