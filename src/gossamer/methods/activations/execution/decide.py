"""What a product with few active channels costs in every form, before it is built or timed.

A product of few rows is limited by the bytes of weights it reads, so its time is those bytes over
the machine's measured bandwidth, plus what starting it costs.
"""

import time
from dataclasses import dataclass
from functools import cache

import torch

from gossamer.core import GossamerError
from gossamer.kernels.gather_gemv.native import linear_of
from gossamer.kernels.gather_gemv.op import run_linear
from gossamer.kernels.gather_gemv.rows import rows

__all__ = ["Prediction", "bandwidth", "predict"]

_CALL = 5e-6  # seconds to start a product
_SORT = 4e-10  # seconds a channel to find out whether it is active
_LEAP = 0.9  # share of the bandwidth that rows which lie apart are read at


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of a product in every form, and the one to take.

    Parameters
    ----------
    milliseconds : by form. ``dense`` reads the whole matrix; ``axpy`` the rows of Wᵀ of active
        input channels; ``dot`` the rows of W of active outputs; ``slice`` copies the active rows
        into a smaller matrix first, as a composition of library calls does.
    """

    milliseconds: dict[str, float]

    def best(self, *forms: str, margin: float = 0.05) -> str:
        """The fastest of some forms (all when none is named), dense unless it saves the margin."""
        among = forms or tuple(self.milliseconds)
        found = min(among, key=lambda form: self.milliseconds[form])
        least = (1.0 - margin) * self.milliseconds["dense"]
        return found if self.milliseconds[found] <= least else "dense"


def predict(
    shape: tuple[int, int],
    sparsity: float,
    rows: int = 1,
    *,
    rate: float,
    width: float = 4,
) -> Prediction:
    """Time of W x for some rows of x, of which each drops a share of the channels.

    Rows are taken as dropping independently, so the union of their active channels is
    1 − sparsityʳᵒʷˢ: the pessimistic end.

    Parameters
    ----------
    shape : (O, I) of W.
    sparsity : share of the channels (axpy, slice) or outputs (dot) a row drops, 0 to 1.
    rate : bytes per second that are read, see :func:`bandwidth`.
    width : bytes a weight takes.

    Raises
    ------
    GossamerError
        If a number is out of its range.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise GossamerError(f"sparsity is {sparsity!r}; it is a share, 0 to 1")
    if rows < 1 or rate <= 0 or width <= 0:
        raise GossamerError(
            f"{rows} rows, {rate:g} bytes/s and {width:g} bytes a weight; all are above 0"
        )
    outputs, inputs = shape
    read = outputs * inputs * width / rate
    share = 1.0 - sparsity**rows
    seconds = {
        "dense": _CALL + read,
        "axpy": _CALL + _SORT * inputs * rows + share * read / (1.0 if share == 1.0 else _LEAP),
        "dot": _CALL + _SORT * outputs * rows + share * read / (1.0 if share == 1.0 else _LEAP),
        # Read, written and read again, by three library calls.
        "slice": 3 * _CALL + _SORT * inputs * rows + 3 * share * read,
    }
    return Prediction({form: 1e3 * value for form, value in seconds.items()})


@cache
def bandwidth(threads: int | None = None) -> float:
    """Bytes per second that our own dense product reads here, the best of a few passes.

    Measured once for a number of threads (torch's present one when left out), over 128 MiB.

    Raises
    ------
    CannotBuild
        If the kernel cannot be compiled.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        layer = rows(torch.ones(4096, 8192), major="output")
        x, made, best = torch.ones(1, 8192), linear_of(layer), float("inf")
        for _ in range(5):
            begin = time.perf_counter()
            run_linear(made, x, 4096)
            best = min(best, time.perf_counter() - begin)
        return layer.weight.nbytes / best
    finally:
        torch.set_num_threads(before)
