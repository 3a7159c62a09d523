"""What choosing keys costs on a GPU, beside the dense attention it is to replace.

    python benchmarks/attention_selection.py [--lengths 32768 131072] [--attend] [--json FILE]

The promise on an H200 (32 query heads, 8 key-value heads of width 128, bfloat16, batch 1):
choosing for MInference's vertical and slash lines (64 last queries, 1000 columns, 4096 offsets)
and for FlexPrefill (blocks of 128, gamma 0.9) costs at most 10 % of dense attention at 32768
tokens and 5 % at 131072. From queries and keys to the lists a kernel takes, waiting for the host
included; the largest of FlexPrefill's cases is timed, every head ranked block by block.
``torch``: the same estimates written in torch alone. ``--attend`` adds the attention that follows.
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
from torch.nn.functional import pad, scaled_dot_product_attention

from gossamer.core.scores.attention_estimate import (
    block_means as torch_means,
)
from gossamer.core.scores.attention_estimate import (
    mass_count,
    vertical_slash_mass,
)
from gossamer.kernels.attention_select import block_means, last_mass, mass_cut
from gossamer.kernels.block_attention import block_attention
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout

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


def block_diagonals(slash: Tensor, keep: int, near: int, blocks: int) -> Tensor:
    """(1, G, n) diagonals of blocks that hold one of the best offsets or one of the nearest."""
    best = slash.index_fill(-1, torch.arange(near, device="cuda"), torch.inf).topk(keep).indices
    held = torch.zeros(1, SHARED, blocks + 1, dtype=torch.bool, device="cuda")
    # Offset o lies on block diagonals o // BLOCK and the next, unless it is a multiple.
    held.scatter_(2, best // BLOCK, True)
    held.scatter_(2, (best + BLOCK - 1) // BLOCK, True)
    return held[..., :blocks]


def toeplitz(held: Tensor) -> Tensor:
    """(1, G, n, n): block j of row i where diagonal i - j is held."""
    blocks = held.shape[-1]
    padded = pad(held.flip(-1), (0, blocks - 1))
    return padded.unfold(-1, blocks, 1).flip(-2)


def minference(q: Tensor, k: Tensor, at: Layout, native: bool = True) -> BlockIndex:
    """Vertical and slash lines from the last 64 queries: 1000 columns, 4096 offsets."""
    last = q[:, :, -64:]
    if native:
        vertical, slash = last_mass(last, k)
    else:
        seen = at.mask(slice(at.queries - 64, at.queries))
        grouped = last.view(1, SHARED, HEADS // SHARED, 64, WIDTH)
        vertical, slash = vertical_slash_mass(grouped, k, WIDTH**-0.5, seen)
    first = vertical.index_fill(-1, torch.arange(30, device="cuda"), torch.inf)
    columns = first.topk(1000).indices.sort(-1).values
    held = block_diagonals(slash, 4096, 100, -(-at.keys // BLOCK))
    return BlockIndex.from_blocks(at, toeplitz(held), (BLOCK, BLOCK), columns)


def flexprefill(q: Tensor, k: Tensor, at: Layout, native: bool = True) -> BlockIndex:
    """Blocks that hold 0.9 of the pooled mass, with the last block's columns and diagonals."""
    blocks, gamma = -(-at.keys // BLOCK), 0.9
    last = q[:, :, -BLOCK:]
    grouped = q.view(1, SHARED, HEADS // SHARED, at.queries, WIDTH)
    if native:
        vertical, slash = last_mass(last, k)
        means = block_means(q, BLOCK).view(1, SHARED, -1, blocks, WIDTH), block_means(k, BLOCK)
    else:
        seen = at.mask(slice(at.queries - BLOCK, at.queries))
        vertical, slash = vertical_slash_mass(grouped[:, :, :, -BLOCK:], k, WIDTH**-0.5, seen)
        means = torch_means(grouped, BLOCK), torch_means(k, BLOCK)
    by_column = vertical.unflatten(-1, (-1, BLOCK)).sum(-1)
    by_diagonal = slash.unflatten(-1, (-1, BLOCK)).sum(-1)
    score = torch.einsum("bgrnd,bgmd->bgrnm", *means) * WIDTH**-0.5
    causal = torch.ones(blocks, blocks, dtype=torch.bool, device="cuda").tril()
    weight = score.masked_fill(~causal, -torch.inf).softmax(-1).mean(2) / blocks
    if native:
        kept = mass_cut(weight.flatten(2), gamma).view_as(weight)
        columns, diagonals = mass_cut(by_column, gamma), mass_cut(by_diagonal, gamma)
    else:
        kept, columns, diagonals = (cut(x, gamma) for x in (weight, by_column, by_diagonal))
    kept = kept | columns[:, :, None] | toeplitz(diagonals)
    kept[..., 0] = True
    kept |= torch.eye(blocks, dtype=torch.bool, device="cuda")
    return BlockIndex.from_blocks(at, kept & causal, (BLOCK, BLOCK))


def cut(weights: Tensor, mass: float) -> Tensor:
    """``mass_cut`` by sorting, as many as it takes."""
    flat = weights.flatten(2) if weights.dim() > 3 else weights
    order = flat.argsort(dim=-1, descending=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(flat.shape[-1], device="cuda").expand_as(order)
    )
    return (rank < mass_count(flat, mass)[..., None]).view_as(weights)


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
        weights = torch.rand(1, SHARED, blocks * blocks, device="cuda").square()
        weights /= weights.sum(-1, keepdim=True)
        calls: dict[str, Callable[[], object]] = {"dense": dense}
        lists = {}
        for name, select in (("minference", minference), ("flexprefill", flexprefill)):
            index = select(q, k, at)
            kept, whole = index.pairs()
            lists[name] = index
            print(f"{tokens} {name}: {kept / whole:.3f} of the causal pairs, blocks "
                  f"{len(index.indices)}")  # fmt: skip
            calls[f"{name}"] = lambda select=select: select(q, k, at)  # noqa: B023
            calls[f"{name}, torch"] = lambda select=select: select(q, k, at, False)  # noqa: B023
            if given.attend:
                calls[f"{name}, attend"] = lambda i=index: attend(i)
                calls[f"{name}, both"] = lambda s=select: attend(s(q, k, at))  # noqa: B023
        calls |= {
            "last 64 queries": lambda: last_mass(last[:, :, -64:], k),  # noqa: B023
            "last 128 queries": lambda: last_mass(last, k),  # noqa: B023
            "means of queries": lambda: block_means(q, BLOCK),  # noqa: B023
            "means of keys": lambda: block_means(k, BLOCK),  # noqa: B023
            "cut by mass": lambda: mass_cut(weights, 0.9),  # noqa: B023
        }
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        for select in (minference, flexprefill):
            select(q, k, at)
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
            if name in ("minference", "flexprefill") and tokens in LIMITS:
                verdict = "holds" if share <= LIMITS[tokens] else "MISSED"
                print(f"  at most {LIMITS[tokens]:.0%}: {verdict}")
            records.append({"tokens": tokens, "name": name, "ms": ms, "share": share})
        print(f"  extra memory of a selection at its peak: {peak / 1e6:.0f} MB")
    if given.json:
        given.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
