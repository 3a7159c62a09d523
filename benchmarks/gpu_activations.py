"""Activation sparsity on a GPU: products that skip channels, and a whole model that decodes.

    python benchmarks/gpu_activations.py [--parts kernels model] [--sparsities 0 0.5 0.9]
        [--plans 1024:66:8:4:3 ...] [--ways own list mask] [--layers 32] [--rounds 9]

Three figures are promised on an H200, bfloat16, batch 1: at 8192 x 28672 at least 75 % of the
measured read bandwidth on the bytes read at 50 % and at least 60 % at 90 %; a random model of
Llama-3-8B's shape at 50 % decodes at least 1.5 times as fast as its CUDA-graphed dense.

Ways: programs that find the active channels of their run themselves (``own``), a list made before
(``list``), no list but masked loads (``mask``). Everything runs in CUDA graphs on both sides.
Matrices are rotated over copies, each with an input of its own, that exceed the second cache
several times. The dense model is the faster of transformers (static cache) and of a lean loop on
cuBLAS with fused qkv, gate and up, and residual sums; the sparse one shares the lean loop's
attention. Thresholds are quantiles of the inputs seen; the share of channels really read is
counted. Results are checked before anything is timed: products against float64, blocks against
float32 arithmetic on masked inputs.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn.functional import linear, rms_norm
from triton.language.extra.cuda import (  # pyright: ignore[reportMissingImports]
    gdc_launch_dependents,
    gdc_wait,
)

from gossamer.kernels.gather_gemv.triton_gemv import (
    Plan,
    axpy_partial,
    early,
    finish,
    launch_options,
    plan_for,
    swiglu,
)

DEVICE = "cuda"
PROMISES = {0.5: 0.75, 0.9: 0.60}


def graph(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work of a call, captured after a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured


def seconds(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Of one replay, in every round; the graphs take turns."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, captured in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            captured.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                found[name].append(begin.elapsed_time(end) / 1e3)
    return found


@triton.jit
def _read_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK * STEPS + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in tl.static_range(STEPS):
        total += tl.load(x_ptr + at + step * BLOCK)
    tl.store(y_ptr + tl.program_id(0), tl.sum(total, 0))


def read_rate(rounds: int) -> float:
    """Bytes per second read: the best of a plain kernel over 4 GiB, and of torch's sum."""
    data = torch.ones(1 << 30, device=DEVICE, dtype=torch.int32)
    block, steps = 2048, 8
    out = torch.empty(data.numel() // (block * steps), device=DEVICE, dtype=torch.int32)
    kernel: Any = _read_kernel

    def plain() -> None:
        kernel[(len(out),)](data, out, data.numel(), BLOCK=block, STEPS=steps, num_warps=4)

    floats = data.view(torch.float32)
    plain()
    assert int(out[0]) == block * steps
    found = seconds({"kernel": graph(plain), "sum": graph(floats.sum)}, rounds)
    rates = {name: data.nbytes / min(times) for name, times in found.items()}
    print("read bandwidth: " + ", ".join(f"{n} {r / 1e12:.2f} TB/s" for n, r in rates.items()))
    return max(rates.values())


@triton.jit
def _masked_kernel(
    x_ptr, cut_ptr, w_ptr, part_ptr, INNER, OUTER, RUN: tl.constexpr, OUTPUTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Without a list: every channel is looked at, and loads of inactive ones are masked out."""
    tile, run = tl.program_id(0), tl.program_id(1)
    o = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    cut = tl.load(cut_ptr)
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for first in range(0, RUN, TOGETHER):
        c = run * RUN + first + tl.arange(0, TOGETHER)
        x = tl.load(x_ptr + c, mask=c < INNER, other=0.0).to(tl.float32)
        keep = ~(tl.abs(x) <= cut) & (c < INNER)
        w = tl.load(
            w_ptr + c.to(tl.int64)[:, None] * OUTER + o[None, :],
            mask=keep[:, None] & (o < OUTER)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(w * x[:, None], 0)
    tl.store(part_ptr + run * OUTER + o, total, mask=o < OUTER)


def masked(x: Tensor, weight: Tensor, cut: Tensor, plan: Plan) -> Tensor:
    inner, out = weight.shape
    length = triton.next_power_of_2(triton.cdiv(inner, plan.runs))
    runs = triton.cdiv(inner, length)
    part = torch.empty(runs, 1, out, device=DEVICE)
    kernel: Any = _masked_kernel
    kernel[(triton.cdiv(out, plan.outputs), runs)](
        *(x, cut, weight, part, inner, out),
        RUN=length,
        OUTPUTS=plan.outputs,
        TOGETHER=plan.together,
        num_warps=plan.warps,
    )
    return part


# ruff: noqa: B023 - closures are called before their loop goes on
def kernels(shapes: list[tuple[int, int]], sparsities: list[float], plans: list[Plan],
            rate: float, rounds: int, kinds: list[str]) -> None:  # fmt: skip
    """Products of one input, by shape, sparsity and plan."""
    print("shape O x I     sparsity  way                      us     TB/s of bytes    dense / this")
    for out, inner in shapes:
        count = 6
        weights = [torch.randn(inner, out, device=DEVICE).bfloat16() for _ in range(count)]
        plain = [weight.T.contiguous() for weight in weights]
        for sparsity in sparsities:
            xs = [torch.rand(1, inner, device=DEVICE).bfloat16() for _ in range(count)]
            cut = torch.tensor([sparsity], device=DEVICE)
            if sparsity == 0:
                cut -= 1
            lists = [(~(x.float()[0] <= cut)).nonzero()[:, 0].int() for x in xs]
            read = statistics.mean(len(found) for found in lists) * out * 2
            ways: dict[str, Callable[[], object]] = {
                "dense cuBLAS": lambda: [linear(x, w) for x, w in zip(xs, plain, strict=True)]
            }
            for plan in plans or [plan_for(inner, out)]:
                name = ":".join(map(str, plan))

                def own(plan: Plan = plan) -> list[Tensor]:
                    return [
                        finish(axpy_partial(x, w, cut, plan=plan), torch.bfloat16)
                        for x, w in zip(xs, weights, strict=True)
                    ]

                def listed(plan: Plan = plan) -> list[Tensor]:
                    return [
                        finish(axpy_partial(x, w, index=i, plan=plan), torch.bfloat16)
                        for x, w, i in zip(xs, weights, lists, strict=True)
                    ]

                def without(plan: Plan = plan) -> list[Tensor]:
                    return [
                        finish(masked(x, w, cut, plan), torch.bfloat16)
                        for x, w in zip(xs, weights, strict=True)
                    ]

                here = {"own": own, "list": listed, "mask": without}
                ways |= {f"{kind} {name}": here[kind] for kind in kinds}
                kept = xs[0].double().masked_fill(xs[0].float() <= cut, 0)
                wide = kept @ weights[0].double()
                for way in (here[kind] for kind in kinds):
                    off = float((way()[0].double() - wide).norm() / wide.norm())
                    assert off < 5e-3, (name, sparsity, off)
                    assert torch.equal(way()[0], way()[0])
            times = seconds({name: graph(run) for name, run in ways.items()}, rounds)
            middle = {name: statistics.median(found) / count for name, found in times.items()}
            for name, each in middle.items():
                moved = 2 * out * inner if name == "dense cuBLAS" else read
                print(
                    f"{out:>6} x {inner:<7} {sparsity:>5}   {name:<22}{1e6 * each:>8.1f}   "
                    f"{moved / each / 1e12:>6.2f} ({moved / each / rate:>4.0%})"
                    f"{middle['dense cuBLAS'] / each:>12.2f}"
                )
            if sparsity in PROMISES:
                best = min((n for n in middle if n.startswith("own")), key=lambda n: middle[n])
                share = read / middle[best] / rate
                verdict = "holds" if share >= PROMISES[sparsity] else "MISSED"
                print(
                    f"  -> {share:.0%} with {best} (at least {PROMISES[sparsity]:.0%}: {verdict})"
                )


# -- a whole model --------------------------------------------------------------------------------


@triton.jit
def _attend_kernel(
    qkv_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, at_ptr, y_ptr, scaling, ROOM,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Rotary, append and attention of one query; a program is a head."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    group: tl.constexpr = HEADS // KV
    kv = head // group
    past = tl.load(at_ptr)
    d = tl.arange(0, D)
    other = (d + D // 2) % D
    sign = tl.where(d < D // 2, -1.0, 1.0)
    cos = tl.load(cos_ptr + past * D + d)
    sin = tl.load(sin_ptr + past * D + d)
    q_at = qkv_ptr + head * D
    q = tl.load(q_at + d).to(tl.float32) * cos
    q += tl.load(q_at + other).to(tl.float32) * sign * sin
    k_at = qkv_ptr + (HEADS + kv) * D
    k = tl.load(k_at + d).to(tl.float32) * cos
    k += tl.load(k_at + other).to(tl.float32) * sign * sin
    v = tl.load(qkv_ptr + (HEADS + KV + kv) * D + d)
    if head % group == 0:
        tl.store(keys_ptr + (kv * ROOM + past) * D + d, k.to(keys_ptr.dtype.element_ty))
        tl.store(values_ptr + (kv * ROOM + past) * D + d, v)
    most = tl.sum(q * k, 0) * scaling
    total = 1.0
    mixed = v.to(tl.float32)
    for first in range(0, past, BLOCK):
        t = first + tl.arange(0, BLOCK)
        live = t < past
        at = (kv * ROOM + t[:, None]) * D + d[None, :]
        key = tl.load(keys_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
        score = tl.where(live, tl.sum(key * q[None, :], 1) * scaling, -float("inf"))
        new = tl.maximum(most, tl.max(score, 0))
        weight = tl.exp(score - new)
        shrink = tl.exp(most - new)
        value = tl.load(values_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
        mixed = mixed * shrink + tl.sum(value * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        most = new
    tl.store(y_ptr + head * D + d, (mixed / total).to(y_ptr.dtype.element_ty))


@triton.jit
def _gate_kernel(gu_ptr, y_ptr, F, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gu_ptr + at, mask=at < F, other=0.0).to(tl.float32)
    up = tl.load(gu_ptr + F + at, mask=at < F, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=at < F)


@dataclass
class Layer:
    """Fused weights of a block, output-major and channel-major, and four thresholds."""

    qkv: Tensor
    o: Tensor
    gu: Tensor
    down: Tensor
    norms: tuple[Tensor, Tensor]
    turned: dict[str, Tensor]
    cuts: dict[str, Tensor]
    keys: Tensor
    values: Tensor


class Lean:
    """One token after another through a Llama, on few launches; dense or skipping channels."""

    def __init__(self, model: Any, room: int, past: int) -> None:
        config = model.config
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        self.epsilon, self.room = config.rms_norm_eps, room
        self.embed, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.norm = model.model.norm.weight
        places = torch.arange(room, device=DEVICE)[None]
        cos, sin = model.model.rotary_emb(self.embed[:1].float(), places)
        self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()
        self.at = torch.tensor([past], device=DEVICE, dtype=torch.int32)
        self.token = torch.tensor([5], device=DEVICE)
        self.seen: Tensor | None = torch.zeros(1, device=DEVICE, dtype=torch.int32)
        self.layers = [self._layer(block) for block in model.model.layers]
        self.inputs: list[Tensor] | None = None
        self.plans: dict[str, Plan] = {}

    def _layer(self, block: Any) -> Layer:
        a, m = block.self_attn, block.mlp
        qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).detach()
        gu = torch.cat([m.gate_proj.weight, m.up_proj.weight]).detach()
        parts = {"qkv": qkv, "o": a.o_proj.weight.detach(), "gu": gu,
                 "down": m.down_proj.weight.detach()}  # fmt: skip
        norms = (block.input_layernorm.weight, block.post_attention_layernorm.weight)
        cache = torch.randn(2, self.kv, self.room, self.dim, device=DEVICE).bfloat16()
        return Layer(
            *parts.values(),
            norms,
            {name: weight.T.contiguous() for name, weight in parts.items()},
            {name: torch.zeros(1, device=DEVICE) for name in parts},
            *cache,
        )

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        y = torch.empty(1, self.heads * self.dim, device=DEVICE, dtype=torch.bfloat16)
        kernel: Any = _attend_kernel
        kernel[(self.heads,)](
            *(qkv, layer.keys, layer.values, self.cos, self.sin, self.at, y),
            *(self.dim**-0.5, self.room),
            HEADS=self.heads,
            KV=self.kv,
            D=self.dim,
            BLOCK=64,
            EARLY=early(y.device),
            num_warps=4,
            **launch_options(y.device),
        )
        return y

    def dense_block(self, h: Tensor, layer: Layer, masked: bool = False) -> Tensor:
        """A block; ``masked`` zeroes inputs at the thresholds, in float32, to check with."""

        def times(x: Tensor, name: str, residual: Tensor | None = None) -> Tensor:
            weight = getattr(layer, name)
            if self.inputs is not None:
                self.inputs.append(x.detach().clone())
            if masked:
                x = x.float()
                x = x.masked_fill(x.abs() <= layer.cuts[name], 0)
                y = x @ weight.float().T
                return (y if residual is None else y + residual.float()).bfloat16()
            return linear(x, weight) if residual is None else torch.addmm(residual, x, weight.T)

        x = rms_norm(h, h.shape[1:], layer.norms[0], self.epsilon)
        h = times(self.attend(layer, times(x, "qkv")), "o", h)
        x = rms_norm(h, h.shape[1:], layer.norms[1], self.epsilon)
        gu = times(x, "gu")
        y = torch.empty(1, gu.shape[1] // 2, device=DEVICE, dtype=torch.bfloat16)
        kernel: Any = _gate_kernel
        kernel[(triton.cdiv(y.shape[1], 1024),)](gu, y, y.shape[1], BLOCK=1024)
        return times(y, "down", h)

    def sparse_block(self, h: Tensor, layer: Layer) -> Tensor:
        def times(x: Tensor, name: str, norm: Tensor | None = None) -> Tensor:
            return axpy_partial(
                *(x, layer.turned[name], layer.cuts[name]),
                norm=norm,
                epsilon=self.epsilon,
                plan=self.plans.get(name),
                seen=self.seen,
            )

        half = torch.bfloat16
        y = self.attend(layer, finish(times(h, "qkv", layer.norms[0]), half))
        h = finish(times(y, "o"), half, residual=h)
        y = swiglu(times(h, "gu", layer.norms[1]), half)
        return finish(times(y, "down"), half, residual=h)

    def _whole(self, block: Callable[[Tensor, Layer], Tensor]) -> Tensor:
        h = self.embed[self.token]
        for layer in self.layers:
            h = block(h, layer)
        return linear(rms_norm(h, h.shape[1:], self.norm, self.epsilon), self.head)

    def dense(self) -> Tensor:
        """Logits of a step on cuBLAS."""
        return self._whole(self.dense_block)

    def sparse(self) -> Tensor:
        """Logits of a step that skips channels."""
        return self._whole(self.sparse_block)

    def distance(self) -> list[float]:
        """Relative distance of what each block adds, sparse from masked, from the same input.

        Block by block, because a channel that falls to the other side of its threshold by
        rounding changes all that follows.
        """
        h, off = self.embed[self.token], []
        for layer in self.layers:
            found = self.sparse_block(h, layer).float()
            plain = self.dense_block(h, layer, masked=True)
            off.append(float((found - plain.float()).norm() / (plain.float() - h.float()).norm()))
            h = plain
        return off

    def stepping(self, run: Callable[[], Tensor]) -> Callable[[], None]:
        """A step that feeds its own token to the next."""

        def step() -> None:
            self.token.copy_(run().argmax(-1))
            self.at.add_(1)

        return step

    def calibrate(self, sparsity: float, steps: int) -> None:
        """Thresholds: quantiles of |input| over a few decoded tokens."""
        names, seen = list(self.layers[0].cuts), []
        for _ in range(steps):
            self.inputs = []
            self.stepping(self.dense)()
            seen.append(self.inputs)
        self.inputs = None
        self.at.sub_(steps)
        for i, layer in enumerate(self.layers):
            for j, name in enumerate(names):
                size = torch.cat([inputs[4 * i + j] for inputs in seen]).abs().float().flatten()
                rank = max(1, round(sparsity * len(size)))
                layer.cuts[name].copy_(size.kthvalue(rank).values)


def transformers_step(model: Any, room: int, past: int) -> Callable[[], None] | None:
    """A greedy step of transformers with its static cache; None where it cannot be captured."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=room)
    ids = torch.randint(100, 1000, (1, past), device=DEVICE)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.tensor([[5]], device=DEVICE)
    at = torch.tensor([[past]], device=DEVICE)

    def step() -> None:
        output = model(
            input_ids=token, position_ids=at, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        token.copy_(output.logits[:, -1:].argmax(-1))
        at.add_(1)

    return step


@torch.no_grad()
def whole(sparsities: list[float], layers: int, rounds: int, plans: dict[str, Plan]) -> None:
    """Decoding of a random Llama-3-8B, milliseconds a token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rms_norm_eps=1e-5, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    past, room = 128, 1024
    lean = Lean(model, room, past)
    lean.plans = plans
    blocks = sum(getattr(lay, n).numel() for lay in lean.layers for n in lean.layers[0].cuts)
    head = lean.head.numel()
    size = f"{(blocks + 2 * head) / 1e9:.2f} B weights, head {head / (blocks + head):.1%} of reads"
    print(f"{layers} layers, {size}, {past} tokens before")
    graphs = {"dense lean, cuBLAS": graph(lean.stepping(lean.dense))}
    try:
        step = transformers_step(model, room, past)
        assert step is not None
        graphs["dense transformers"] = graph(step)
    except Exception as error:
        print(f"transformers was not captured: {str(error).splitlines()[0][:160]}")
        torch.cuda.synchronize()
    for sparsity in sparsities:
        lean.at.fill_(past)
        lean.calibrate(sparsity, 8)
        lean.token.fill_(5)
        off, same = lean.distance(), torch.equal(lean.sparse(), lean.sparse())
        print(
            f"sparsity {sparsity}: blocks {statistics.median(off):.1e} (at most {max(off):.1e}) "
            f"from masked; the same again: {same}"
        )
        assert statistics.median(off) < 3e-2, off
        assert max(off) < 0.2, off
        assert lean.seen is not None
        lean.seen.zero_()
        begin = lean.at.item()
        for _ in range(4):
            lean.stepping(lean.sparse)()
        channels = sum(lay.turned[n].shape[0] for lay in lean.layers for n in lay.cuts)
        share = lean.seen.item() / 4 / channels
        lean.at.fill_(begin)
        counter, lean.seen = lean.seen, None
        name = f"sparse {sparsity}"
        times = seconds({**graphs, name: graph(lean.stepping(lean.sparse))}, rounds)
        lean.seen = counter
        middle = {key: 1e3 * statistics.median(value) for key, value in times.items()}
        best = min(value for key, value in middle.items() if key.startswith("dense"))
        for key, value in middle.items():
            print(f"  {key:<22}{value:>7.3f} ms  {1e3 / value:>6.1f} tokens/s  "
                  f"best dense / this {best / value:.2f}")  # fmt: skip
        ceiling = (blocks + head) / (blocks * share + head)
        print(f"  channels read {share:.1%}, ceiling by bytes {ceiling:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["kernels", "model"])
    parser.add_argument("--shapes", nargs="+", default=["8192x28672", "28672x8192"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    parser.add_argument("--plans", nargs="*", default=[])
    parser.add_argument("--model-plans", nargs="*", default=[], help="qkv=1024:33:8:4:3 ...")
    parser.add_argument("--ways", nargs="+", default=["own", "list", "mask"])
    parser.add_argument("--model-sparsities", type=float, nargs="+", default=[0.5])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.manual_seed(0)
    rate = read_rate(given.rounds)
    if "kernels" in given.parts:
        shapes = [(int(a), int(b)) for a, b in (s.split("x") for s in given.shapes)]
        plans = [Plan(*map(int, plan.split(":"))) for plan in given.plans]
        kernels(shapes, given.sparsities, plans, rate, given.rounds, given.ways)
        torch.cuda.empty_cache()
    if "model" in given.parts:
        chosen = dict(text.split("=") for text in given.model_plans)
        plans_of = {name: Plan(*map(int, text.split(":"))) for name, text in chosen.items()}
        whole(given.model_sparsities, given.layers, given.rounds, plans_of)


if __name__ == "__main__":
    main()
