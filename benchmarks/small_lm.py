"""What benchmarks of sparse training from scratch share: a small language model of bytes, and a
queue of trainings over processes and GPUs that can be stopped and taken up again.

A ``Job`` is plain values and a method in text form (``rigl:sparsity=0.9``); its result is one JSON
file, and a file that exists is not computed again. Training: AdamW (0.9, 0.95; decay 0.1), clipped
at 1, the rate rising over 4 % of the updates and then falling linearly to 0, whatever the method.
Parameters are counted without embeddings and positions. Matrix products run in TF32 on a GPU.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import gossamer
from gossamer.claims.training import letters
from gossamer.methods.training.base import SparseTraining, Sparsifier
from gossamer.methods.training.scaling.parameters import count_parameters

__all__ = ["SIZES", "Job", "arguments", "fixed_share", "read", "run_all", "steps_within", "train"]

VOCABULARY = 256
SIZES = {
    "test": (1, 32),
    "letters": (1, 96),
    "0.4M": (2, 128),
    "0.9M": (2, 192),
    "1.8M": (4, 192),
    "3.1M": (4, 256),
    "4.7M": (6, 256),
    "7.4M": (6, 320),
}
"""Name to (layers, width); heads are 32 wide. ``letters`` is the perceptron of the claims."""


class Block(nn.Module):
    """Causal attention and a perceptron, both behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to the same."""
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, 32).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class SmallLM(nn.Module):
    """Bytes to logits of the next byte; embedding and head are one matrix."""

    def __init__(self, layers: int, width: int, length: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.position = nn.Embedding(length, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
            self.norm = nn.LayerNorm(width, bias=False)
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            self.head.weight = self.embedding.weight
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    # Residual branches start smaller the more of them add up.
                    deep = (
                        (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1
                    )
                    nn.init.normal_(parameter, std=0.02 * deep)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) to (B, T, 256)."""
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, windows: Tensor, reduction: str = "mean") -> Tensor:
        """Of (B, T + 1) bytes, in nats per byte."""
        logits = self(windows[:, :-1])
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training.

    Parameters
    ----------
    name : of its file. size : of :data:`SIZES`. method : in text form, or ``dense``.
    steps : updates. options : what the training does beside the method, see :func:`train`.
    """

    name: str
    size: str
    method: str
    steps: int
    seed: int = 0
    lr: float = 2e-3
    batch: int = 32
    length: int = 256
    options: Mapping[str, Any] | None = None


def bytes_of(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Training bytes and the last 3 % to measure on."""
    opened: Any = gzip.open if path.endswith(".gz") else open
    with opened(path, "rb") as file:
        text = np.frombuffer(file.read(), dtype=np.uint8)
    cut = int(0.97 * len(text))
    return text[:cut], text[cut:]


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of an update, counted from 0."""
    warm = max(1.0, 0.04 * steps)
    return peak * min((step + 1) / warm, (steps - step) / max(1.0, steps - warm), 1.0)


def method_of(job: Job) -> SparseTraining | None:
    """The job's method, for its number of updates."""
    if job.method == "dense":
        return None
    return gossamer.method(job.method, steps=job.steps, seed=job.seed)


def fixed_share(size: str) -> tuple[int, float]:
    """Weights of the blocks' matrices, and the head's share of a dense update's operations."""
    layers, width = SIZES[size]
    inside, head = 12 * layers * width**2, VOCABULARY * width
    if size == "letters":
        inside, head = 2 * 96 * width, 128 * width
    return inside, head / (inside + head)


