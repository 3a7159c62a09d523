"""The packed executor: attention over what a shortened cache holds, heads of any length."""

from torch import Tensor

from gossamer.methods.attention.eviction.packed import PackedIndex
from gossamer.methods.attention.executor import Call, Executor, attend
from gossamer.methods.attention.executors.basic import in_parts
from gossamer.methods.attention.index import KeyIndex

__all__ = ["Packed"]


class Packed(Executor):
    """Fused attention over the longest head's places; shorter heads mask theirs at the front."""

    name = "packed"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        return None if isinstance(index, PackedIndex) else "the cache holds all keys"

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        return True

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        query = call.grouped_query()

        def part(rows: slice, mask: Tensor) -> Tensor:
            return attend(call, query[:, :, :, rows], call.key, call.value, mask)

        return in_parts(index, call, part).flatten(1, 2)
