"""Train nano: next-token prediction on Python source, decayed to zero inside a time limit.

Three steps: ``prepare`` collects the corpus and the tokenizer into one file, ``train`` makes the
model folder, ``card`` writes its README from the record of the run. Run
``python -m gossamer.models.nano.train STEP --help``.

AdamW, not a matrix-whitening optimizer, on purpose: the model stands in for the usual
checkpoints, and the optimizer shapes the outliers that sparsity methods feed on.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np

if __package__:
    from gossamer.models.nano import card, corpus, tokenizer
    from gossamer.models.nano.measure import baselines, evaluate, samples
    from gossamer.models.nano.prepare import prepare
    from gossamer.models.nano.windows import Windows, cut
else:  # run as a plain file, where this folder is on the path and gossamer may not be
    import card  # pyright: ignore[reportMissingImports]
    import corpus  # pyright: ignore[reportMissingImports]
    import tokenizer  # pyright: ignore[reportMissingImports]
    from measure import baselines, evaluate, samples  # pyright: ignore[reportMissingImports]
    from prepare import prepare  # pyright: ignore[reportMissingImports]
    from windows import Windows, cut  # pyright: ignore[reportMissingImports]

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def rate(progress: float, warmup: float, stable: float) -> float:
    """Learning-rate factor: up linearly, then level, then linearly to zero at progress 1."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - stable)))


