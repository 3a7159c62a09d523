"""The split of a dictionary's error: the part that the activation predicts linearly, and the rest.

Shapes: R = rows, D = width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary

__all__ = ["ErrorSplit", "LinearFit", "linear_fit", "r_squared", "split_error", "with_linear_error"]

_RCOND = 1e-9
_LEAST = 4


@dataclass(frozen=True)
class LinearFit:
    """y ≈ x @ weight + bias.

    Parameters
    ----------
    weight : float64 (D, D_out). bias : float64 (D_out,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(R, D) to (R, D_out), float64."""
        return x.double() @ self.weight + self.bias


@dataclass(frozen=True)
class ErrorSplit:
    """How much of a dictionary's error is linear in the activation, on rows not fitted on.

    Parameters
    ----------
    linear : the map that predicts the error.
    error_r2 : explained share of the error's variance, mean over channels.
    norm_r2 : explained share of the variance of the error's squared norm.
    shuffled_r2, shuffled_norm_r2 : the same where every row was fitted on another's error; what
        exceeds 0 there is overfitting.
    fvu : share of the activations' variance that the dictionary misses. nonlinear_fvu : that
        it misses with the linear prediction added.
    fitted, held : rows fitted on, and measured on.
    """

    linear: LinearFit
    error_r2: float
    norm_r2: float
    shuffled_r2: float
    shuffled_norm_r2: float
    fvu: float
    nonlinear_fvu: float
    fitted: int
    held: int

    def figures(self) -> dict[str, float]:
        """Everything but the map."""
        return {name: value for name, value in vars(self).items() if name != "linear"}


def linear_fit(x: Tensor, y: Tensor) -> LinearFit:
    """Least squares of (R, D_out) on (R, D) with a bias, in float64.

    Directions in which x varies by less than 1e-9 of its strongest one are left alone.
    """
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    weight = torch.linalg.pinv(x - x_mean, rtol=_RCOND) @ (y - y_mean)
    return LinearFit(weight, y_mean - x_mean @ weight)


def r_squared(wanted: Tensor, predicted: Tensor) -> float:
    """1 - squared error / variance, per channel of (R, D), then the mean; below 0 if worse.

    Channels that do not vary count as 0.
    """
    wanted, predicted = wanted.double(), predicted.double()
    spread = (wanted - wanted.mean(0)).square().sum(0)
    missed = (wanted - predicted).square().sum(0)
    shares = torch.where(spread > 0, 1 - missed / spread.clamp_min(1e-300), 0.0)
    return float(shares.mean())


@torch.no_grad()
def split_error(made: Dictionary, batches: Iterable[Tensor], *, seed: int = 0) -> ErrorSplit:
    """Fit the error on the first half of the rows, in random order, and measure on the second.

    Parameters
    ----------
    batches : of (R, D) rows of an autoencoder, not a transcoder. seed : of the order.

    Raises
    ------
    GossamerError
        With fewer than 4 rows: one half could not be held against the other.
    """
    x = torch.cat([part.float().cpu() for part in batches])
    if len(x) < _LEAST:
        raise GossamerError(
            f"{len(x)} rows are too few to split an error on; give at least {_LEAST}, and twice "
            f"the width, {2 * made.d_in}, for a fit that carries over"
        )
    generator = torch.Generator().manual_seed(seed)
    x = x[torch.randperm(len(x), generator=generator)]
    device = made.W_dec.device
    error = torch.cat([part - made(part.to(device)).cpu() for part in x.split(4096)])
    half = len(x) // 2
    near, far, mine, theirs = x[:half], x[half:], error[:half], error[half:]
    norms = error.double().square().sum(1, keepdim=True)
    # One draw for both, made before anything is fitted.
    other = torch.randperm(half, generator=generator)
    linear = linear_fit(near, mine)
    shuffled = linear_fit(near, mine[other])
    of_norm, of_shuffled = (linear_fit(near, part) for part in (norms[:half], norms[:half][other]))
    spread = (far.double() - far.double().mean(0)).square().sum()
    rest = theirs.double() - linear(far)
    return ErrorSplit(
        linear=linear,
        error_r2=r_squared(theirs, linear(far)),
        norm_r2=r_squared(norms[half:], of_norm(far)),
        shuffled_r2=r_squared(theirs, shuffled(far)),
        shuffled_norm_r2=r_squared(norms[half:], of_shuffled(far)),
        fvu=float(theirs.double().square().sum() / spread),
        nonlinear_fvu=float(rest.square().sum() / spread),
        fitted=half,
        held=len(x) - half,
    )


@torch.no_grad()
def with_linear_error(made: Dictionary, linear: LinearFit, part: str) -> Dictionary:
    """The dictionary that reconstructs with a part of its error put back.

    The codes stay as they are; a linear map of the activation beside them does the rest, so the
    result is a dictionary with a skip.

    Parameters
    ----------
    part : ``none``: x̂; ``linear``: x̂ plus the linearly predicted error; ``nonlinear``: x̂ plus
        the rest of the error, which is x less the prediction.
    """
    assert part in ("none", "linear", "nonlinear")
    new = Dictionary(made.d_in, made.d_sae, made.rule, made.metadata, d_out=made.d_out, skip=True)
    new = new.to(made.W_dec)
    assert new.W_skip is not None
    weight, bias = linear.weight.to(made.W_dec), linear.bias.to(made.b_dec)
    new.W_enc.copy_(made.W_enc)
    new.b_enc.copy_(made.b_enc - made.b_dec @ made.W_enc)
    if part == "nonlinear":
        # x - (x B + c): codes are still made, for those who edit them, but say nothing here.
        new.W_skip.copy_(torch.eye(made.d_in).to(weight) - weight)
        new.b_dec.copy_(-bias)
    else:
        new.W_dec.copy_(made.W_dec)
        new.b_dec.copy_(made.b_dec)
        if part == "linear":
            new.W_skip.copy_(weight)
            new.b_dec.add_(bias)
    return new.eval().requires_grad_(False)