def steps_within(method: SparseTraining, budget: float, fixed: float) -> int:
    """How many updates of a method cost as much as so many dense ones.

    Parameters
    ----------
    fixed : share of a dense update's operations that is never removed.
    """

    def cost(steps: int) -> float:
        one = method.lasting(steps)
        sparsity, spent = one.initial_sparsity, 0.0
        for update in range(1, steps + 1):
            change = one.change(update)
            forward = fixed + (1.0 - fixed) * (1.0 - sparsity)
            dense = change is not None and change.dense_gradient
            spent += (2.0 * forward + (1.0 if dense else forward)) / 3.0
            if change is not None and change.sparsity is not None:
                sparsity = change.sparsity
        return spent

    low, high = 1, int(budget / max(fixed, 1e-3)) + 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def train(
    job: Job,
    texts: tuple[np.ndarray, np.ndarray],
    device: str,
    windows: int,
    until: float,
) -> dict[str, Any] | None:
    """Run a job; None where time ran out.

    ``options``: ``moments``: weights that grow start with their layer's mean second moment instead
    of none.
    """
    if job.size == "letters":
        return train_letters(job)
    began = time.time()
    options = job.options or {}
    layers, width = SIZES[job.size]
    model = SmallLM(layers, width, job.length, job.seed).to(device)
    gpu = device.startswith("cuda")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=(0.9, 0.95), fused=gpu)
    method = method_of(job)
    sparsifier = None if method is None else method.attach(model, optimizer)
    inside, _ = fixed_share(job.size)
    if sparsifier is not None:
        assert sum(layer.size for layer in sparsifier.layers) == inside
    text = torch.from_numpy(texts[0].copy()).to(device)
    generator = torch.Generator().manual_seed(1000 + job.seed)
    starts = torch.randint(len(text) - job.length - 1, (job.steps, job.batch), generator=generator)
    starts = starts.to(device)
    within = torch.arange(job.length + 1, device=device)
    kept_sum = 0
    everything = list(model.parameters())
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, job.steps, job.lr)
        kept_sum += inside if sparsifier is None else sum(sparsifier.kept().values())
        model.loss(text[starts[step, :, None] + within].long()).backward()
        nn.utils.clip_grad_norm_(everything, 1.0, foreach=True)
        optimizer.step()
        if sparsifier is not None:
            before = masks_of(sparsifier) if options.get("moments") else None
            if sparsifier.step() and before is not None:
                fill_moments(sparsifier, before)
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 and time.time() > until:
            return None
    others = sum(p.numel() for p in everything if p.dim() <= 1)
    sparsity = 0.0 if sparsifier is None else sparsifier.sparsity
    # An update costs six operations a weight and token.
    dense = 6.0 * (inside + VOCABULARY * width)
    spent = dense * job.steps if sparsifier is None else sparsifier.flops.total
    if sparsifier is not None:
        work = sparsifier.finish()
        assert abs(work.report().sparsity - sparsity) < 1e-9
    return {
        **asdict(job),
        "loss": evaluate(model, texts[1], job.length, windows, device),
        "parameters": inside + others,
        "final": inside * (1.0 - sparsity) + others,
        "average": kept_sum / job.steps + others,
        "sparsity": sparsity,
        "tokens": job.steps * job.batch * job.length,
        "dense_updates": spent / dense,
        "seconds": time.time() - began,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
    }


def train_letters(job: Job) -> dict[str, Any]:
    """Run a job on the perceptron over eight letters of the packaged text, head dense."""
    began = time.time()
    net = letters.perceptron(SIZES["letters"][1], job.seed)
    count = count_parameters(net, skip=letters.HEAD)
    method = method_of(job)
    if method is not None:
        method = replace(method, skip=letters.HEAD)
    spent, sparsity = float(job.steps), 0.0

    def watch(sparsifier: Sparsifier) -> None:
        nonlocal spent, sparsity
        sparsity = sparsifier.sparsity
        spent = sparsifier.flops.share * job.steps

    loss = letters.loss_after(net, method, job.steps, job.seed, lr=job.lr, watch=watch)
    _, fixed = fixed_share("letters")
    average = (spent / job.steps - fixed) / (1 - fixed)
    return {
        **asdict(job),
        "loss": loss,
        "parameters": count.total,
        "final": count.removable * (1.0 - sparsity) + count.others,
        # Gradients of all weights, where a method takes them, count here as weights at work.
        "average": count.removable * average + count.others,
        "sparsity": sparsity,
        "tokens": job.steps * letters.BATCH,
        "dense_updates": spent,
        "seconds": time.time() - began,
        "device": "cpu",
        "torch": torch.__version__,
    }


def masks_of(sparsifier: Sparsifier) -> dict[str, Tensor]:
    """Copies of the masks where the coming update may change them."""
    if not sparsifier.needs_dense_gradient:
        return {}
    return {path: one.mask.clone() for path, one in sparsifier.held.items()}


