"""What a sparse training's state holds, and what may take it up again."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gossamer.core import GossamerError, pack_bits, unpack_bits
from gossamer.methods.training.sparsifier.layout import world
from gossamer.methods.training.sparsifier.masks import Held

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["check_state", "common_state", "masks_of"]


def common_state(
    method: "SparseTraining", updates: int, flops: dict[str, float], held: Mapping[str, Held]
) -> dict[str, Any]:
    """Method, counts, and whole masks at one bit an entry, the same on every rank."""
    return {
        "method": method.to_dict(),
        "updates": updates,
        "world_size": world(),
        "flops": flops,
        "masks": {path: pack_bits(one.layout.full(one.mask)).cpu() for path, one in held.items()},
    }


def check_state(
    state: Mapping[str, Any], method: "SparseTraining", held: Mapping[str, Held]
) -> None:
    """Refuse a state that would not go on exactly.

    Raises
    ------
    GossamerError
        If it is of another method, model or number of processes.
    """
    if dict(state["method"]) != method.to_dict():
        wrong = [k for k, v in method.to_dict().items() if state["method"].get(k) != v]
        raise GossamerError(
            f"the state is of another training ({', '.join(wrong) or 'more parameters'} "
            "differs); attach the method with the parameters it was saved with"
        )
    if state["world_size"] != world():
        raise GossamerError(
            f"the state was saved by {state['world_size']} processes, now there are {world()}; "
            "resume with as many, since the batches and so the masks would differ"
        )
    if set(state["masks"]) != set(held):
        odd = sorted(set(state["masks"]) ^ set(held))
        raise GossamerError(f"the state does not fit the model's layers: {', '.join(odd[:3])}")


def masks_of(state: Mapping[str, Any], held: Mapping[str, Held]) -> Iterator[tuple[str, Tensor]]:
    """The saved masks, of what is here."""
    for path, one in held.items():
        whole = unpack_bits(state["masks"][path], one.layout.shape)
        yield path, one.layout.part(whole)
