"""What choosing keys costs on a GPU, beside the dense attention it is to replace.

    python benchmarks/attention_selection.py [--lengths 32768 131072] [--attend] [--json FILE]

The promise on an H200 (32 query heads, 8 key-value heads of width 128, bfloat16, batch 1):
choosing costs at most 10 % of dense attention at 32768 tokens and 5 % at 131072, for MInference
(64 last queries; 1000 columns and 4096 distances in every head; ``mixed``: a quarter of the heads
of each kind, blocks by mean among them) and for FlexPrefill (blocks of 128, gamma 0.9; ``all
blocks``: no head left to columns and diagonals). The methods' own selectors are timed, from queries
and keys to the lists a kernel takes, waiting for the host included, and then the kernels they
consist of. ``--attend`` adds the attention that follows.
Keys have planted columns, bands and blocks, so that lists are not the whole prompt; their shares of
causal pairs are printed. Times are medians of rounds, with lowest and highest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gossamer.kernels.attention_select import (
    Tiling,
    block_lists,
    block_means,
    last_mass,
    mass_cut,
    pooled_share,
)
from gossamer.kernels.block_attention import block_attention
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.flexprefill import FlexPrefill
from gossamer.methods.attention.head_search import Head
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.minference import HeadSelector
from gossamer.methods.attention.selector import Selector

HEADS, SHARED, WIDTH, BLOCK = 32, 8, 128, 128
LIMITS = {32768: 0.10, 131072: 0.05}


def tensors(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that look at a few columns, at their neighbourhood, and at noise."""
    g = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(1, tokens, HEADS, WIDTH, device="cuda", generator=g)
    key = torch.randn(1, tokens, SHARED, WIDTH, device="cuda", generator=g)
    value = torch.randn(1, tokens, SHARED, WIDTH, device="cuda", generator=g)
    query[..., 0] += 8.0
    at = torch.randint(0, tokens, (300,), device="cuda", generator=g)
    key[:, at, :, 0] += 12.0
    # A slow rotation: near keys point the same way.
    angle = torch.arange(tokens, device="cuda") * (2 * torch.pi / 4096)
    for channel, wave in ((1, angle.cos()), (2, angle.sin())):
        query[..., channel] += 8.0 * wave[:, None]
        key[..., channel] += 8.0 * wave[:, None]
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (query, key, value))
    return q, k, v


def layout(tokens: int) -> Layout:
    return Layout(1, tokens, tokens, device=torch.device("cuda"))


def selectors(tokens: int) -> dict[str, Selector]:
    """What the methods themselves run, by name."""

    def heads(*own: Head) -> HeadSelector:
        return HeadSelector((own,), BLOCK, 64, 30, 100)

    lines = Head("vertical_slash", 1000, 4096)
    few = Head("vertical_slash", 100, 800)
    kinds = (lines, few, Head("a_shape", 100, 4096), Head("block_sparse", 20, 1))
    flex = {
        name: FlexPrefill(gamma=0.9, tau=tau).plan(torch.nn.Module(), None, tokens)
        for name, tau in (("flexprefill", 0.1), ("flexprefill, all blocks", 1.0))
    }
    return {"minference": heads(lines), "minference, mixed": heads(*kinds, *kinds), **flex}


def choose(selector: Selector, q: Tensor, k: Tensor, at: Layout) -> BlockIndex:
    """A call keeps what was estimated for it, so every round starts anew."""
    index = selector.select(Call(q, k, k), at, 0)
    assert isinstance(index, BlockIndex)
    return index


def timed(calls: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Wall milliseconds of every call, the device idle before and after."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--attend", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    assert torch.cuda.is_available(), "needs a GPU"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch 1, {HEADS} heads "
          f"over {SHARED} of width {WIDTH}, bfloat16")  # fmt: skip
    records = []
    for tokens in given.lengths:
        q, k, v = tensors(tokens)
        at = layout(tokens)

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def attend(index: BlockIndex, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return block_attention(
                q, k, v, index.indptr, index.indices, index.block, columns=index.columns
            )

        last = q[:, :, -128:]
        blocks = -(-tokens // BLOCK)
        means = block_means(q, BLOCK, tail=True), block_means(k, BLOCK)
        weights = pooled_share(*means, base=0)[0]
        seen = torch.ones_like(weights, dtype=torch.bool).tril()
        calls: dict[str, Callable[[], object]] = {"dense": dense}
        chosen = selectors(tokens)
        for name, own in chosen.items():
            index = choose(own, q, k, at)
            kept, whole = index.pairs()
            print(f"{tokens} {name}: {kept / whole:.3f} of the causal pairs, blocks "
                  f"{len(index.indices)}")  # fmt: skip
            calls[name] = lambda s=own: choose(s, q, k, at)  # noqa: B023
            if given.attend:
                calls[f"{name}, attend"] = lambda i=index: attend(i)
                calls[f"{name}, both"] = lambda s=own: attend(choose(s, q, k, at))  # noqa: B023
        tiling = Tiling(tokens, tokens, 0, BLOCK, BLOCK)
        calls |= {
            "last 64 queries": lambda: last_mass(last[:, :, -64:], k),  # noqa: B023
            "last 128 queries": lambda: last_mass(last, k),  # noqa: B023
            "means of queries": lambda: block_means(q, BLOCK),  # noqa: B023
            "means of keys": lambda: block_means(k, BLOCK),  # noqa: B023
            "shares of blocks": lambda: pooled_share(*means, base=0),  # noqa: B023
            "cut by mass": lambda: mass_cut(weights.flatten(2), 0.9),  # noqa: B023
            f"lists of {blocks} blocks": lambda: block_lists(tiling, kept=seen),  # noqa: B023
        }
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        for own in chosen.values():
            choose(own, q, k, at)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        times = timed(calls)
        base = statistics.median(times["dense"])
        for name, ms in times.items():
            middle = statistics.median(ms)
            share = middle / base
            speed = f" {base / middle:5.2f}x" if "both" in name or "attend" in name else ""
            print(f"{tokens} {name:<24}{middle:9.3f} ms ({min(ms):.3f} to {max(ms):.3f}) "
                  f"{share:6.1%} of dense{speed}", flush=True)  # fmt: skip
            if name in chosen and tokens in LIMITS:
                verdict = "holds" if share <= LIMITS[tokens] else "MISSED"
                print(f"  at most {LIMITS[tokens]:.0%}: {verdict}")
            records.append({"tokens": tokens, "name": name, "ms": ms, "share": share})
        print(f"  extra memory of a selection at its peak: {peak / 1e6:.0f} MB")
    if given.json:
        given.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
