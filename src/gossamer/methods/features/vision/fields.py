"""Receptive fields: how much atoms look like Gabor functions, and a picture of them all.

Simple cells of V1 answer to an oriented grating under a window: a Gabor function.
Shapes: M = atoms, P = side of a patch, D = P², G = candidates.
"""

from math import isqrt, pi

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["gabor_fit", "gabor_like", "mosaic", "orientation"]

_FIT, _ORIENTED = 0.6, 0.3


def _side(atoms: Tensor) -> int:
    size = isqrt(atoms.shape[1])
    if atoms.dim() != 2 or size * size != atoms.shape[1]:
        raise GossamerError(f"atoms have shape {tuple(atoms.shape)}; give (M, P²) square patches")
    return size


def _waves(form: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The even and the odd Gabor (..., D) of forms (..., 6), each with mean 0, as atoms have.

    Parameters
    ----------
    form : centre x, y; angle; log frequency (cycles a pixel); log widths along and across the
        wave (pixels).
    """
    x0, y0, angle, frequency, along, across = form.unsqueeze(-1).unbind(-2)
    steps = torch.arange(size, dtype=form.dtype)
    y, x = (part.flatten() for part in torch.meshgrid(steps, steps, indexing="ij"))
    u = (x - x0) * angle.cos() + (y - y0) * angle.sin()
    v = (y - y0) * angle.cos() - (x - x0) * angle.sin()
    window = torch.exp(-0.5 * ((u / along.exp()) ** 2 + (v / across.exp()) ** 2))
    phase = 2 * pi * frequency.exp() * u
    even, odd = window * phase.cos(), window * phase.sin()
    return even - even.mean(-1, keepdim=True), odd - odd.mean(-1, keepdim=True)


def _share(with_even: Tensor, with_odd: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Share of a unit atom's energy in the plane of two waves, given its products with them."""
    ee, oo, eo = (even * even).sum(-1), (odd * odd).sum(-1), (even * odd).sum(-1)
    area = (ee * oo - eo * eo).clamp_min(1e-9)
    return (with_even**2 * oo - 2 * with_even * with_odd * eo + with_odd**2 * ee) / area


def _limits(size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest form: from one cycle over the patch to what pixels can show."""
    low = torch.tensor([-1.0, -1.0, -10.0, 1 / size, 0.5, 0.5])
    high = torch.tensor([float(size), float(size), 10.0, 0.5, size / 2, float(size)])
    low[3:], high[3:] = low[3:].log(), high[3:].log()
    return low, high


@torch.no_grad()
def _candidates(size: int) -> Tensor:
    """(G, 6) forms on a grid."""
    centres = torch.linspace(0, size - 1, 6)
    angles = torch.arange(8) * (pi / 8)
    frequencies = torch.tensor([1 / size, 0.16, 0.26, 0.38]).log()
    widths = torch.tensor([size / 10, size / 5]).log()
    return torch.cartesian_prod(centres, centres, angles, frequencies, widths)[
        :, [0, 1, 2, 3, 4, 4]
    ]


def gabor_fit(atoms: Tensor, *, steps: int = 60) -> Tensor:
    """R² (M,) of the best Gabor function found for each atom (M, P²), 0 to 1.

    The best form of a grid is refined by gradient steps on all atoms at once; amplitude and phase
    are solved for exactly. What is found is a lower bound of the best R².

    Parameters
    ----------
    steps : of the refinement.
    """
    size = _side(atoms)
    unit = atoms.detach().float() - atoms.detach().float().mean(1, keepdim=True)
    unit = torch.nn.functional.normalize(unit, dim=1)
    even, odd = _waves(candidates := _candidates(size), size)
    best, at = _share(unit @ even.T, unit @ odd.T, even, odd).max(1)
    form = candidates[at]
    low, high = _limits(size)
    form = form.requires_grad_()
    adam = torch.optim.Adam([form], lr=0.1)
    for _ in range(steps):
        even, odd = _waves(form, size)
        share = _share((unit * even).sum(1), (unit * odd).sum(1), even, odd)
        best = torch.maximum(best, share.detach())
        (form.grad,) = torch.autograd.grad(-share.sum(), form)
        adam.step()
        with torch.no_grad():
            form.clamp_(low, high)
    return best.clamp(0, 1)


def orientation(atoms: Tensor) -> Tensor:
    """How much an atom's power lies along one direction, (M,): 0 for a round blob, 1 for a line.

    |Σ P(f) exp(2iθ(f))| / Σ P(f) over spatial frequencies f of direction θ: 1 minus the circular
    variance by which tuning to orientation is measured.
    """
    size = _side(atoms)
    squares = atoms.detach().float().view(-1, size, size)
    squares = squares - squares.mean((1, 2), keepdim=True)
    wide = 4 * size
    power = torch.fft.fft2(squares, s=(wide, wide)).abs().square()
    f = torch.fft.fftfreq(wide)
    theta = torch.atan2(f[:, None], f[None, :])
    turned = power * torch.exp(2j * theta)
    # What lies beyond the Nyquist circle, in the corners, has only diagonal directions.
    inside = torch.hypot(f[:, None], f[None, :]) <= 0.5
    total = (power * inside).sum((1, 2)).clamp_min(1e-12)
    return (turned * inside).sum((1, 2)).abs() / total


def gabor_like(atoms: Tensor) -> Tensor:
    """Which atoms (M,) are oriented, above 0.3, and Gabor functions to an R² above 0.6."""
    return (gabor_fit(atoms) > _FIT) & (orientation(atoms) > _ORIENTED)


def mosaic(atoms: Tensor, *, columns: int | None = None, gap: int = 1) -> Tensor:
    """One grey picture, uint8 (H, W), of atoms (M, P²); mid-grey is 0, each atom on its own scale.

    Parameters
    ----------
    columns : atoms side by side; None: about a square. gap : pixels between them.
    """
    size = _side(atoms)
    if columns is not None and columns < 1:
        raise GossamerError(f"columns is {columns}; give at least 1")
    wide = columns or max(1, round(len(atoms) ** 0.5))
    high = -(-len(atoms) // wide)
    scaled = atoms.detach().float() / atoms.detach().abs().amax(1, keepdim=True).clamp_min(1e-12)
    picture = torch.full((high * (size + gap) + gap, wide * (size + gap) + gap), 255.0)
    for i, atom in enumerate(scaled):
        top = gap + (i // wide) * (size + gap)
        left = gap + (i % wide) * (size + gap)
        picture[top : top + size, left : left + size] = 127.5 + 127.5 * atom.view(size, size)
    return picture.round().to(torch.uint8)
