"""Decode time of CoreInfer against dense, in turns, on a random Llama of a given shape.

    python benchmarks/coreinfer.py --threads 1
    python benchmarks/coreinfer.py --hidden 768 --inner 2048 --blocks 16 --sparsity 0.6

Prints, for each sparsity, the median time of a decoded token in all feed-forward layers and in
the whole model, dense and with core neurons, and the ratio of both. fp32, one prompt, Hugging
Face's own code on both sides. The prompt is read densely by both; its time is printed beside.
"""

import argparse
import time
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.claims.activations.coreinfer import mlp_seconds
from gossamer.evaluate import speed
from gossamer.methods.activations.coreinfer import CoreInfer


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=3072)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.blocks,
        num_attention_heads=max(1, options.hidden // 64),
    )
    model = LlamaForCausalLM(config).eval()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.0f}M parameters, {options.threads} threads, torch {torch.__version__}")
    prompt = torch.arange(options.prompt)[None] % config.vocab_size
    run = {"prompt_tokens": options.prompt, "new_tokens": options.tokens, "repeats": 1, "warmup": 0}
    for sparsity in options.sparsity:
        method = CoreInfer(sparsity=sparsity, layers=(0.0, 1.0))
        inner: dict[str, list[float]] = {"dense": [], "core": []}
        whole: dict[str, list[float]] = {"dense": [], "core": []}
        first: dict[str, list[float]] = {"dense": [], "core": []}
        for _ in range(options.rounds):
            for name in ("dense", "core"):
                work = method.apply(model) if name == "core" else None
                inner[name].append(mlp_seconds(model, prompt, options.tokens))
                found = speed(model, **run)
                whole[name].append(1 / found.decode.median)
                first[name].append(options.prompt / found.prefill.median)
                if work is not None:
                    work.restore()
        rows = (("feed-forward", inner), ("whole token", whole), ("prompt", first))
        for what, times in rows:
            dense, core = median(times["dense"]), median(times["core"])
            print(
                f"sparsity {sparsity:.2f} {what:<12} dense {dense * 1e3:8.2f} ms, core "
                f"{core * 1e3:8.2f} ms, {dense / core:.2f} times faster"
            )


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
