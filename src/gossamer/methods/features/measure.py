"""How good a dictionary is: on rows, inside the model, and against known atoms.

Shapes: R = rows, D = input width, M = latents.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary

__all__ = ["DictionaryScore", "matched_cosine", "score_rows"]


@dataclass(frozen=True)
class DictionaryScore:
    """Figures of a dictionary on rows.

    Parameters
    ----------
    rows : measured on so many.
    fvu : share of the variance about the data's mean that is not explained; 0 is perfect.
    l0 : mean number of latents in a row, counted where the value is not zero.
    dead : share of latents that no row fired; it cannot be finer than the rows allow.
    shrinkage : E‖x̂‖² / E[x · x̂]; below 1 the reconstruction is too small.
    """

    rows: int
    fvu: float
    l0: float
    dead: float
    shrinkage: float


@torch.no_grad()
def score_rows(dictionary: Dictionary, batches: Iterable[Tensor]) -> DictionaryScore:
    """Measure a dictionary on batches of (R, D) rows, in one pass.

    The variance is about the mean of all rows. About zero it would count the mean as signal
    that is explained, which flatters every dictionary.

    Raises
    ------
    GossamerError
        Without rows, or when all rows are equal: there is no variance to explain then.
    """
    rows = entries = 0
    error = spread = reconstructed = overlap = 0.0
    mean = torch.zeros(dictionary.d_in, dtype=torch.float64)
    fired = torch.zeros(dictionary.d_sae, dtype=torch.bool)
    for batch in batches:
        codes = dictionary.encode(batch)
        x, x_hat = batch.double().cpu(), dictionary.decode(codes).double().cpu()
        alive = codes.indices[(codes.indices >= 0) & (codes.values != 0)].cpu()
        fired[alive] = True
        entries += len(alive)
        error += float((x - x_hat).square().sum())
        reconstructed += float(x_hat.square().sum())
        overlap += float((x * x_hat).sum())
        # Chan's update: the variance of the whole from those of the batches, without E[x²] - E[x]².
        rows += len(x)
        shift = x.mean(0) - mean
        mean += shift * (len(x) / rows)
        spread += float((x - x.mean(0)).square().sum())
        spread += float(shift.square().sum()) * len(x) * (rows - len(x)) / rows
    if not spread:
        raise GossamerError(f"{rows} rows of activations do not vary; give more text")
    return DictionaryScore(
        rows=rows,
        fvu=error / spread,
        l0=entries / rows,
        dead=1 - float(fired.double().mean()),
        shrinkage=reconstructed / overlap if overlap else 0.0,
    )


@torch.no_grad()
def matched_cosine(found: Tensor, true: Tensor) -> float:
    """Mean |cosine| of true atoms and the found ones matched to them, 0 to 1.

    Each true atom gets another found atom, so that the sum is largest.

    Parameters
    ----------
    found : (M, D). true : (G, D), G <= M.
    """
    cosine = (
        nn.functional.normalize(true.double(), dim=1)
        @ nn.functional.normalize(found.double(), dim=1).T
    )
    rows, columns = linear_sum_assignment(-cosine.abs().cpu().numpy())
    return float(cosine.abs()[rows, columns].mean())