@torch.no_grad()
def fill_moments(sparsifier: Sparsifier, before: Mapping[str, Tensor]) -> None:
    """Give grown weights the mean second moment of those that stayed."""
    state: Any = sparsifier.optimizer.state
    for path, mask in before.items():
        one = sparsifier.held[path]
        second = state[one.master]["exp_avg_sq"]
        second[one.mask & ~mask] = second[one.mask & mask].mean()


@torch.no_grad()
def evaluate(model: SmallLM, text: np.ndarray, length: int, windows: int, device: str) -> float:
    """Mean loss over windows of the held-out text, in nats per byte."""
    count = min(windows, (len(text) - 1) // length)
    rows = np.stack([text[i * length : i * length + length + 1] for i in range(count)])
    total = 0.0
    for part in torch.from_numpy(rows).split(128):
        total += float(model.loss(part.to(device).long(), "sum"))
    return total / (count * length)


def read(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def arguments(description: str, commands: Sequence[str]) -> argparse.ArgumentParser:
    """Options that all benchmarks of this kind have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("command", choices=commands, nargs="+")
    parser.add_argument("--texts", help="text file, or .gz of one, to train and measure on")
    parser.add_argument("--out", type=Path, default=Path("runs/small_lm"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--per-gpu", type=int, default=1, help="processes on each GPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the updates")
    parser.add_argument("--windows", type=int, default=2048, help="held-out windows")
    parser.add_argument("--long", action="store_true", help="a perceptron trained long; for CPUs")
    parser.add_argument("--tiny", action="store_true", help="one tiny size, to try the script")
    parser.add_argument("--plot", type=Path)
    return parser


def _worker(slot: int, jobs: Any, done: Any, given: argparse.Namespace, until: float) -> None:
    torch.set_num_threads(1)
    device = given.device
    if device == "cuda":
        torch.cuda.set_device(slot % given.gpus)
        device = f"cuda:{slot % given.gpus}"
        torch.set_float32_matmul_precision("high")
    texts = (np.zeros(0), np.zeros(0)) if given.long else bytes_of(given.texts)
    while time.time() < until:
        try:
            job: Job = jobs.get(timeout=2.0)
        except queue.Empty:
            break
        try:
            row = train(job, texts, device, given.windows, until)
        except Exception as error:  # one job's failure is no reason to lose the others
            done.put((job.name, f"{type(error).__name__}: {error}"))
            continue
        if row is None:
            done.put((job.name, "no time left"))
            break
        part = given.out / f".{job.name}.{os.getpid()}"
        part.write_text(json.dumps(row))
        os.replace(part, given.out / f"{job.name}.json")
        done.put((job.name, f"{row['loss']:.4f} in {row['seconds']:.0f} s"))
    done.put((None, slot))


def run_all(jobs: Sequence[Job], given: argparse.Namespace) -> None:
    """Run the jobs whose results are missing, the first ones first."""
    if given.texts is None and not given.long:
        sys.exit("--texts is missing: name a text file to train on")
    given.out.mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if not (given.out / f"{job.name}.json").exists()]
    until = time.time() + given.seconds
    slots = given.per_gpu * (given.gpus if given.device == "cuda" else 1)
    slots = max(1, min(slots, len(left)))
    print(f"{len(jobs)} trainings, {len(left)} to run, {slots} processes", flush=True)
    context = multiprocessing.get_context("spawn")
    waiting, done = context.Queue(), context.Queue()
    for job in left:
        waiting.put(job)
    workers = [
        context.Process(target=_worker, args=(slot, waiting, done, given, until), daemon=True)
        for slot in range(slots)
    ]
    for worker in workers:
        worker.start()
    began, running, finished = time.time(), slots, 0
    while running:
        try:
            name, text = done.get(timeout=5.0)
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        if name is None:
            running -= 1
            continue
        finished += 1
        print(f"{time.time() - began:6.0f} s  {finished}/{len(left)}  {name}: {text}", flush=True)
    waiting.cancel_join_thread()
    for worker in workers:
        worker.join(timeout=5.0)
