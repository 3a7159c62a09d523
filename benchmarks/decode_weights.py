"""How fast ``generate()`` is with sparse weights on CPU kernels, beside Hugging Face dense.

    python benchmarks/decode_weights.py [--threads 2] [--sparsities 0.9 0.8 0.5]
        [--dtypes float32 bfloat16] [--rounds 5] [--tokens 32] [--json FILE]
    python benchmarks/decode_weights.py --device cuda --dtypes bfloat16 --two-four --sparsities 0.7
        --hidden 8192 --inner 28672 --layers 4

One figure is promised: at sparsity 0.9, float32, at least 2.5 times dense, on a Llama-shaped model
of at least 128 MB of weights in its linear layers; at 0.5 never slower than dense.

The model is random (hidden 1024, inner 2816, 8 layers, vocabulary 8192: 462 MB in float32), its
linear layers pruned per row by magnitude, head included; embeddings are looked up, not read. Dense
and accelerated write the same tokens from the same prompt in turn, after a round that is not
counted; speed is the median of the rounds' ratios. Before that, logits of both are compared.
On a GPU both run as one CUDA graph a step, over a static cache, because plain ``generate`` there
waits for the host; plain ``generate`` is timed as well.
Choices are measured anew unless ``GOSSAMER_CHOICES`` names a folder.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from gossamer.execute import Accelerated, accelerate, generation

PROMISE = {0.9: 2.5, 0.5: 1.0}


def build(
    dtype: torch.dtype, hidden: int, inner: int, layers: int, device: str
) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


@torch.no_grad()
def prune(model: nn.Module, sparsity: float | None) -> int:
    """Set the smallest weights of every row, or 2:4 for None, to zero; bytes of linear layers."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            rows = layer.weight if sparsity is not None else layer.weight.view(-1, 4)
            count = 2 if sparsity is None else round(sparsity * layer.in_features)
            for part in rows.split(1 << 22 if sparsity is None else 1024):
                part.scatter_(1, part.abs().argsort(1)[:, :count], 0)
            total += layer.weight.nbytes
    return total


@torch.no_grad()
def graphed(model: Any, rounds: int, steps: int = 20) -> Callable[[], float]:
    """A decode step captured in a CUDA graph; returns what gives milliseconds of a step."""
    # Every step, replayed ones too, takes a place of the cache.
    cache = StaticCache(config=model.config, max_cache_len=steps * (rounds + 2) + 16)
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    place = torch.tensor([8], device="cuda")
    start = torch.arange(8, device="cuda")
    model(token.expand(1, 8), past_key_values=cache, cache_position=start)

    def step() -> torch.Tensor:
        options = {"cache_position": place, "position_ids": place[None]}
        return model(token, past_key_values=cache, use_cache=True, **options).logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    # The graph reads these where they lie now.
    held = (cache, token, place)

    def timed() -> float:
        assert held
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(steps):
            graph.replay()
        after.record()
        after.synchronize()
        assert bool(logits.isfinite().all())
        return before.elapsed_time(after) / steps

    return timed


def in_graphs(work: Accelerated, rounds: int) -> str:
    """Steps of dense and accelerated, replayed in turn."""
    with work.paused():
        dense = graphed(work.model, rounds)
    fast = graphed(work.model, rounds)
    pairs = [(dense(), fast()) for _ in range(rounds + 1)][1:]
    slow, quick = (statistics.median(each) for each in zip(*pairs, strict=True))
    speed = statistics.median(d / f for d, f in pairs)
    return f"one CUDA graph a step: dense {slow:.3f} ms, accelerated {quick:.3f} ms: {speed:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.8, 0.5])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--two-four", action="store_true", help="2:4 first")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("GOSSAMER_CHOICES", "off")
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for name in given.dtypes:
        for sparsity in [None] * given.two_four + given.sparsities:
            model = build(
                getattr(torch, name), given.hidden, given.inner, given.layers, given.device
            )
            size = prune(model, sparsity)
            pattern = "2:4" if sparsity is None else f"{sparsity:.0%}"
            ids = torch.arange(1, 9, device=given.device)[None]
            with torch.no_grad():
                expected = model(ids).logits.float()
                work = accelerate(model, keep_dense=True, launches=given.device == "cpu")
                error = (model(ids).logits.float() - expected).norm() / expected.norm()
            assert float(error) < (1e-4 if name == "float32" else 3e-2), float(error)
            pair = generation(work, new_tokens=given.tokens, rounds=given.rounds)
            print(
                f"{name} {pattern}, {size / 1e6:.0f} MB of linear weights, load average "
                f"{os.getloadavg()[0]:.1f}: {pair}",
                flush=True,
            )
            if given.device != "cpu":
                print(f"  {in_graphs(work, given.rounds)}", flush=True)
            if sparsity and name == "float32" and (wanted := PROMISE.get(sparsity)):
                verdict = "holds" if pair.speedup >= wanted else "MISSED"
                print(f"  at least {wanted:g}x: {verdict}")
            rows.append(
                {"dtype": name, "sparsity": sparsity, "bytes": size, **pair.to_dict()}
                | {"moved": work.bytes_moved(), "dense": work.dense_bytes}
            )
            work.restore()
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
