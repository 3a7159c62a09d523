"""What a sparse training's state holds, and what may take it up again."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.core import GossamerError, pack_bits, unpack_bits
from gossamer.core.saved import check_parts
from gossamer.methods.training.sparsifier.layout import world
from gossamer.methods.training.sparsifier.masks import Held

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["check_state", "common_state", "masks_of"]

_PARTS: dict[str, type] = {
    "method": Mapping,
    "updates": int,
    "world_size": int,
    "flops": Mapping,
    "masks": Mapping,
    "removed": Mapping,
}


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
    state: Mapping[str, Any],
    method: "SparseTraining",
    held: Mapping[str, Held],
    own: Mapping[str, type] | None = None,
) -> None:
    """Refuse a state that would not go on exactly.

    Parameters
    ----------
    own : what a method adds to its states, and of what type.

    Raises
    ------
    GossamerError
        If it is of another method, model or number of processes.
    """
    check_parts(state, _PARTS, "a sparse training", "sparsifier")
    if dict(state["method"]) != method.to_dict():
        wrong = [k for k, v in method.to_dict().items() if state["method"].get(k) != v]
        raise GossamerError(
            f"the state is of another training ({', '.join(wrong) or 'more parameters'} "
            "differs); attach the method with the parameters it was saved with"
        )
    check_parts(state, own or {}, f"a training by {method.key()}", "sparsifier")
    check_parts(state["flops"], {"updates": int}, "the operations of a training", "sparsifier")
    updates = state["updates"]
    # A loop of one's own may train for longer than the schedule lasts.
    if not 0 <= updates <= max(method.steps, state["flops"]["updates"]):
        raise GossamerError(
            f"the state is of update {updates}, the training lasts {method.steps}; pass what "
            "sparsifier.state_dict() gave"
        )
    if state["world_size"] != world():
        raise GossamerError(
            f"the state was saved by {state['world_size']} processes, now there are {world()}; "
            "resume with as many, since the batches and so the masks would differ"
        )
    if set(state["masks"]) != set(held):
        odd = sorted(set(state["masks"]) ^ set(held))
        names = ", ".join(map(str, odd[:3]))
        raise GossamerError(f"the state does not fit the model's layers: {names}")
    for path, one in held.items():
        bits = state["masks"][path]
        size = (prod(one.layout.shape) + 7) // 8
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.numel() != size:
            raise GossamerError(
                f"the state's packed mask of {path} does not fit its shape "
                f"{tuple(one.layout.shape)}; pass the state saved with this model"
            )


def masks_of(state: Mapping[str, Any], held: Mapping[str, Held]) -> Iterator[tuple[str, Tensor]]:
    """The saved masks, of what is here."""
    for path, one in held.items():
        whole = unpack_bits(state["masks"][path], one.layout.shape)
        yield path, one.layout.part(whole)
