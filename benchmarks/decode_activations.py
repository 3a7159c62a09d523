"""Tokens per second of a Llama-shaped model whose decode steps skip channels, on CPU.

    python benchmarks/decode_activations.py [--threads 1 2] [--sparsities 0.5 0.7] [--rounds 15]
        [--steps 8] [--shape SHAPE] [--batch 1] [--no-compile] [--kernels] [--dtype float32]

Two figures are promised for 152 M float32 parameters: at least 1.6 times the best dense at 50 % and
2.3 times at 70 %, hence at least 2.5 and 4 times transformers' eager mode.

SHAPE is ``head-7%`` (default: hidden 1024, inner 2816, 11 layers, vocabulary 10,240, tied: the head
is 7 % of the bytes a token reads, as in Llama-3-8B) or ``head-16%`` (hidden 768, inner 2048, 18
layers, vocabulary 32,000, tied), both of 152 M random parameters. Thresholds are TEAL's, calibrated
on random tokens; the share of channels really read is counted and printed with the ceiling that
its bytes allow.

Ways: transformers eager; its decode step under ``torch.compile`` with a static cache, whole graph;
our own dense step on the same native code; the steps that skip. All decode
``--steps`` tokens a round after the same prompt, in turn, so that a busy machine slows all alike;
speeds are medians of the rounds, ratios medians of the rounds' ratios. Steps are checked before
anything is timed. ``--kernels`` prints the product of 4096 x 11008 beside the stream instead.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from gossamer.kernels.gather_gemv import native, rows
from gossamer.kernels.gather_gemv.op import instruction_set, run_linear, stream_rate
from gossamer.methods.activations.teal import TEAL
from gossamer.models import Tokens

SHAPES = {
    "head-7%": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 11,
                "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 10240},
    "head-16%": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 18,
                 "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000},
}  # fmt: skip
PROMISES = {0.5: (1.6, 2.5), 0.7: (2.3, 4.0)}
PROMPT = 32


def streams(threads: int) -> dict[str, float]:
    """GB/s that one thread of ours, and torch's sum, read from 256 MB; the best of 9."""
    torch.set_num_threads(threads)
    data, best = torch.ones(1 << 26), float("inf")
    for _ in range(9):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return {"one thread of ours": stream_rate(data, 9), "torch sum": data.nbytes / best / 1e9}


class Decoding:
    """A model that goes on from the same prompt, some tokens a round."""

    def __init__(self, model: Any, batch: int, steps: int) -> None:
        self.model, self.steps = model, steps
        generator = torch.Generator().manual_seed(0)
        size = model.config.vocab_size
        self.prompt = torch.randint(size, (batch, PROMPT), generator=generator)
        self.step: Any = model
        self.static = False

    def compile(self) -> "Decoding":
        """Let a compiled graph do the steps, on a cache of fixed size; the prompt runs eager."""
        self.static = True
        self.step = torch.compile(self.model, fullgraph=True, dynamic=False)
        return self

    @torch.no_grad()
    def round(self, steps: int | None = None) -> tuple[float, Tensor]:
        """Seconds a step, and the last logits; the prompt and a first step are not timed."""
        room = PROMPT + self.steps + 2
        config = self.model.config
        cache = StaticCache(config=config, max_cache_len=room) if self.static else DynamicCache()
        given = {"past_key_values": cache, "use_cache": True}
        self.model(input_ids=self.prompt, logits_to_keep=1, **given)
        token = self.prompt[:, :1]
        logits = self.step(input_ids=token, **given).logits
        begin = time.perf_counter()
        for _ in range(steps or self.steps):
            token = logits[:, -1:].argmax(-1)
            logits = self.step(input_ids=token, **given).logits
        return (time.perf_counter() - begin) / (steps or self.steps), logits


