"""``gossamer evaluate``: how good, how large and how fast a model is."""

from contextlib import ExitStack
from typing import Annotated

from cyclopts import Parameter

from gossamer.cli.show import bar, console, print_json
from gossamer.core import check_count
from gossamer.evaluate import footprint, score, speed
from gossamer.evaluate.environment import environment
from gossamer.models import Tokens, at_work, check_vocabulary, context_length, read_documents
from gossamer.recipes.recipe import load

__all__ = ["evaluate"]


def evaluate(
    model: str,
    *,
    data: str | None = None,
    length: int = 1024,
    windows: int | None = 32,
    stride: int | None = None,
    batch_size: int = 4,
    timed: bool = True,
    dtype: str | None = None,
    device: str = "cpu",
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure a model's perplexity, size and speed; a saved sparse model with its methods.

    Parameters
    ----------
    model
        nano (packaged), a folder, or a hub id.
    data
        Text to evaluate on: a text, JSONL or parquet file. Without it the packaged text.
    length
        Context in tokens, at most the model's own.
    windows
        Windows evaluated.
    stride
        Tokens between windows that overlap; by default they are disjoint.
    batch_size
        Windows per forward pass.
    timed
        Measure tokens per second, unless sparsity is only simulated; --no-timed skips it.
    dtype
        float32, bfloat16 or float16; by default float32 on CPU, bfloat16 on GPU.
    device
        cpu or cuda.
    allow_pickle
        Read a model that has only .bin weights (as tensors only, no code).
    json
        Print JSON.
    """
    loaded = load(model, dtype=dtype, device=device, allow_pickle=allow_pickle)
    length = min(length, context_length(loaded.model) or length)
    tokens = Tokens.from_documents(read_documents(data, "heldout"), loaded.tokenizer, length=length)
    check_vocabulary(tokens, loaded.model)
    if windows is not None:
        tokens = tokens.slice(check_count("windows", windows, 1))
    works = at_work(loaded.model)
    simulated = any(work.simulated for work in works)
    with bar(f"evaluating {model}", quiet=json) as progress:
        with ExitStack() as counting:
            for work in works:
                counting.enter_context(work.measuring())
            quality = score(
                loaded.model, tokens, stride=stride, batch_size=batch_size, progress=progress
            )
        size = footprint(loaded.model, works, context=length)
        rate = None
        if timed and not simulated:
            rate = speed(loaded.model, prompt_tokens=max(1, min(512, length - 32)), new_tokens=32)
    if json:
        print_json(
            {
                "model": model,
                "methods": [work.method.to_dict() for work in works],
                "quality": quality.to_dict(),
                "footprint": size.to_dict(),
                "speed": None if rate is None else rate.to_dict(),
                "environment": environment(device),
            }
        )
        return
    heads = [str(work.report()).partition("\n")[0] for work in works]
    note = None
    if timed and simulated:
        note = "no speed: the zeros run dense here; gossamer accelerate times them on kernels"
    for line in (model, *heads, quality, size, rate, note):
        if line is not None:
            console.print(str(line), markup=False, highlight=False, soft_wrap=True)
