"""How good a dictionary is: on rows, inside the model, and against known atoms.

Shapes: R = rows, D = input width, M = latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.objective import Layout

__all__ = [
    "DictionaryScore",
    "Interval",
    "NormMatch",
    "antiparallel",
    "bootstrap",
    "matched_cosine",
    "norm_match",
    "score_rows",
]


@dataclass(frozen=True)
class DictionaryScore:
    """Figures of a dictionary on rows.

    Parameters
    ----------
    rows : measured on so many.
    fvu : share of the variance about the data's mean that is not explained; 0 is perfect.
    l0 : mean number of latents in a row, counted where the value is not zero: a negative value
        counts too.
    dead : share of latents that no row fired; see :attr:`resolution`.
    shrinkage : E‖x̂‖² / E[x · x̂]; below 1 the reconstruction is too small.
    """

    rows: int
    fvu: float
    l0: float
    dead: float
    shrinkage: float

    @property
    def ev(self) -> float:
        """Explained variance about the data's mean, 1 - FVU."""
        return 1 - self.fvu

    @property
    def resolution(self) -> float:
        """Frequency below which a latent that is alive may look dead: 3 in so many rows.

        A latent that fires so often is seen with a probability of 95 %.
        """
        return min(1.0, 3 / self.rows)


@torch.no_grad()
def score_rows(
    dictionary: Dictionary, batches: Iterable[Tensor], layout: Layout | None = None
) -> DictionaryScore:
    """Measure a dictionary on batches of (R, D) rows, in one pass.

    The variance is about the mean of all rows. About zero it would count the mean as signal
    that is explained, which flatters every dictionary.

    Parameters
    ----------
    layout : what the columns of a row are, where they hold more than what is read; a gradient
        is not shown to the dictionary.

    Raises
    ------
    GossamerError
        Without rows, or when all rows are equal: there is no variance to explain then.
    """
    rows = entries = 0
    error = spread = reconstructed = overlap = 0.0
    mean = torch.zeros(dictionary.d_out, dtype=torch.float64)
    fired = torch.zeros(dictionary.d_sae, dtype=torch.bool)
    for batch in batches:
        read, target, _ = (batch, None, None) if layout is None else layout.split(batch)
        codes = dictionary.encode(read)
        x = (read if target is None else target).double().cpu()
        x_hat = dictionary.decode(codes, read).double().cpu()
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


@torch.no_grad()
def antiparallel(atoms: Tensor, limit: float = 0.9) -> float:
    """Share of atoms (M, D) with a twin that points the other way, cosine below -``limit``."""
    unit = nn.functional.normalize(atoms.double(), dim=1)
    return float(((unit @ unit.T).amin(1) < -limit).double().mean())


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies in 95 of 100 resamplings of the documents."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, drawn: Tensor) -> "Interval":
        """A figure with the middle 95 % of its resamplings."""
        low, high = drawn.double().quantile(_TAILS).tolist()
        return cls(value, low, high)

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@torch.no_grad()
def bootstrap(
    dictionary: Dictionary, documents: Sequence[Tensor], *, draws: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Explained variance and L0 with intervals, from resampling whole documents.

    Tokens of a document are alike, so resampling tokens would give intervals far too narrow.
    Every resampling has its variance about its own mean.

    Parameters
    ----------
    documents : (R, D) rows of each, at least 2. draws : resamplings. seed : of the draws.

    Returns
    -------
    ``ev`` and ``l0``.

    Raises
    ------
    GossamerError
        For fewer than 2 documents with rows.
    """
    documents = [rows for rows in documents if len(rows)]
    if len(documents) < 2:
        raise GossamerError(f"{len(documents)} documents cannot be resampled; give at least 2")
    # Sums about the first document's mean: exact, and small where the mean is large.
    origin = documents[0].double().mean(0).cpu()
    sums = torch.stack([_sums(dictionary, rows, origin) for rows in documents])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(documents), (draws, len(documents)), generator=generator)
    whole, drawn = _figures(sums.sum(0)[None]), _figures(sums[chosen].sum(1))
    return {name: Interval.of(float(whole[i]), drawn[i]) for i, name in enumerate(("ev", "l0"))}


_TAILS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def _sums(dictionary: Dictionary, rows: Tensor, origin: Tensor) -> Tensor:
    """Of one document: rows, entries, squared error, squares and sum about an origin."""
    codes = dictionary.encode(rows)
    x = rows.double().cpu()
    error = (x - dictionary.decode(codes, rows).double().cpu()).square().sum()
    entries = ((codes.indices >= 0) & (codes.values != 0)).sum().double().cpu()
    x = x - origin
    count = torch.tensor(float(len(x)), dtype=torch.float64)
    return torch.cat([torch.stack([count, entries, error, x.square().sum()]), x.sum(0)])


def _figures(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Explained variance and L0 of (draws, 4 + D) sums."""
    count, entries, error, squares = sums[:, :4].unbind(1)
    spread = squares - sums[:, 4:].square().sum(1) / count
    return 1 - error / spread, entries / count


@dataclass(frozen=True, eq=False)
class NormMatch:
    """The data of the ZF plot: one point a row.

    Parameters
    ----------
    inputs : (R,), ‖x‖. codes : (R,), norm of (z_i ‖d_i‖)_i and ‖b_dec‖ together; on the diagonal
    where atoms behave as if orthogonal. bound : (R,), the paper's epsilon, |‖x‖² - ‖f‖²| / ((h -
    1) ‖f‖²) for a code f of h latents. error : (R,), ‖x - x̂‖² / ‖x‖².
    """

    inputs: Tensor
    codes: Tensor
    bound: Tensor
    error: Tensor

    @property
    def mismatch(self) -> float:
        """Median of |codes - inputs| / inputs."""
        return float(((self.codes - self.inputs).abs() / self.inputs).median())


@torch.no_grad()
def norm_match(dictionary: Dictionary, rows: Tensor) -> NormMatch:
    """How well norms of codes match norms of inputs, for a dictionary of any rule.

    Parameters
    ----------
    rows : (R, D); rows of zeros are left out.

    Source: arXiv 2503.24277, §3 (ZF plot, approximate feature activation, epsilon of the linear
    bound).
    """
    rows = rows[torch.linalg.vector_norm(rows, dim=1) > 0]
    codes = dictionary.codes(dictionary._rows(rows))
    sizes = dictionary.W_dec.norm(dim=1)[codes.indices.clamp_min(0)]
    squares = (codes.values * sizes).double().square().sum(1)
    squares = squares + dictionary.b_dec.double().square().sum()
    inputs = rows.double().square().sum(1)
    error = (rows - dictionary(rows)).double().square().sum(1) / inputs
    bound = (inputs - squares).abs() / ((dictionary.d_sae - 1) * squares.clamp_min(1e-300))
    return NormMatch(inputs.sqrt(), squares.sqrt(), bound, error)
