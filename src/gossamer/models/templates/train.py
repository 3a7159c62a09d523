"""Train the small model of the templated tasks.

    python -m gossamer.models.templates.train --out templates [--steps 1500] [--seed 0]

All tasks share every batch; the loss is that of the answer, and of every later word for sentences
of a topic. It takes a minute or two on one CPU thread.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core import GossamerError
from gossamer.models.nano.corpus import write_atomic
from gossamer.models.templates.tasks import TASKS, batch, vocabulary, words

__all__ = ["accuracy", "main", "new_model", "tokenizer"]

SHAPE: dict[str, Any] = {
    "vocab_size": len(words()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": vocabulary()["<pad>"],
    "bos_token_id": vocabulary()["<s>"],
    "eos_token_id": None,
}
EACH = 48
"""Examples of every task in a batch."""
WARMUP = 0.05


def new_model(seed: int) -> nn.Module:
    """An untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def tokenizer() -> Any:
    """One token per word of the vocabulary, blanks between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(vocabulary(), unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>")


def task_loss(model: nn.Module, task: str, seed: int) -> Tensor:
    """Mean loss of one task's answers in nats."""
    made = batch(task, EACH, seed)
    if task == "topics":
        logits = model(made.ids, use_cache=False).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), made.ids[:, 1:].flatten())
    logits = model(made.ids, use_cache=False).logits[:, -1]
    return functional.cross_entropy(logits, made.answer)


@torch.no_grad()
def accuracy(model: nn.Module, count: int = 500, seed: int = 1_000_003) -> dict[str, float]:
    """Share of examples whose most likely next token is right, by task."""
    found = {}
    for task in TASKS:
        made = batch(task, count, seed)
        best = model(made.ids, use_cache=False).logits[:, -1].argmax(-1)
        found[task] = float(made.right.gather(1, best[:, None]).float().mean())
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train and write model, tokenizer and ``training.json``."""
    parser = argparse.ArgumentParser(description="Train the templates model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise GossamerError(f"--steps is {options.steps}; give at least 1")
    torch.set_num_threads(1)
    model, begun = new_model(options.seed), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1)
    warm = max(1, int(WARMUP * options.steps))
    for step in range(options.steps):
        left = (options.steps - step) / options.steps
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min((step + 1) / warm, left)
        seed = (options.seed * options.steps + step) * len(TASKS)
        losses = [task_loss(model, task, seed + i) for i, task in enumerate(TASKS)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0:
            shown = ", ".join(f"{t} {x.item():.3f}" for t, x in zip(TASKS, losses, strict=True))
            print(f"step {step + 1}: {shown}", flush=True)
    found = accuracy(model.eval())
    print(json.dumps(found))
    cast(Any, model).to(torch.float16).save_pretrained(options.out)
    tokenizer().save_pretrained(options.out)
    record = {
        "command": f"python -m gossamer.models.templates.train --out {options.out.name} "
        f"--steps {options.steps} --lr {options.lr} --seed {options.seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - begun, 1),
        "accuracy": found,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_atomic(options.out / "training.json", json.dumps(record, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
