"""Prompts read sparsely on a trained model's own queries and keys: time, choice included, and rho.

    python benchmarks/attention_activations.py MODEL [--lengths 32768 131072] [--task niah_multikey]
        [--gamma 0.9 0.95] [--sparsity 0.9] [--rounds 5] [--device cuda] [--json FILE]

MODEL is a long-context model, such as the one that ``python -m gossamer.models.recall.train``
writes. One prompt of the long-context tasks runs through it; queries, keys and values of its layers
are stacked as the heads of one layer (recall: 8 layers of 4 heads over 1 make 32 heads over 8).
The methods' own selectors then choose, and the block-sparse kernel attends: FlexPrefill at each
gamma, MInference with the kinds of heads it found on another prompt, and 1000 columns with 4096
diagonals for every head. Printed: share of the causal pairs read, rho (mean attention mass kept,
1024 queries), milliseconds of choosing, of attending, and of both, beside cuDNN's dense attention;
the goal is 4 times dense at 131072 tokens. Medians of rounds, with lowest and highest. Last, what
no choice can beat: the fewest blocks of 128 x 128 that hold that share of every query block's true
mass.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from gossamer.evaluate.long_context import samples
from gossamer.kernels.block_attention import block_attention
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors.gather import Gather
from gossamer.methods.attention.flexprefill import FlexPrefill
from gossamer.methods.attention.head_search import Head
from gossamer.methods.attention.index import BlockIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import kept_mass, walk
from gossamer.methods.attention.minference import HeadSelector, MInference
from gossamer.models import Tokens, load_model

BLOCK = 128


@contextmanager
def recording(model: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Queries, keys and values of every layer that runs meanwhile."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        seen.append((query, key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("recording", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("recording")
    try:
        yield seen
    finally:
        model.set_attn_implementation(before)


def timed(call: Callable[[], object], rounds: int, device: torch.device) -> list[float]:
    """Wall milliseconds, the device idle before and after."""
    times: list[float] = []
    for turn in range(rounds + 2):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        if turn >= 2:
            times.append(1e3 * (time.perf_counter() - began))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def attend(call: Call, index: KeyIndex) -> Tensor:
    """The block-sparse kernel, or its stand-in on a CPU."""
    assert isinstance(index, BlockIndex)
    if call.query.device.type != "cuda":
        return Gather().run(call, index)
    lists = index.indptr, index.indices, index.block
    return block_attention(call.query, call.key, call.value, *lists, columns=index.columns)


def dense(call: Call) -> Tensor:
    if call.query.device.type != "cuda":
        return scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=True, enable_gqa=True
        )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=True, enable_gqa=True
        )


def fewest_blocks(call: Call, shares: list[float]) -> list[float]:
    """Share of the causal blocks that is needed to hold each share of the mass, by true mass."""
    shared, repeat = call.groups
    tokens, whole, needed = call.key.shape[2], 0, [0] * len(shares)
    place = torch.arange(tokens, device=call.key.device)
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        query = call.query[0, :, start:end].reshape(shared, -1, call.query.shape[3])
        score = (query @ call.key[0, :, :end].mT).float() * call.factor
        score = score.unflatten(1, (repeat, end - start))
        score = score.masked_fill(place[:end] > place[start:end, None], -torch.inf)
        mass = score.softmax(-1).mean((1, 2))
        mass = torch.nn.functional.pad(mass, (0, -end % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
        reached = mass.sort(-1, descending=True).values.cumsum(-1)
        whole += mass.numel()
        for n, share in enumerate(shares):
            needed[n] += int((reached < share).sum()) + shared
    return [count / whole for count in needed]


def selectors(
    loaded: Any, prompt: Tokens, gammas: list[float], sparsities: list[float]
) -> Iterator[tuple[str, Any]]:
    """What chooses, by name; MInference's kinds of heads come from a search on ``prompt``."""
    length = prompt.length
    for gamma in gammas:
        yield (
            f"FlexPrefill gamma {gamma:g}",
            FlexPrefill(gamma=gamma).plan(loaded.model, None, length),
        )
    for sparsity in sparsities:
        method = MInference(sparsity=sparsity, block_size=BLOCK)
        began = time.perf_counter()
        found = method.plan(loaded.model, prompt, length)
        print(f"  MInference sparsity {sparsity:g}: searched {time.perf_counter() - began:.1f} s")
        # A method's layer names its key-value heads; stacked, they are the heads of one layer.
        heads = tuple(head for layer in found.layers for head in layer)
        yield f"MInference sparsity {sparsity:g}", HeadSelector((heads,), BLOCK, 64, 30, 100)
    lines = (Head("vertical_slash", 1000, 4096),)
    yield "1000 columns, 4096 diagonals", HeadSelector((lines,), BLOCK, 64, 30, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--task", default="niah_multikey")
    parser.add_argument("--gamma", type=float, nargs="*", default=[0.9, 0.95])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.9])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    loaded = load_model(given.model, device=given.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {given.model}, {given.task}, seed {given.seed}")
    records: list[dict[str, Any]] = []
    for length in given.lengths:
        both = samples(given.task, loaded.tokenizer, length=length, count=2, seed=given.seed)
        prompt, other = (Tokens.from_ids(torch.tensor([one.ids])) for one in both)
        with torch.inference_mode():
            with recording(loaded.model) as seen:
                walk(loaded.model, prompt)
            query, key, value = (torch.cat([one[i] for one in seen], dim=1) for i in range(3))
            seen.clear()
            call = Call(query, key, value)
            tokens = query.shape[2]
            at = Layout(1, tokens, tokens, device=device)
            base = timed(lambda: dense(call), given.rounds, device)  # noqa: B023
            middle = statistics.median(base)
            heads, shared = query.shape[1], key.shape[1]
            print(
                f"{tokens} tokens, {heads} heads over {shared}, {query.dtype}: dense {middle:.3f} "
                f"ms ({min(base):.3f} to {max(base):.3f})"
            )
            for label, selector in selectors(loaded, other, given.gamma, given.sparsity):

                def choose(selector: Any = selector) -> KeyIndex:
                    # A call keeps what was estimated for it, so every round starts anew.
                    return selector.select(Call(query, key, value), at, 0)  # noqa: B023

                index = choose()
                kept, whole = index.pairs()
                mass = kept_mass(call, index)
                times = {
                    "choose": timed(choose, given.rounds, device),
                    "attend": timed(lambda: attend(call, index), given.rounds, device),  # noqa: B023
                    "both": timed(lambda: attend(call, choose()), given.rounds, device),  # noqa: B023
                }
                text = ", ".join(
                    f"{what} {statistics.median(ms):.3f} ms ({min(ms):.3f} to {max(ms):.3f})"
                    for what, ms in times.items()
                )
                gain = middle / statistics.median(times["both"])
                print(
                    f"  {label}: {kept / whole:.3f} of the pairs, rho {float(mass.mean()):.4f} "
                    f"(least of a head {float(mass.min()):.3f}), {text}: {gain:.2f}x",
                    flush=True,
                )
                records.append(
                    {
                        "tokens": tokens,
                        "name": label,
                        "density": kept / whole,
                        "rho": float(mass.mean()),
                        "rho_least": float(mass.min()),
                        "dense_ms": base,
                        "gain": gain,
                        **times,
                    }
                )
            if given.gamma:
                least = fewest_blocks(call, given.gamma)
                pairs = zip(given.gamma, least, strict=True)
                text = ", ".join(f"{gamma:g}: {share:.3f}" for gamma, share in pairs)
                print(f"  fewest blocks that hold a share of the mass: {text}", flush=True)
                records.append({"tokens": tokens, "name": "fewest blocks", "blocks": least})
    if given.json:
        given.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
