"""The registry of executors, and the choice among them.

``auto`` takes the first that can run an index and computes less than a dense mask, in the order
of :data:`EXECUTORS`; the pattern holds in any case, under a dense mask if nothing else is worth
it. A named backend runs or says why it cannot.
"""

from torch import Tensor

from gossamer.core import GossamerError, unknown
from gossamer.methods.attention.executor import Call, Executor
from gossamer.methods.attention.executors.banded import Banded
from gossamer.methods.attention.executors.basic import Dense, Masked, Reference
from gossamer.methods.attention.executors.flex import Flex
from gossamer.methods.attention.executors.gather import Gather
from gossamer.methods.attention.executors.packed import Packed
from gossamer.methods.attention.executors.skip import FusedSkip, Skip
from gossamer.methods.attention.executors.spans import SpanWindows
from gossamer.methods.attention.executors.subset import Subset
from gossamer.methods.attention.executors.triton_decode import TritonDecode
from gossamer.methods.attention.executors.triton_prefill import TritonPrefill
from gossamer.methods.attention.index import KeyIndex

__all__ = ["BACKENDS", "EXECUTORS", "check_backend", "choose", "execute", "run"]

EXECUTORS: dict[str, Executor] = {
    executor.name: executor
    for executor in (
        Dense(),
        Banded(),
        SpanWindows(),
        Packed(),
        Subset(),
        TritonPrefill(),
        TritonDecode(),
        Gather(),
        FusedSkip(),
        Skip(),
        Flex(),
        Masked(),
        Reference(),
    )
}
"""By name, in the order in which ``auto`` asks them."""

BACKENDS = ("auto", "fastest", *(name for name in EXECUTORS if name != "dense"))
"""What a method's ``backend`` may be."""


def check_backend(backend: str) -> str:
    """The backend, or an error that names the known ones."""
    if backend not in BACKENDS:
        raise unknown("attention backend", backend, BACKENDS)
    return backend


def choose(index: KeyIndex, backend: str = "auto", call: Call | None = None) -> str:
    """The executor that will run an index; where nothing is removed that is ``dense``.

    Raises
    ------
    GossamerError
        If a named backend cannot run this index; the message says why.
    """
    if check_backend(backend) not in ("auto", "fastest"):
        if backend not in ("reference", "masked") and index.whole:
            return "dense"
        reason = EXECUTORS[backend].refusal(call, index)
        if reason is not None:
            raise GossamerError(
                f"backend {backend!r} cannot run here: {reason}; use backend='auto'"
            )
        return backend
    for name, executor in EXECUTORS.items():
        if executor.refusal(call, index) is None and executor.worth(call, index):
            return name
    raise AssertionError("a dense mask runs any index")


def run(name: str, call: Call, index: KeyIndex) -> Tensor:
    """Run one executor by name: (B, H, Q, E) in the query's dtype."""
    return EXECUTORS[name].run(call, index)


def execute(call: Call, index: KeyIndex, backend: str = "auto") -> tuple[Tensor, str]:
    """Attention over the kept keys: (B, H, Q, E), and which executor ran."""
    name = choose(index, backend, call)
    return run(name, call, index), name
