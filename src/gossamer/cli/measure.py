"""``gossamer measure``: how sparse a model's activations are at a price in perplexity."""

from typing import Annotated

from cyclopts import Parameter

from gossamer.cli.show import bar, console, print_json
from gossamer.core import check_count
from gossamer.evaluate.environment import environment
from gossamer.methods.activations.laws.rules import Rule
from gossamer.methods.activations.sparsing_law import SparsingLaw
from gossamer.models import Tokens, check_vocabulary, context_length, read_documents
from gossamer.recipes.recipe import load

__all__ = ["measure"]


def measure(
    model: str,
    *,
    percent: float = 1.0,
    rule: Rule = "cett",
    data: str | None = None,
    calibration: str | None = None,
    length: int = 512,
    windows: int = 16,
    dtype: str | None = None,
    device: str = "cpu",
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure a model's PPL-p% activation sparsity, layer by layer.

    The neurons that can go from every token before perplexity grows by p percent: searched on
    calibration text, reported on other text.

    Parameters
    ----------
    model
        nano (packaged), a folder, or a hub id.
    percent
        Growth of the perplexity.
    rule
        cett (one error level for all layers), or the baselines topk, fat, plain, unweighted.
    data
        Text to report on: a text, JSONL or parquet file. Without it the packaged held-out text.
    calibration
        Text to search on. Without it the packaged calibration text.
    length
        Context in tokens, at most the model's own.
    windows
        Windows of each text.
    dtype
        float32, bfloat16 or float16; by default float32 on CPU, bfloat16 on GPU.
    device
        cpu or cuda.
    allow_pickle
        Read a model that has only .bin weights (as tensors only, no code).
    json
        Print JSON.
    """
    check_count("windows", windows, 1)
    loaded = load(model, dtype=dtype, device=device, allow_pickle=allow_pickle)
    length = min(length, context_length(loaded.model) or length)
    documents = (read_documents(calibration, "calibration"), read_documents(data, "heldout"))
    texts = [
        Tokens.from_documents(text, loaded.tokenizer, length=length, samples=windows)
        for text in documents
    ]
    for tokens in texts:
        check_vocabulary(tokens, loaded.model)
    method = SparsingLaw(percent=percent, rule=rule, tokens=windows * length)
    with bar(f"measuring {model}", quiet=json) as progress:
        found = method.measure(loaded.model, *texts, progress=progress)
    if json:
        plain = {**vars(found), "active": found.active}
        print_json(
            {"model": model, **method.to_dict(), **plain, "environment": environment(device)}
        )
        return
    wide = max(len(name) for name in found.shares)
    lines = [
        f"{model}: {found.sparsity:.2%} of the neurons can go from a token at {percent:g} % "
        f"perplexity ({rule}, level {found.level:.4f})",
        f"perplexity ratio {found.fitted:.4f} on the text searched on, {found.growth:.4f} on the "
        "text reported on",
        *(f"  {name:<{wide}}  {share:7.2%}" for name, share in found.shares.items()),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
