"""How fast block-sparse attention is on a GPU, beside the fastest dense attention there.

    python benchmarks/attention_prefill.py [--lengths 131072] [--kept 0.1 0.5] [--tune]
        [--flex] [--skip] [--columns] [--seconds 120] [--json FILE]

The promise on an H200 (32 query heads, 8 key-value heads of width 128, bfloat16, batch 1, random
causal blocks of 128 x 128, 131072 tokens): at least 7.5 times as fast as dense at 10 % of the
causal pairs and 1.5 times at 50 %. Dense is the faster of torch's cuDNN and flash attention,
measured in the same rounds; every key-value head has lists of its own, the diagonal is always
kept, and ``kept`` counts causal pairs. Results are checked against a dense mask at 4096 tokens
first. Times are medians of rounds run in turn, with lowest and highest; the plan of the lists (its
sort included) is part of ours, making the lists is not: see ``attention_selection.py``.
``--tune`` tries the tiles of both kernels, ``--flex`` adds torch's compiled FlexAttention and,
where it is installed, flashinfer,
``--columns`` 1000 random single columns beside the blocks, ``--skip`` attention that skips tiles
(BLASST) on keys made so that three of four tiles can be skipped: scores are always computed, so
it can reach 2 times at most.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

try:
    from gossamer.kernels.block_attention import block_attention
    from gossamer.kernels.block_attention.forward import Lists, Tiles, forward
    from gossamer.kernels.skip_softmax import skip_softmax
    from gossamer.kernels.skip_softmax.flash import LOG2E, prefill
except ImportError as problem:
    raise SystemExit(f"needs a GPU and triton: {problem}") from None

HEADS, SHARED, WIDTH, BLOCK = 32, 8, 128, 128
PROMISES = {0.1: 7.5, 0.5: 1.5}


def lists(tokens: int, kept: float) -> tuple[Tensor, Tensor, float]:
    """Random causal blocks of every key-value head, as CSR, and the share of pairs they hold."""
    blocks = tokens // BLOCK
    g = torch.Generator("cuda").manual_seed(0)
    row = torch.arange(blocks, device="cuda")
    below = row[:, None] > row
    # The diagonal is always read: what is drawn below it makes up for that.
    pairs = blocks * (blocks - 1) / 2 * BLOCK**2
    diagonal = blocks * BLOCK * (BLOCK + 1) / 2
    share = (kept * (pairs + diagonal) - diagonal) / pairs
    drawn = torch.rand(SHARED, blocks, blocks, device="cuda", generator=g) < share
    found = (drawn & below) | torch.eye(blocks, dtype=torch.bool, device="cuda")
    counts = found.sum(-1)
    ends = counts.flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(1, SHARED, blocks)
    indptr = torch.cat([starts, ends.view(1, SHARED, blocks)[..., -1:]], dim=-1)
    got = (float((drawn & below).sum()) / SHARED * BLOCK**2 + diagonal) / (pairs + diagonal)
    return indptr.to(torch.int32), found.nonzero()[:, -1].to(torch.int32), got


def tensors(tokens: int) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(1)
    return [
        torch.randn(1, tokens, h, WIDTH, device="cuda", generator=g).bfloat16().transpose(1, 2)
        for h in (HEADS, SHARED, SHARED)
    ]


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call in every round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            after.synchronize()
            if turn >= 2:
                times[name].append(before.elapsed_time(after))
    return times


def check(backend: str) -> float:
    """Error beside a dense mask in float32, at 4096 tokens."""
    q, k, v = tensors(4096)
    indptr, indices, _ = lists(4096, 0.3)
    found = block_attention(q, k, v, indptr, indices, (BLOCK, BLOCK), backend=backend)  # pyright: ignore
    wide = block_attention(
        *(x[:, :n].float() for x, n in ((q, 4), (k, 1), (v, 1))),
        *(indptr[:, :1], indices, (BLOCK, BLOCK)),
        backend="reference",
    )
    error = float((found[:, :4] - wide).norm() / wide.norm())
    assert error < 8e-3, f"{backend}: {error}"
    return error


def candidates() -> Iterator[tuple[str, bool, Tiles]]:
    yield from (
        ("hopper 128x128 s2", True, Tiles(1, 128, 128, 4, 2)),
        ("hopper 128x64 s4", True, Tiles(1, 128, 64, 4, 4)),
        ("triton 128x128 w8 s2", False, Tiles(1, 128, 128, 8, 2)),
        ("triton 128x128 w8 s3", False, Tiles(1, 128, 128, 8, 3)),
        ("triton 128x64 w8 s3", False, Tiles(1, 128, 64, 8, 3)),
        ("triton 128x64 w4 s2", False, Tiles(1, 128, 64, 4, 2)),
        ("triton 128x64 w4 s3", False, Tiles(1, 128, 64, 4, 3)),
        ("triton 2x128x64 w8 s3", False, Tiles(2, 128, 64, 8, 3)),
    )


def flex(q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, indices: Tensor) -> Callable[[], object]:
    """Torch's compiled FlexAttention of the same blocks, the diagonal ones masked."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = indptr.shape[2] - 1
    kept = block_map(indptr, indices).repeat_interleave(HEADS // SHARED, 0)[None]
    whole = kept & ~torch.eye(blocks, dtype=torch.bool, device="cuda")

    def packed(x: Tensor) -> tuple[Tensor, Tensor]:
        order = x.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return x.sum(-1).to(torch.int32), order.to(torch.int32)

    mask = BlockMask.from_kv_blocks(
        *packed(kept & ~whole),
        *packed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, j: i >= j,
    )
    run = torch.compile(flex_attention)
    return lambda: run(q, k, v, block_mask=mask, enable_gqa=True)


def flashinfer(
    q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, indices: Tensor
) -> Callable[[], object]:
    """flashinfer's attention over the same blocks, its plan made beforehand."""
    import flashinfer as fi  # pyright: ignore[reportMissingImports]

    tokens, blocks = q.shape[2], indptr.shape[2] - 1
    room = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    wrapper = fi.VariableBlockSparseAttentionWrapper(room)
    sizes = torch.full((SHARED, blocks), BLOCK, dtype=torch.int32, device="cuda")
    wrapper.plan(
        *(block_map(indptr, indices), sizes, sizes, HEADS, SHARED, WIDTH),
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    ours = block_attention(q, k, v, indptr, indices, (BLOCK, BLOCK))
    found = wrapper.run(q[0], k[0], v[0])
    error = float((found - ours[0]).float().norm() / ours.float().norm())
    assert error < 1e-2, f"flashinfer differs by {error} at {tokens}"
    return lambda: wrapper.run(q[0], k[0], v[0])


def block_map(indptr: Tensor, indices: Tensor) -> Tensor:
    """The lists as bool (G, rows, blocks)."""
    blocks = indptr.shape[2] - 1
    kept = torch.zeros(SHARED * blocks, blocks, dtype=torch.bool, device="cuda")
    row = torch.repeat_interleave(
        torch.arange(SHARED * blocks, device="cuda"), indptr[0].diff(dim=-1).flatten()
    )
    kept[row, indices.long()] = True
    return kept.view(SHARED, blocks, blocks)


def skipped(q: Tensor, k: Tensor, v: Tensor, rounds: int) -> None:
    """Attention that skips tiles, where one key in every 512 is loud for all queries."""
    tokens = q.shape[2]
    loud_q, loud_k = q + 2, k.clone()
    loud_k[:, :, ::512] = 2
    short = [x[:, : 4 if x is loud_q else 1, :1024].contiguous() for x in (loud_q, loud_k, v)]
    found, _ = skip_softmax(*short, 1e-3, backend="triton")
    wide, _ = skip_softmax(*(x.float() for x in short), 1e-3, backend="reference")
    assert float((found - wide).norm() / wide.norm()) < 1e-2
    kind = SDPBackend.CUDNN_ATTENTION
    calls: dict[str, Callable[[], object]] = {"dense": lambda: dense(kind, loud_q, loud_k, v)}

    def ours(cut: float, tile: tuple[int, int], warps: int, stages: int) -> Callable[[], Tensor]:
        return lambda: prefill(
            *(loud_q, loud_k, v),
            cut=cut,
            factor=WIDTH**-0.5 * LOG2E,
            query_offset=0,
            first=None,
            softcap=None,
            tile=tile,
            warps=warps,
            stages=stages,
        )[1]

    for shape in (((128, 128), 8, 2), ((128, 128), 8, 3), ((128, 64), 4, 2), ((128, 64), 8, 3)):
        calls[f"skip {shape}"] = ours(-10.0, *shape)
        calls[f"skip nothing {shape}"] = ours(float("-inf"), *shape)
    times = timed(calls, rounds)
    for name, ms in times.items():
        count = calls[name]() if name != "dense" else None
        speed = statistics.median(d / m for d, m in zip(times["dense"], ms, strict=True))
        note = ""
        if isinstance(count, Tensor):
            note = f" tiles skipped {int(count[..., 0].sum()) / int(count[..., 1].sum()):.3f}"
        print(f"{tokens} {name:<32} {statistics.median(ms):8.2f} ms {speed:6.2f}x{note}")


def print_break_even(records: list[dict], tokens: int, name: str, best: str) -> None:
    """Where a straight line through our times meets dense, selection not counted."""
    own = [r for r in records if r["tokens"] == tokens and r["name"] == name]
    whole = [statistics.median(r["ms"]) for r in records if r["name"] == best]
    if len(own) > 1:
        first, last = own[0], own[-1]
        low, high = (statistics.median(r["ms"]) for r in (first, last))
        slope = (high - low) / (last["kept"] - first["kept"])
        meets = first["kept"] + (statistics.median(whole) - low) / slope
        print(f"{tokens} {name}: as fast as dense where {meets:.2f} of the pairs are kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--skip", action="store_true")
    parser.add_argument("--columns", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0, help="for one length")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    assert torch.cuda.is_available(), "needs a GPU"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch 1, {HEADS} heads "
          f"over {SHARED} of width {WIDTH}, bfloat16, blocks of {BLOCK}")  # fmt: skip
    for backend in ("triton", "hopper"):
        print(f"{backend}: error {check(backend):.1e}")
    records: list[dict] = []
    for tokens in given.lengths:
        q, k, v = tensors(tokens)
        began = time.perf_counter()
        base: dict[str, Callable[[], object]] = {
            "dense cuDNN": lambda: dense(SDPBackend.CUDNN_ATTENTION, q, k, v),  # noqa: B023
            "dense flash": lambda: dense(SDPBackend.FLASH_ATTENTION, q, k, v),  # noqa: B023
        }
        reference = timed(base, 3)
        best = min(reference, key=lambda name: statistics.median(reference[name]))
        for name, ms in reference.items():
            print(f"{tokens} {name:<24} {statistics.median(ms):8.2f} ms", flush=True)
        for kept in given.kept:
            indptr, indices, share = lists(tokens, kept)
            found = Lists(indptr, indices, (BLOCK, BLOCK), None, None)
            calls: dict[str, Callable[[], object]] = {best: base[best]}

            def ours(
                hopper: bool,
                tiles: Tiles | None,
                at: Lists = found,
                qkv: tuple[Tensor, ...] = (q, k, v),
            ) -> Callable[[], object]:
                return lambda: forward(*qkv, at, scale=WIDTH**-0.5, hopper=hopper, tiles=tiles)

            calls["hopper"] = ours(True, None)
            calls["triton"] = ours(False, None)
            if given.columns:
                drawn = torch.rand(1, SHARED, tokens, device="cuda").topk(1000).indices
                drawn = drawn.sort(-1).values.to(torch.int32)
                for name, hopper in (("hopper", True), ("triton", False)):
                    calls[f"{name}, 1000 columns"] = ours(
                        hopper, None, found._replace(columns=drawn)
                    )
            if given.tune:
                calls |= {name: ours(hopper, tiles) for name, hopper, tiles in candidates()}
            if given.flex:
                for name, make in (("FlexAttention", flex), ("flashinfer", flashinfer)):
                    try:
                        calls[name] = make(q, k, v, indptr, indices)
                    except Exception as problem:
                        print(f"{name}: {type(problem).__name__} {str(problem)[:150]}")
            for name in list(calls):
                try:
                    calls[name]()
                    torch.cuda.synchronize()
                except Exception as problem:
                    print(f"{tokens} {name}: {type(problem).__name__} {str(problem)[:150]}")
                    del calls[name]
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            calls.get("hopper", calls["triton"])()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - held
            left = given.seconds - (time.perf_counter() - began)
            rounds = given.rounds if left > 0 else 1
            times = timed(calls, rounds)
            for name, ms in times.items():
                pairs = zip(times[best], ms, strict=True)
                speed = statistics.median(d / m for d, m in pairs)
                middle = statistics.median(ms)
                flops = 4 * WIDTH * HEADS * (tokens * (tokens + 1) / 2)
                rate = flops * (1.0 if name == best else share) / middle / 1e9
                print(f"{tokens} kept {share:.3f} {name:<24} {middle:8.2f} ms "
                      f"({min(ms):.2f} to {max(ms):.2f}) {rate:5.0f} TFLOP/s {speed:6.2f}x "
                      f"ideal {1 / share:.2f}x", flush=True)  # fmt: skip
                records.append({"tokens": tokens, "kept": share, "name": name, "ms": ms,
                                "speed": speed})  # fmt: skip
                if name == "hopper" and tokens == 131072 and kept in PROMISES:
                    verdict = "holds" if speed >= PROMISES[kept] else "MISSED"
                    print(f"  at least {PROMISES[kept]:g}x: {verdict}")
            print(f"  extra memory at its peak: {peak / 1e6:.0f} MB, of which the result "
                  f"{q.nbytes / 1e6:.0f} MB; a mask of all pairs would be "
                  f"{tokens * tokens / 1e6:.0f} MB")  # fmt: skip
        for name in ("hopper", "triton"):
            print_break_even(records, tokens, name, best)
        if given.skip:
            skipped(q, k, v, given.rounds)
    if given.json:
        given.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
