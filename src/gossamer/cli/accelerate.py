"""``gossamer accelerate``: which kernels a sparse model's layers run on, and what they gain."""

from typing import Annotated

import torch
from cyclopts import Parameter

from gossamer import execute
from gossamer.cli.show import bar, console, print_json
from gossamer.core import GossamerError, check_count
from gossamer.evaluate.environment import environment
from gossamer.models.loading import as_dtype
from gossamer.recipes.recipe import load

__all__ = ["accelerate"]


def accelerate(
    model: str,
    *,
    rows: str = "1,4,16,128",
    store: str | None = None,
    prompt: int = 8,
    tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
    threads: int | None = None,
    timed: bool = True,
    dtype: str | None = None,
    device: str = "cpu",
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure every linear layer on the kernels there are, and generation dense and accelerated.

    Choices are remembered in the user's cache folder ($GOSSAMER_CHOICES names another, off keeps
    none), so gossamer.accelerate(model) in Python takes no time afterwards.

    Parameters
    ----------
    model
        A folder with a sparse model, or a hub id.
    rows
        Last batch size (sequences times tokens) of every range a choice is made for.
    store
        float32 or bfloat16: round the stored weights to it. By default they stay as they are.
    prompt
        Prompt tokens of the timed generation.
    tokens
        Tokens it writes.
    batch
        Sequences it writes at once.
    rounds
        Timed generations of each, in turn.
    threads
        CPU threads; all by default.
    timed
        Time generation; --no-timed only prints the table.
    dtype
        float32, bfloat16 or float16; by default float32 on CPU, bfloat16 on GPU.
    device
        cpu or cuda.
    allow_pickle
        Read a model that has only .bin weights (as tensors only, no code).
    json
        Print JSON.
    """
    for name, count in {"prompt": prompt, "tokens": tokens, "batch": batch}.items():
        check_count(name, count, 1)
    check_count("rounds", rounds, 1)
    ends = _ends(rows)
    if threads is not None:
        torch.set_num_threads(check_count("threads", threads, 1))
    loaded = load(model, dtype=dtype, device=device, allow_pickle=allow_pickle)
    with bar(f"accelerating {model}", quiet=json) as progress:
        work = execute.accelerate(
            loaded.model,
            rows=ends,
            dtype=None if store is None else as_dtype(store, torch.device(device)),
            keep_dense=True if timed else None,
            report=None,
            progress=progress,
        )
        pair = None
        if timed and work.layers:
            pair = execute.generation(
                work, prompt_tokens=prompt, new_tokens=tokens, batch=batch, rounds=rounds
            )
    if json:
        print_json(
            {
                "model": model,
                "layers": len(work.layers),
                "choices": [row._asdict() for row in work.rows],
                "dense_bytes": work.dense_bytes,
                "bytes_moved": work.bytes_moved(),
                "bytes_stored": work.bytes_stored,
                "notes": work.notes,
                "generation": None if pair is None else pair.to_dict(),
                "environment": environment(device),
            }
        )
        return
    for line in (work, pair):
        if line is not None:
            console.print(str(line), markup=False, highlight=False, soft_wrap=True)


def _ends(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise GossamerError(
            f"rows is {text!r}; give ascending whole numbers, such as 1,4,16"
        ) from None
