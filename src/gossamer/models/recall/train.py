"""Train recall, a small model that answers questions about very long contexts.

Sequences grow from 256 tokens to 131072 while the learning rate rises, stays level and falls: a
model learns to look up much faster where many questions share a short context. Run
``python -m gossamer.models.recall.train --help``.

    python -m gossamer.models.recall.train --out recall --time-limit 560
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.models.nano.corpus import write_atomic
from gossamer.models.nano.train import new_model, rate
from gossamer.models.recall import tokenizer
from gossamer.models.recall.batches import SHARES, Batch, Batches

SHAPE: dict[str, Any] = {
    "vocab_size": len(tokenizer.vocabulary()),
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "pad_token_id": tokenizer.vocabulary()[tokenizer.PADDING],
    "bos_token_id": tokenizer.vocabulary()[tokenizer.BEGIN],
    "eos_token_id": tokenizer.vocabulary()[tokenizer.END],
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
}
STAGES = (
    (128, 0.10),
    (256, 0.15),
    (1024, 0.20),
    (4096, 0.30),
    (8192, 0.12),
    (32768, 0.07),
    (131072, 0.06),
)
"""Tokens of a sequence and share of the run spent on them."""
BACKGROUND = 0.03
"""Weight of the tokens that answer nothing."""


def parse_stages(text: str) -> tuple[tuple[int, float], ...]:
    """``256:0.4,1024:0.6`` as lengths and shares of the run.

    >>> parse_stages("256:1,1024:3")
    ((256, 0.25), (1024, 0.75))
    """
    pairs = [part.split(":") for part in text.split(",")]
    total = sum(float(share) for _, share in pairs)
    return tuple((int(length), float(share) / total) for length, share in pairs)


def stage_at(stages: tuple[tuple[int, float], ...], progress: float) -> int:
    """Index of the stage at a progress from 0 to 1.

    >>> stage_at(((256, 0.5), (1024, 0.5)), 0.6)
    1
    """
    done = 0.0
    for index, (_, share) in enumerate(stages):
        done += share
        if progress < done:
            return index
    return len(stages) - 1


class Objective:
    """Loss of a batch: cross-entropy of the answers, each row alike, and a little of the rest."""

    def __init__(self, model: Any, half: bool, compiled: bool) -> None:
        self.model, self.half = model, half
        self._losses = torch.compile(_losses) if compiled else _losses

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and whether each token after the first is what the model expects (B, T-1)."""
        device = batch.ids.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            hidden = self.model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        targets, answers = batch.ids[:, 1:], batch.answers[:, 1:]
        loss, right = self._losses(hidden[:, :-1], self.model.lm_head.weight, targets)
        answer = answers.float()
        answer = answer / answer.sum(1, keepdim=True)
        rest = ((targets != SHAPE["pad_token_id"]) & ~answers).float()
        rest = BACKGROUND * rest / rest.sum(1, keepdim=True)
        return (loss * (answer + rest)).sum(1).mean(), right


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token, and whether it is the likeliest one."""
    logits = functional.linear(hidden, weight.to(hidden.dtype)).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view(targets.shape), logits.argmax(-1) == targets


@torch.no_grad()
def answered(objective: Objective, batches: Batches, length: int, rows: int) -> dict[str, float]:
    """Share of answer tokens the model expects, task by task, each after the true ones before."""
    found: dict[str, list[float]] = defaultdict(list)
    for name in SHARES:
        batch = batches.task(name, rows, length)
        _, right = objective(batch)
        asked = batch.answers[:, 1:]
        found[name].append(float((right & asked).sum() / asked.sum()))
    return {name: sum(v) / len(v) for name, v in found.items()}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, export in bf16, and return the record of the run."""
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    shape = {**SHAPE, **options.shape}
    model = new_model(shape, options.seed)
    if options.start:
        _start_from(model, options.start)
    torch.nn.Module.to(model, device).train()
    parameters = sum(one.numel() for one in model.parameters())
    batches = Batches(device, options.seed)
    compiled = cuda and not options.no_compile
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=True if options.mix else None)
    objective = Objective(model, cuda, compiled)
    matrices = [one for one in model.parameters() if one.ndim >= 2]
    vectors = [one for one in model.parameters() if one.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=(0.9, 0.98),
        fused=cuda,
    )
    stages = options.stages
    step, tokens, progress, curve = 0, 0, 0.0, []
    stage, passed = 0, not options.gate
    saved = shown = time.monotonic()
    print(f"{parameters:,} parameters on {device}, set-up {saved - began:.0f} s", flush=True)
    while progress < 1.0:
        if passed and stage < stage_at(stages, progress):
            stage, passed = stage + 1, not options.gate
        length = stages[batches.random.randint(0, stage) if options.mix else stage][0]
        # Short sequences learn from many small steps, long ones need whole rows.
        size = options.tokens // 2 if length <= 1024 else options.tokens
        rows = max(1, size // length)
        factor = min(rate(progress, 0.0, options.stable), (step + 1) / options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * factor
        loss, _ = objective(batches.draw(rows, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += rows * length
        if step % 10 == 0:
            loss.item()  # waits for the device, so that the clock below is honest
        clock = time.monotonic()
        by_steps = step / options.steps if options.steps else 0.0
        limit = options.time_limit - options.reserve if options.time_limit else math.inf
        progress = max(by_steps, (clock - began) / limit)
        if step % options.every == 0 or clock - shown > options.show or progress >= 1.0:
            model.eval()
            found = answered(objective, batches, length, max(1, min(32, rows)))
            model.train()
            shown = time.monotonic()
            passed = passed or found["one"] >= options.gate
            curve.append([step, tokens, length, round(float(loss.detach()), 4), found])
            text = " ".join(f"{name} {share:.3f}" for name, share in found.items())
            print(
                f"step {step} {progress:.3f} at {length}: loss {float(loss.detach()):.3f} {text} "
                f"{tokens / 1e6:.0f}M tokens, {shown - began:.0f} s",
                flush=True,
            )
        if clock - saved > options.save_every:
            export(model, shape, options.out)
            saved = time.monotonic()
    export(model, shape, options.out)
    record = {
        "parameters": parameters,
        "shape": shape,
        "command": "python -m gossamer.models.recall.train "
        + " ".join(a.rpartition("/")[2] for a in options.arguments),
        "seed": options.seed,
        "steps": step,
        "tokens_seen": tokens,
        "seconds": round(time.monotonic() - began, 1),
        "stages": [list(stage) for stage in stages],
        "schedule": {"peak_lr": options.lr, "warmup": options.warmup, "stable": options.stable},
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "torch": torch.__version__,
        "commit": os.environ.get("GOSSAMER_COMMIT"),
        "curve": curve,
    }
    write_atomic(options.out / "training.json", (json.dumps(record, indent=1) + "\n").encode())
    return record


def _start_from(model: Any, folder: Path) -> None:
    """Take up the weights of an earlier run."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{folder} holds another model: {missing or unexpected}")


def export(model: Any, shape: dict[str, Any], out: Path) -> None:
    """Write weights in bf16, config and tokenizer as ``from_pretrained`` wants them."""
    from safetensors.torch import save

    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "model.safetensors", save(state, metadata={"format": "pt"}))
    settings = {
        **model.config.to_diff_dict(),
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        **shape,
    }
    special = {name: shape[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in {"config.json": settings, "generation_config.json": special}.items():
        write_atomic(out / name, (json.dumps(content, indent=2) + "\n").encode())
    tokenizer.write(out, shape["max_position_embeddings"])


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="train",
        description=str(__doc__).split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--start", type=Path, help="model folder to go on from")
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--time-limit", type=float, help="stop within this many seconds")
    parser.add_argument("--reserve", type=float, default=10, help="seconds kept for the end")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of a long step")
    parser.add_argument(
        "--stages", type=parse_stages, default=STAGES, help="such as 256:0.5,1024:0.5"
    )
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="decoupled, on matrices")
    parser.add_argument("--warmup", type=int, default=300, help="steps spent rising")
    parser.add_argument("--stable", type=float, default=0.6, help="share until the rate falls")
    parser.add_argument(
        "--mix", action="store_true", help="draw each step's length from the stages reached so far"
    )
    parser.add_argument(
        "--gate", type=float, default=0.9, help="answers to know before sequences grow; 0 for none"
    )
    parser.add_argument("--every", type=int, default=500, help="steps between reports")
    parser.add_argument("--show", type=float, default=10, help="most seconds between reports")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="run uncompiled")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON of shape changes")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    if not options.steps and not options.time_limit:
        parser.error("give --steps or --time-limit")
    train(options)


if __name__ == "__main__":
    main()
