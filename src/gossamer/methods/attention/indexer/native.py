"""The hierarchical search inside models that bring their own DSA indexer.

Transformers' DeepSeek-V3.2 and GLM-5 modules select keys in a submodule ``indexer`` that returns
top-k indices. Its forward is exchanged for one that computes the same queries, weights and keys
with the submodule's own weights and searches block by block. Attention itself stays the model's.
Shapes: B = batch, S = queries, T = keys, H = indexer heads, D = indexer width.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.attention.indexer.search import Found, Keys, flat_search, hierarchical_search
from gossamer.models import Applied, Report, SiteRow, State, context_length

if TYPE_CHECKING:
    from gossamer.methods.attention.base import AttentionMethod

__all__ = ["NativeSearch", "is_native", "native_indexers"]

_PARTS = ("wq_b", "wk", "k_norm", "weights_proj", "index_topk", "n_heads", "head_dim")
_HELD = 1 << 24
"""Scores, or channels of gathered keys, held at once."""


def native_indexers(model: nn.Module) -> dict[str, Any]:
    """The model's own indexers by path."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "indexer" and all(hasattr(module, p) for p in _PARTS)
    }


def is_native(model: nn.Module) -> bool:
    """Whether a model brings its own indexers."""
    return bool(native_indexers(model))


class NativeSearch(Applied):
    """The block-by-block search at work in a model's own indexers.

    Attributes
    ----------
    scored : query-key scores the last call of any indexer computed per query.
    """

    simulated = False

    def __init__(
        self,
        method: "AttentionMethod",
        model: nn.Module,
        block: int,
        blocks: int,
        length: int | None,
    ) -> None:
        super().__init__(method, model)
        self.indexers = native_indexers(model)
        topk = max(int(indexer.index_topk) for indexer in self.indexers.values())
        if 0 < blocks * block < topk:
            raise GossamerError(
                f"{blocks} blocks of {block} keys hold fewer than the model's {topk}; "
                f"give at least {-(-topk // block)} blocks"
            )
        self.block, self.blocks = block, blocks
        self.length = length or min(32_768, context_length(model) or 32_768)
        self.scored = 0
        # A forward of the instance hides that of its class and is taken off again to undo.
        for indexer in self.indexers.values():
            indexer.forward = self._forward_of(indexer)
        self._join()

    def _undo(self) -> None:
        for indexer in self.indexers.values():
            vars(indexer).pop("forward", None)

    def _forward_of(self, indexer: Any) -> Any:
        @torch.no_grad()
        def forward(
            hidden_states: Tensor,
            q_resid: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            attention_mask: Tensor,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            **_: Any,
        ) -> Tensor:
            cos, sin = position_embeddings
            query = indexer.wq_b(q_resid).unflatten(-1, (indexer.n_heads, indexer.head_dim))
            query = _turned(query, cos, sin, indexer.qk_rope_head_dim)
            key = indexer.k_norm(indexer.wk(hidden_states))[:, :, None]
            key = _turned(key, cos, sin, indexer.qk_rope_head_dim)[:, :, 0]
            if past_key_values is not None:
                key = past_key_values.update_indexer(key, indexer.layer_idx)
            weight = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype))
            weight = weight.float() * indexer.n_heads**-0.5
            return self._search(query, weight, key, attention_mask, int(indexer.index_topk))

        return forward

    def _search(
        self, query: Tensor, weight: Tensor, key: Tensor, mask: Tensor, keep: int
    ) -> Tensor:
        """(B, S, k) int32 places of the chosen keys, as the model's own indexer returns them."""
        batch, queries, heads, width = query.shape
        length = key.shape[1]
        keep = min(keep, length)
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = seen[..., :length].expand(batch, queries, length)
        flat = self.blocks == 0 or self.blocks * self.block >= length
        # Padding is what no query sees; blocks are of the cache's places.
        keys = Keys(key, seen.any(1))
        means = None if flat else keys.means(self.block)
        held = heads * length if flat else self.blocks * self.block * width
        step = max(1, _HELD // (batch * held))
        out = []
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            own = seen[:, rows]

            def sees(place: Tensor, own: Tensor = own) -> Tensor:
                return own.gather(2, place)

            part = query[:, rows], weight[:, rows], keys
            if means is None:
                found = flat_search(*part, sees, keep)
            else:
                # The last key a query sees is its own.
                last = length - 1 - own.flip(-1).int().argmax(-1)
                found = hierarchical_search(
                    *part, means, last, sees, keep, block=self.block, blocks=self.blocks
                )
            self.scored = found.scored
            out.append(_filled(found, keep))
        return torch.cat(out, dim=1).to(torch.int32)

    def report(self) -> Report:
        length, rows = self.length, []
        total = length * (length + 1) // 2
        query = torch.arange(1, length + 1)
        candidates = -(-query // self.block) + self.blocks * self.block if self.blocks else query
        scored = int(torch.minimum(query, candidates).sum())
        for number, name in enumerate(self.indexers):
            rows.append(SiteRow(name, "attention.indexer", number, total, 1 - scored / total))
        topk = max(int(indexer.index_topk) for indexer in self.indexers.values())
        return Report(
            method=self.method.to_dict(),
            rows=tuple(rows),
            unit="indexer scores",
            all_size=total * len(rows),
            simulated=False,
            notes=(
                f"the model's own indexers choose {topk} keys a query, as before; what is saved "
                f"are their scores, counted at {length} tokens",
                "attention runs as the model runs it",
            ),
        )

    def state(self) -> State:
        return State({"block": self.block, "blocks": self.blocks, "length": self.length})


def _turned(tensor: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
    """Half-split rotary embedding of the first ``width`` channels of (B, S, H, D)."""
    half = width // 2
    one, two, rest = tensor[..., :half], tensor[..., half:width], tensor[..., width:]
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)


def _filled(found: Found, keep: int) -> Tensor:
    """Chosen places (B, q, k); a row with fewer repeats one of its own, or 0 if it has none."""
    beyond = torch.iinfo(torch.int64).max
    place = torch.where(found.kept, found.place, beyond).sort(-1).values[..., :keep]
    first = place[..., :1]
    return torch.where(place == beyond, torch.where(first == beyond, 0, first), place)
