"""How fast one token attends to chosen pages of a long cache on a GPU, beside dense attention.

    python benchmarks/attention_decode.py [--lengths 131072] [--batches 1 8] [--pages 16 32 64]
        [--kept 0.0625] [--tune] [--json FILE]

The promise on an H200 (32 query heads, 8 key-value heads of width 128, bfloat16, 131072 keys,
1/16 of the pages, batch 1 and 8): at least 6 times as fast as dense attention, reading the page
bounds and choosing the pages included. Lines:

- ``dense``: torch's attention of one token, by backend; the fastest is the baseline.
- ``attend``: our kernel over pages that are known.
- ``choose + attend``: reads the bounds of all pages (minima and maxima of every channel, bfloat16),
  scores them, finds the best, attends. ``meanstd``: the other scorer.
- ``skip``: attention that skips tiles (BLASST) on these random keys: nothing can be skipped, so
  it shows what the kernel costs.

Every line is a CUDA graph of calls over several caches in turn that together exceed the second
cache ten times, so nothing is read twice from it. Graphs are replayed in turn; times are medians
of the rounds, with lowest and highest. Results are checked against the definition first.
``bytes`` are keys, values and bounds that must be read; TB/s is their rate.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

try:
    from gossamer.kernels.page_attention import (
        page_attention,
        page_bounds,
        page_decode,
        page_scores,
    )
    from gossamer.kernels.page_attention.decode import Plan, choose, decode
    from gossamer.kernels.page_attention.reference import choose_reference
    from gossamer.kernels.skip_softmax import skip_softmax_decode
except ImportError as problem:
    raise SystemExit(f"needs a GPU and triton: {problem}") from None

HEADS, SHARED, WIDTH = 32, 8, 128
CALLS, ROUNDS, PROMISE = 8, 15, 6.0


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def stacked(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads that share keys as further queries: keys are read once whatever the backend."""
    with sdpa_kernel(backend):
        grouped = q.view(len(q), SHARED, HEADS // SHARED, WIDTH)
        return scaled_dot_product_attention(grouped, k, v)


def graph(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for n in range(CALLS):
            calls[n % len(calls)]()
    return captured


def timed(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, list[float]]:
    """Microseconds of one call in every round."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(ROUNDS + 2):
        for name, captured in graphs.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            captured.replay()
            after.record()
            after.synchronize()
            if turn >= 2:
                times[name].append(1e3 * before.elapsed_time(after) / CALLS)
    return times


def lists(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    chosen = choose_reference(score, keep)
    rows = torch.arange(chosen[..., 0].numel(), device="cuda").view(chosen.shape[:2]) * keep
    return torch.stack([rows, rows + keep], dim=-1), chosen.flatten().to(torch.int32)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def choose_and_attend(
    q: Tensor, k: Tensor, v: Tensor, one: Tensor, two: Tensor, keep: int, page: int, scorer: str
) -> Tensor:
    score = page_scores(q, one, two, scorer)  # pyright: ignore[reportArgumentType]
    return page_decode(q, k, v, score, keep, page)


def tuned(
    q: Tensor, k: Tensor, v: Tensor, one: Tensor, two: Tensor, keep: int, page: int, plan: Plan
) -> Tensor:
    score, scale = page_scores(q, one, two), WIDTH**-0.5
    chosen = {"indices": choose(score, keep), "keep": keep}
    return decode(q, k, v, page, end=k.shape[2], scale=scale, plan=plan, **chosen)


def report(
    label: str, times: dict[str, list[float]], moved: dict[str, int], records: list[dict]
) -> None:
    base = min((n for n in times if n.startswith("dense")), key=lambda n: min(times[n]))
    for name, us in times.items():
        pairs = zip(times[base], us, strict=True)
        speed, middle = statistics.median(d / u for d, u in pairs), statistics.median(us)
        print(
            f"{label} {name:<30}{middle:8.1f} us ({min(us):.1f} to {max(us):.1f}) "
            f"{moved[name] / 1e6:7.1f} MB {moved[name] / middle / 1e6:5.2f} TB/s {speed:6.2f}x "
            f"limit {moved[base] / moved[name]:.1f}x",
            flush=True,
        )
        if "131072" in label and name.startswith("choose + attend"):
            print(f"  at least {PROMISE:g}x: {'holds' if speed >= PROMISE else 'MISSED'}")
        records.append({"case": label, "name": name, "us": us, "speed": speed})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--kept", type=float, default=1 / 16)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    assert torch.cuda.is_available(), "needs a GPU"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, one token, {HEADS} heads "
          f"over {SHARED} of width {WIDTH}, bfloat16, {given.kept:.4f} of the pages")  # fmt: skip
    records: list[dict] = []
    for tokens in given.lengths:
        for batch in given.batches:
            one_kv = batch * SHARED * tokens * WIDTH * 4
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            # What a sparse call reads must exceed the cache as well.
            copies = max(2, min(CALLS, round(10 * cache / (one_kv * given.kept))))
            g = torch.Generator("cuda").manual_seed(0)
            shape = (batch, SHARED, tokens, WIDTH)
            caches = [
                [torch.randn(shape, device="cuda", generator=g, dtype=torch.bfloat16)
                 for _ in range(2)]
                for _ in range(copies)
            ]  # fmt: skip
            queries = [
                torch.randn(batch, HEADS, 1, WIDTH, device="cuda", generator=g).bfloat16()
                for _ in range(copies)
            ]
            kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
            base: dict[str, list[Callable[[], object]]] = {}
            for name, kind in kinds.items():
                for how, call in (("", dense), (", heads as queries", stacked)):
                    base[f"dense {name}{how}"] = [
                        partial(call, kind, q, *kv) for q, kv in zip(queries, caches, strict=True)
                    ]
            base["skip"] = [
                partial(skip_softmax_decode, q, *kv, 1e-4)
                for q, kv in zip(queries, caches, strict=True)
            ]
            graphs, moved = {}, {}
            # What a graph reads must outlive it.
            held: list[object] = []
            for name, calls in base.items():
                try:
                    graphs[name] = graph(calls)
                    moved[name] = one_kv
                except Exception as problem:
                    print(f"{name}: {type(problem).__name__} {str(problem)[:120]}")
                    torch.cuda.synchronize()
            for page in given.pages:
                keep = round(given.kept * tokens / page)
                calls = {}
                for scorer in ("minmax", "meanstd") if page == given.pages[0] else ("minmax",):
                    found = [page_bounds(kv[0][:, :, : tokens - page], page, scorer)
                             for kv in caches]  # fmt: skip
                    q, (k, v), (one, two) = queries[0], caches[0], found[0]
                    score = page_scores(q, one, two, scorer)
                    listed = lists(score, keep)
                    expected = page_attention(
                        *(q[:1], k[:1], v[:1]), listed[0][:1], listed[1], page, backend="reference"
                    )
                    got = choose_and_attend(q, k, v, one, two, keep, page, scorer)
                    assert error(got[:1], expected) < 8e-3, error(got[:1], expected)
                    assert error(page_attention(q, k, v, *listed, page)[:1], expected) < 8e-3
                    name = f"choose + attend, {page}"
                    name += "" if scorer == "minmax" else " meanstd"
                    calls[name] = [
                        partial(choose_and_attend, q, *kv, *b, keep, page, scorer)
                        for q, kv, b in zip(queries, caches, found, strict=True)
                    ]
                    moved[name] = int(one_kv * (given.kept + 1 / page))
                    if scorer == "minmax":
                        calls[f"choose, {page}"] = [
                            partial(page_scores, q, *b) for q, b in zip(queries, found, strict=True)
                        ]
                        moved[f"choose, {page}"] = one_kv // page
                        known = [lists(page_scores(q, *b), keep)
                                 for q, b in zip(queries, found, strict=True)]  # fmt: skip
                        plans: list[Plan | None] = [None]
                        if given.tune:
                            plans += [
                                Plan(max(1, splits // batch), *rest)
                                for splits in (16, 32, 64)
                                for rest in ((64, 4, 3), (64, 4, 5), (64, 8, 3), (128, 8, 3))
                            ]
                        for plan in plans:
                            name = f"attend, {page}" + ("" if plan is None else f" {tuple(plan)}")
                            calls[name] = [
                                partial(decode, q, *kv, page, end=tokens, scale=WIDTH**-0.5,
                                        indptr=at[0], indices=at[1], plan=plan)
                                for q, kv, at in zip(queries, caches, known, strict=True)
                            ]  # fmt: skip
                            moved[name] = int(one_kv * given.kept)
                            if plan is not None:
                                name = f"choose + {name}"
                                calls[name] = [
                                    partial(tuned, q, *kv, *b, keep, page, plan)
                                    for q, kv, b in zip(queries, caches, found, strict=True)
                                ]
                                moved[name] = int(one_kv * (given.kept + 1 / page))
                for name, call in calls.items():
                    graphs[name] = graph(call)
                held.append(calls)
            report(f"{tokens} batch {batch}", timed(graphs), moved, records)
            del graphs, caches
            torch.cuda.empty_cache()
    if given.json:
        given.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
