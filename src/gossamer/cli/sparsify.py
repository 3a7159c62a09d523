"""``gossamer sparsify``: apply one method to a model and take the result away."""

import dataclasses
from inspect import signature
from typing import Annotated, Any

from cyclopts import Parameter

from gossamer import methods
from gossamer.cli.show import bar, console, print_json
from gossamer.core import unknown
from gossamer.models import as_tokens
from gossamer.models.labelled import as_labelled
from gossamer.models.store import require_new
from gossamer.recipes.recipe import load

__all__ = ["sparsify"]

# Kinds of models whose text needs labels.
_LABELLED = ("steered language model", "labelled language model", "frozen network")


def sparsify(
    model: str,
    method: str,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    data: str | None = None,
    out: str | None = None,
    samples: int = 64,
    length: int = 1024,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    **fields: str,
) -> None:
    """Apply one method to a model, report what it did, and save the result.

    Parameters
    ----------
    model
        nano (packaged), a folder, or a hub id.
    method
        Key of a method, see gossamer methods.
    sparsity
        Fraction removed, 0 up to but not including 1.
    pattern
        Allowed shape: row, layer, model, 2:4, block:16x16, channels:in ...
    data
        Calibration text: a text, JSONL or parquet file. Without it the packaged text. Methods
        that contrast texts take a JSONL file with text and label on every line.
    out
        Folder to save to; it must be new or empty. Without it nothing is saved.
    samples
        Calibration windows.
    length
        Tokens per calibration window.
    seed
        Draws the calibration windows, and the method's own randomness.
    dtype
        float32, bfloat16 or float16; by default float32 on CPU, bfloat16 on GPU.
    device
        cpu or cuda.
    allow_pickle
        Read a model that has only .bin weights (as tensors only, no code).
    json
        Print the report as JSON.
    fields
        The method's own parameters, such as --allocation erk or --sink 8.
    """
    made = _make(method, {"sparsity": sparsity, "pattern": pattern, **fields}, seed)
    if out is not None:
        require_new(out)
    loaded = load(model, dtype=dtype, device=device, allow_pickle=allow_pickle)
    with bar(f"{made.key()} on {model}", quiet=json) as progress:
        tokens: Any
        if made.subject in _LABELLED:
            tokens = as_labelled(data, loaded.model, length=length, tokenizer=loaded.tokenizer)
        else:
            tokens = as_tokens(
                data,
                loaded.model,
                samples=samples,
                length=length,
                seed=seed,
                tokenizer=loaded.tokenizer,
            )
        options = {"undo": False} if "undo" in signature(made.apply).parameters else {}
        applied = made.apply(loaded.model, tokens, progress=progress, **options)
    report = applied.report()
    folder = None if out is None else str(applied.save(out, loaded.tokenizer))
    if not options:
        applied.restore()
    if json:
        print_json({**report.to_dict(), "saved": folder})
        return
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if folder is not None:
        console.print(f"saved to {folder}", markup=False, highlight=False)


def _make(text: str, options: dict[str, Any], seed: int) -> Any:
    """The method with the options as its fields; what it does not have is an error."""
    given = {k.replace("-", "_"): v for k, v in options.items() if v is not None}
    terms = [methods.split_text(term) for term in methods.split_sum(text)]
    if len(terms) > 1:
        # Every option belongs to the terms that have it, and must belong to one.
        known = {f.name for key, *_ in terms for f in dataclasses.fields(methods.get(key))}
        for name in given:
            if name not in known:
                raise unknown(f"parameter of {text}", name, tuple(sorted(known)))
        return methods.parse_method(text, seed=seed, **given)
    key, *parts = terms[0]
    values: dict[str, Any] = dict(methods.text_fields(parts))
    values |= given
    if methods.has_field(key, "seed"):
        values.setdefault("seed", seed)
    return methods.make(key, **values)
