"""What pruning and comparing cost beyond the forward passes they need.

python benchmarks/pruning.py [MODEL] [--threads N]

- Wanda's time over the forward passes it needs (each block measured once and, but for the last,
  run again), paired in turn; figure to reach: at most 1.3.
- Share of a comparison's wall time inside forward passes; figure to reach: at least 0.85.
- Peak memory of pruning over the model itself, for models of 4, 8 and 16 layers: it must not
  grow with the layers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gossamer.evaluate.environment import environment
from gossamer.methods.weights.wanda import Wanda
from gossamer.models import Tokens, find_sites, load_model, read_documents
from gossamer.recipes.bench import Bench, Setup
from gossamer.recipes.cells import grid


class Watch:
    """Seconds spent inside the outermost forward call of some modules."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._begin = 0.0, 0, 0.0

    def _enter(self, *_: object) -> None:
        if self._depth == 0:
            self._begin = time.perf_counter()
        self._depth += 1

    def _leave(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._begin

    @contextmanager
    def on(self, modules: list[torch.nn.Module]) -> Iterator["Watch"]:
        handles = []
        for module in modules:
            # First in, last out: hooks of the method count as overhead inside the pass.
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def needed_passes(model: torch.nn.Module, tokens: Tokens, batch_size: int) -> float:
    """Seconds of the plain forward passes Wanda needs: blocks twice, the last once."""
    base = model.get_submodule(find_sites(model).base)
    blocks = len(find_sites(model).blocks)
    begin = time.perf_counter()
    for batch in tokens.batches(batch_size):
        base(**batch, use_cache=False)
    one = time.perf_counter() - begin
    return one * (2 * blocks - 1) / blocks


def wanda_cost(model: torch.nn.Module, tokens: Tokens, repeats: int) -> dict[str, float]:
    ratios, times = [], []
    for _ in range(repeats):
        needed = needed_passes(model, tokens, 8)
        begin = time.perf_counter()
        Wanda(sparsity=0.5).apply(model, tokens).restore()
        times.append(time.perf_counter() - begin)
        ratios.append(times[-1] / needed)
    return {
        "seconds": statistics.median(times),
        "over_needed_passes": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def compare_share(source: str, data: str | None) -> dict[str, float]:
    setup = Setup(model=source, data=data, samples=32, length=1024, windows=16, timed=False)
    cells = grid(
        ["random", "magnitude", "lamp", "wanda", "teal", "streaming_llm:sparsity=0.5"], [0.5]
    )
    begin = time.perf_counter()
    loaded = load_model(source)
    blocks = [loaded.model.get_submodule(p) for p in find_sites(loaded.model).blocks]
    parts: dict[str, float] = {}
    with Watch().on([loaded.model, *blocks]) as watch:
        bench = Bench(setup, loaded.model, loaded.tokenizer)
        for cell in cells:
            before, start = watch.seconds, time.perf_counter()
            bench.run(cell)
            wall = time.perf_counter() - start
            parts[f"share {cell.label}"] = (watch.seconds - before) / wall
        bench.close()
    total = time.perf_counter() - begin
    return {"seconds": total, "share_in_forward": watch.seconds / total, **parts}


_MEMORY = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from gossamer.methods.weights.wanda import Wanda
from gossamer.models import Tokens
torch.set_num_threads(1)
layers = int(sys.argv[1])
config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1408,
    num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8)
model = LlamaForCausalLM(config).eval()
tokens = Tokens.from_ids(torch.randint(0, 512, (64, 512)))
with torch.no_grad():
    model.model(tokens.input_ids[:8], use_cache=False)
def memory(name):
    # Of this process alone: ru_maxrss would carry over what its parent once held.
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith(name)).split()[1]) / 1024
before = memory("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
Wanda(sparsity=0.5).apply(model, tokens, undo=False)
size = sum(p.nbytes for p in model.parameters()) / 2**20
peak = memory("VmHWM:")
masks = size / 4 / 8
print(json.dumps({"layers": layers, "model_MiB": size, "masks_MiB": masks,
    "peak_MiB": peak, "beyond_before_MiB": peak - before - masks}))
"""


def memory() -> list[dict[str, float]]:
    rows = []
    # Freed memory goes back to the system at once, so that the peak is what was in use.
    tuned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    for layers in (4, 8, 16):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(layers)],
            capture_output=True,
            text=True,
            check=True,
            env=tuned,
        )
        rows.append(json.loads(done.stdout))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--data", help="text; without it the packaged text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only", choices=("wanda", "compare", "memory"), action="append", help="of the three"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = options.only or ("wanda", "compare", "memory")
    result: dict[str, object] = {"model": options.model, **environment()}
    if "wanda" in wanted:
        loaded = load_model(options.model)
        documents = read_documents(options.data, "calibration")
        tokens = Tokens.from_documents(documents, loaded.tokenizer, length=1024, samples=64)
        result["calibration"] = f"{len(tokens)} x {tokens.length} tokens"
        result["wanda"] = wanda_cost(loaded.model, tokens, options.repeats)
    if "compare" in wanted:
        result["compare"] = compare_share(options.model, options.data)
    if "memory" in wanted:
        result["memory"] = memory()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