def make(shape: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=2048, dtype=dtype
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def decode(given: argparse.Namespace, threads: int) -> None:
    torch.set_num_threads(threads)
    dtype = getattr(torch, given.dtype)
    models = {"eager": make(given.shape, dtype), "own dense": make(given.shape, dtype)}
    if not given.no_compile:
        models["compile"] = make(given.shape, dtype)
    generator = torch.Generator().manual_seed(1)
    size = models["eager"].config.vocab_size
    data = Tokens.from_ids(torch.randint(size, (8, 64), generator=generator))
    work, share = {}, {}
    for sparsity in (0.0, *given.sparsities):
        name = f"sparse {sparsity}" if sparsity else "own dense"
        model = models.setdefault(name, make(given.shape, dtype))
        work[name] = TEAL(sparsity=sparsity, dense_prefix=0).apply(model, data)
        masked = Decoding(model, given.batch, 2).round()[1]
        work[name].accelerate((given.batch,))
        assert work[name]._execution.whole
        found = Decoding(model, given.batch, 2).round()[1]
        off = float((found - masked).norm() / masked.norm())
        assert off < (0.05 if dtype == torch.float32 else 0.3), (name, off)
    runs = {name: Decoding(model, given.batch, given.steps) for name, model in models.items()}
    if "compile" in runs:
        runs["compile"].compile()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(given.rounds + 2):
        for name, run in runs.items():
            taken = run.round()[0]
            if turn >= 2:
                times[name].append(taken)
    dense = [name for name in times if name in ("own dense", "compile")]
    best = min(dense, key=lambda name: statistics.median(times[name]))
    model = models["eager"]
    head = model.lm_head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    width = next(model.parameters()).element_size()
    print(
        f"{threads} thread{'s' * (threads > 1)}, {given.shape}: {total / 1e6:.1f} M {given.dtype}, "
        f"batch {given.batch}, {PROMPT} tokens before, load {os.getloadavg()[0]:.1f}; "
        f"best dense: {best}"
    )
    print("              ms a step (lowest to highest)   tokens/s   GB/s   / best dense   / eager")
    ratio = {}
    for name, found in times.items():
        execution = work[name]._execution if name in work else None
        read = execution.read() if execution is not None else None
        share[name] = 1.0 if read is None else read
        moved = width * ((total - head) * share[name] + head)
        ratio[name] = [
            statistics.median(a / b for a, b in zip(times[other], found, strict=True))
            for other in (best, "eager")
        ]
        middle = statistics.median(found)
        span = f"({1e3 * min(found):.1f} to {1e3 * max(found):.1f})"
        print(
            f"{name:<13}{1e3 * middle:>7.1f} {span:<22}{given.batch / middle:>10.1f}"
            f"{moved / middle / 1e9:>7.1f}{ratio[name][0]:>13.2f}{ratio[name][1]:>11.2f}"
            + (f"   channels read {share[name]:.1%}" if read is not None else "")
        )
    for sparsity, wanted in PROMISES.items():
        name = f"sparse {sparsity}"
        if name not in times or given.batch > 1:
            continue
        ceiling = total / ((total - head) * share[name] + head)
        for what, has, needs in zip(("best dense", "eager"), ratio[name], wanted, strict=True):
            verdict = "holds" if has >= needs else "MISSED"
            print(f"{name}: {has:.2f} x {what} (at least {needs:g}: {verdict})", end="; ")
        print(f"ceiling by bytes {ceiling:.2f} x dense")
    for applied in work.values():
        applied.restore()


def products(given: argparse.Namespace, found: dict[str, float]) -> None:
    """One product of 4096 x 11008 on one thread, beside the stream, in turn with it."""
    torch.set_num_threads(1)
    out, inner = 4096, 11008
    data = torch.ones(1 << 26)
    print("   dtype  sparsity       ms   GB/s of bytes read   / stream (torch's sum, in turn)")
    for name in ("float32", "bfloat16", "int8"):
        dtype = getattr(torch, name)
        layers = [rows(torch.randn(out, inner), dtype=dtype) for _ in range(3)]
        # Inputs of their own, so that hardly a row is still in a cache when it is read again.
        xs = [torch.rand(1, inner) for _ in range(29)]
        for sparsity in (0.0, 0.5, 0.75, 0.9):
            cut = torch.tensor([sparsity]) if sparsity else None
            made = [native.linear_of(layer, cut) for layer in layers]
            y, wide = run_linear(made[0], xs[0], out)[0].double(), xs[0].double()[0]
            kept = wide.masked_fill(wide.float() <= sparsity, 0) if sparsity else wide
            plain = layers[0].dense(torch.float64) @ kept
            assert float((y - plain).norm() / plain.norm()) < 1e-5
            times, rates = [], []
            for turn in range(4 * given.rounds):
                x = xs[turn % len(xs)]
                begin = time.perf_counter()
                run_linear(made[turn % len(made)], x, out)
                taken = time.perf_counter() - begin
                begin = time.perf_counter()
                data.sum()
                stream = data.nbytes / (time.perf_counter() - begin)
                read = int((x > sparsity).sum()) if sparsity else inner
                moved = read * out * layers[0].weight.element_size()
                times.append(taken)
                rates.append((moved / taken, moved / taken / stream))
            speed, share = (statistics.median(column) for column in zip(*rates, strict=True))
            print(
                f"{name:>9}{sparsity:>9}{1e3 * statistics.median(times):>10.3f}"
                f"{speed / 1e9:>12.1f}{share:>18.0%}   (at least 80%: "
                f"{'holds' if share >= 0.8 else 'MISSED'})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shape", choices=list(SHAPES), default="head-7%")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    given = parser.parse_args()
    for threads in given.threads:
        found = streams(threads)
        print(
            f"torch {torch.__version__}, kernel {instruction_set()}, {threads} threads, load "
            f"{os.getloadavg()[0]:.1f}; stream GB/s: "
            + ", ".join(f"{name} {rate:.1f}" for name, rate in found.items())
        )
        if given.kernels:
            products(given, found)
            break
        decode(given, threads)


if __name__ == "__main__":
    main()