def new_model(shape: dict, seed: int, architecture: str = "llama"):
    """A freshly initialised decoder with fp32 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    # The two projections that write into the residual stream start smaller, so that its
    # variance does not grow with depth.
    scale = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight *= scale
    return model


def train(options: argparse.Namespace) -> dict:
    """Train, export in bf16, evaluate the exported model, and return the record of the run."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    tokens, val, meta, members = corpus.load(options.corpus)
    lengths = tokenizer.token_bytes(members["tokenizer.json"])
    shape = {**SHAPE, "vocab_size": meta["vocabulary"], **options.shape}
    model = new_model(shape, options.seed, options.architecture)
    torch.nn.Module.to(model, device).train()
    parameters = sum(one.numel() for one in model.parameters())
    windows = Windows(
        torch.from_numpy(tokens.astype(np.int32)).to(device),
        options.context,
        options.batch,
        options.seed,
    )
    # In-training validation draws on the whole held-out stream, evenly, in training-sized batches
    # so that the compiled code serves both.
    held = torch.from_numpy(val.astype(np.int32)).to(device)
    room = len(held) - 1 - options.context
    if room < 0:
        raise ValueError(f"{len(held)} held-out tokens do not fill a window of {options.context}")
    spread = torch.linspace(0, room, options.batch, device=device).long()

    def loss_of(hidden, weight, targets):
        logits = functional.linear(hidden, weight).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    if cuda and not options.no_compile:
        torch._dynamo.config.recompile_limit = 64
        # Layer by layer: compiled whole, the model would materialise its causal mask and lose
        # the fast attention kernel.
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(loss_of)

    def forward(inputs, targets):
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            return loss_of(hidden, model.lm_head.weight, targets)

    def validate() -> float:
        with torch.no_grad():
            return float(forward(*cut(held, spread, options.context)))

    matrices = [one for one in model.parameters() if one.ndim >= 2]
    vectors = [one for one in model.parameters() if one.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=(0.9, 0.95),
        fused=cuda,
    )
    step, progress, curve, seconds = 0, 0.0, [], 0.0
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, progress, curve = state["step"], state["progress"], state["curve"]
        seconds = state["seconds"]
        print(f"resumed at step {step}, progress {progress:.3f}")

    def keep() -> None:
        if options.checkpoint:
            temporary = options.checkpoint.with_suffix(".partial")
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "progress": progress,
                "curve": curve,
                "seconds": seconds + time.monotonic() - start,
            }
            torch.save(state, temporary)
            temporary.replace(options.checkpoint)

    per_step = options.batch * options.context
    steps = options.steps or (math.ceil(options.tokens / per_step) if options.tokens else None)
    # Compiling comes before the clock: a schedule must not spend its warm-up on it.
    forward(*windows.at(step)).backward()
    optimizer.zero_grad(set_to_none=True)
    validate()
    start = time.monotonic()
    budget = None
    if options.time_limit:
        budget = max(1.0, options.time_limit - (start - began) - options.reserve)
    print(
        f"{parameters:,} parameters, {len(tokens):,} training tokens, {per_step:,} per step, "
        f"set-up {start - began:.0f} s",
        flush=True,
    )
    first, first_progress, shown = step, progress, time.monotonic()
    while progress < 1.0:
        factor = rate(progress, options.warmup, options.stable)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * factor
        loss = forward(*windows.at(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        loss = loss.detach()
        if step % 10 == 0:
            loss.item()  # waits for the device, so that the clock below is honest
        by_steps = step / steps if steps else 0.0
        by_clock = 0.0
        if budget:
            share = (time.monotonic() - start) / budget
            by_clock = first_progress + (1.0 - first_progress) * share
        progress = max(by_steps, by_clock)
        if step % options.every == 0 or progress >= 1.0:
            measured = validate()
            curve.append([step, step * per_step, round(float(loss), 4), round(measured, 4)])
            now = time.monotonic()
            speed = (step - first) * per_step / (now - start)
            print(
                f"step {step} progress {min(progress, 1):.3f} tokens {step * per_step / 1e6:.1f}M "
                f"epoch {step / windows.per_epoch:.2f} train {float(loss):.4f} val {measured:.4f} "
                f"lr {options.lr * factor:.2e} {speed / 1e3:.0f}k tokens/s",
                flush=True,
            )
            if now - shown >= options.save_every and progress < 1.0:
                keep()
                shown = now
    seconds += time.monotonic() - start
    if options.checkpoint:
        start = time.monotonic()
        keep()

    options.out.mkdir(parents=True, exist_ok=True)
    export(model, shape, members, options.out)
    final = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.bfloat16).eval()
    torch.nn.Module.to(final, device)
    record = {
        "parameters": parameters,
        "shape": shape,
        "command": "train " + " ".join(map(_without_folder, options.arguments)),
        "seed": options.seed,
        "steps": step,
        "tokens_seen": step * per_step,
        "epochs": round(step / windows.per_epoch, 2),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "torch": torch.__version__,
        "schedule": {"peak_lr": options.lr, "warmup": options.warmup, "stable": options.stable},
        "heldout": evaluate(final, val, shape["max_position_embeddings"], 16, lengths),
        "baselines": baselines(tokens, val, meta["vocabulary"]),
        "curve": curve,
        "corpus": meta,
        "samples": samples(final, members["tokenizer.json"]) if options.samples else [],
    }
    store(record, options.out)
    corpus.write_atomic(options.out / "README.md", card.render(record).encode())
    print(
        f"held-out, after the bf16 cast: perplexity {record['heldout']['perplexity']:.3f}, "
        f"{record['heldout']['bits_per_byte']:.4f} bits per byte, "
        f"over {record['heldout']['tokens']:,} tokens; "
        f"bigram {record['baselines']['bigram']:.1f}, unigram {record['baselines']['unigram']:.1f}"
    )
    print(f"{time.monotonic() - began:.0f} s in all")
    return record


def _without_folder(argument: str) -> str:
    return Path(argument).name if "/" in argument else argument


def export(model, shape: dict, members: dict[str, bytes], out: Path) -> None:
    """Write weights in bf16, configs and tokenizer as ``from_pretrained`` wants them."""
    import torch
    from safetensors.torch import save

    # The head is the embedding: stored once.
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    corpus.write_atomic(out / "model.safetensors", save(state, metadata={"format": "pt"}))
    settings = {
        **model.config.to_diff_dict(),
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        **shape,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    for name, content in {"config.json": settings, "generation_config.json": generation}.items():
        corpus.write_atomic(out / name, (json.dumps(content, indent=2) + "\n").encode())
    for name, data in members.items():
        corpus.write_atomic(out / name, data)


def write_card(options: argparse.Namespace) -> None:
    """Write README.md from training.json, after renewing its samples if asked."""
    record = json.loads((options.out / "training.json").read_text("utf-8"))
    if options.samples:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(options.out).eval()
        record["samples"] = samples(model, (options.out / "tokenizer.json").read_bytes())
        store(record, options.out)
    corpus.write_atomic(options.out / "README.md", card.render(record).encode())


def store(record: dict, out: Path) -> None:
    """Write the record of a run."""
    corpus.write_atomic(out / "training.json", (json.dumps(record, indent=1) + "\n").encode())


# --- command line ------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run one step from the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="train", description=str(__doc__).split("\n\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    form = argparse.ArgumentDefaultsHelpFormatter

    one = steps.add_parser("prepare", formatter_class=form, help="collect corpus and tokenizer")
    one.add_argument("--corpus", type=Path, required=True, help="file to write")
    one.add_argument(
        "--packages-dir", type=Path, action="append", required=True,
        help="site-packages folder to collect from; may be repeated",
    )  # fmt: skip
    one.add_argument("--texts", type=Path, help="folder for the packaged texts; none if left out")
    one.add_argument("--text-bytes", type=int, default=500_000, help="size of each packaged text")
    one.add_argument(
        "--package-bytes", type=int, default=16_000_000, help="most text taken from one package"
    )
    one.add_argument("--vocabulary", type=int, default=4096, help="tokens of the tokenizer")
    one.add_argument(
        "--tokenizer-bytes", type=int, default=40_000_000, help="text the tokenizer learns from"
    )

    two = steps.add_parser("train", formatter_class=form, help="train, export, evaluate")
    two.add_argument("--corpus", type=Path, required=True, help="file that prepare wrote")
    two.add_argument("--out", type=Path, required=True, help="model folder to write")
    two.add_argument("--architecture", default="llama", help="a decoder's model_type")
    two.add_argument("--steps", type=int, help="stop after this many steps")
    two.add_argument("--tokens", type=int, help="stop after this many tokens, if no --steps")
    two.add_argument("--time-limit", type=float, help="stop within this many seconds, all included")
    two.add_argument(
        "--reserve", type=float, default=30, help="seconds kept for export and evaluation"
    )
    two.add_argument("--batch", type=int, default=48, help="sequences per step")
    two.add_argument("--context", type=int, default=2048, help="tokens per sequence")
    two.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    two.add_argument("--weight-decay", type=float, default=0.1, help="decoupled, on matrices")
    two.add_argument("--warmup", type=float, default=0.02, help="share of the run spent rising")
    two.add_argument("--stable", type=float, default=0.2, help="share after which decay begins")
    two.add_argument("--seed", type=int, default=0, help="initialisation and data order")
    two.add_argument("--every", type=int, default=200, help="steps between progress lines")
    two.add_argument("--checkpoint", type=Path, help="file to resume from and to save to")
    two.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints")
    two.add_argument("--no-compile", action="store_true", help="do not compile on CUDA")
    two.add_argument("--no-samples", dest="samples", action="store_false", help="skip generation")
    two.add_argument(
        "--shape", type=json.loads, default={}, help="JSON of configuration values to override"
    )

    three = steps.add_parser(
        "card", formatter_class=form, help="rewrite README.md from training.json"
    )
    three.add_argument("--out", type=Path, required=True, help="model folder")
    three.add_argument("--samples", action="store_true", help="generate the samples again first")

    options = parser.parse_args(arguments)
    options.arguments = arguments[1:]
    if options.step == "prepare":
        prepare(options, SHAPE["max_position_embeddings"])
    elif options.step == "train":
        if not (options.steps or options.tokens or options.time_limit):
            parser.error("train needs an end: --steps, --tokens or --time-limit")
        train(options)
    else:
        write_card(options)


if __name__ == "__main__":
    main()
