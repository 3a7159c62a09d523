"""The objective: what a dictionary is asked to be good at on a batch, whatever its rule.

Squared error as a share of the batch's variance, the rule's own terms, and the auxiliary loss by
which underused latents are brought back.
Shapes: R = rows, D = input width, D_out = width of the target, M = latents.
"""

from typing import NamedTuple

from torch import Tensor

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import Batch, Codes, Step, combine

__all__ = ["Layout", "Terms", "aux_loss", "objective"]


class Layout(NamedTuple):
    """Which columns of a row are what: first those read, then the target, then the gradient.

    Parameters
    ----------
    reads : D, columns that the encoder reads.
    target : D_out, columns that a transcoder reconstructs; 0: what it reads.
    gradient : columns of the gradient of the model's loss; 0 where it is not measured.
    """

    reads: int
    target: int = 0
    gradient: int = 0

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows (R, all columns) as what is read, the target or None, the gradient or None."""
        x, target, gradient = rows.split(tuple(self), dim=1)
        return x, target if self.target else None, gradient if self.gradient else None


class Terms(NamedTuple):
    """What one batch gives.

    Parameters
    ----------
    loss : scalar to differentiate. fvu : squared error as a share of the batch's variance,
    detached. codes : of the batch; they say which latents fired.
    """

    loss: Tensor
    fvu: Tensor
    codes: Codes


def aux_loss(
    made: Dictionary, pre: Tensor, batch: Batch | None, error: Tensor, pool: Tensor, aux_k: int
) -> Tensor:
    """How badly the latents of a pool alone model the error of the others; 0 without any.

    Their top ``aux_k`` pre-activations, where positive (for signed rules: the largest either
    way), reconstruct the detached error without ``b_dec``; the squared miss is a share of the
    error's variance.

    Parameters
    ----------
    pre : (R, M). error : (R, D_out), target minus reconstruction. pool : int64, (U,).
    """
    if not len(pool) or not aux_k:
        return error.new_zeros(())
    codes = made.rule.revive(pre, pool, min(aux_k, len(pool)), batch)
    target = error.detach()
    miss = (target - combine(codes, made.W_dec)).square().sum()
    return (miss / (target - target.mean(0)).square().sum()).nan_to_num(0.0, 0.0, 0.0)


def objective(
    made: Dictionary,
    rows: Tensor,
    *,
    aux_k: int,
    aux_coefficient: float,
    dead: Tensor,
    target: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Terms:
    """The loss of a dictionary on scaled rows.

    Parameters
    ----------
    rows : (R, D). target : (R, D_out), what to reconstruct; None: the rows.
    aux_k : latents that model the error of a row; 0: no auxiliary loss.
    dead : int64, latents that have not fired for too long.
    gradient : (R, D_out), of the model's loss, for rules that rank by it.
    """
    rule = made.rule
    pre, batch = made.encoded(rows, gradient)
    codes = rule(pre, batch)
    wanted = (rows if target is None else target).to(made.b_dec.dtype)
    error = wanted - made.reconstruct(codes, rows)
    step = Step(batch, pre, codes, error)
    spread = (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12)
    main, penalty = rule.fit_loss(step), rule.penalty(step)
    if penalty is not None:
        main = main + penalty
    loss = main / spread
    if aux_k and aux_coefficient:
        pool = rule.underused(dead)
        loss = loss + aux_coefficient * aux_loss(made, pre, batch, error, pool, aux_k)
    return Terms(loss, error.detach().square().sum() / spread, codes)
