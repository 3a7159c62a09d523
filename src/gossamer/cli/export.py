"""``gossamer export``: a model's zeros left out on disk, and what that saves."""

from typing import Annotated, Any

from cyclopts import Parameter

from gossamer import export as exporting
from gossamer import methods
from gossamer.cli.show import bar, console, print_json, warn
from gossamer.export import layouts
from gossamer.models import Loaded, load_model, resolve
from gossamer.models.loading import read_json
from gossamer.models.store import read_stages, require_new

__all__ = ["export"]


def export(
    model: str,
    *,
    out: str,
    format: str = "bitmask",
    pattern: str = "2:4",
    dtype: str | None = None,
    signed_zeros: bool = True,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write a model with its zeros left out, and say what each matrix takes.

    Parameters
    ----------
    model
        nano (packaged), a folder (sparse, or an export to convert), or a hub id.
    out
        Folder to write to; it must be new or empty.
    format
        bitmask, nm, csr, or compressed-tensors' sparse-bitmask or sparse-24-bitmask.
    pattern
        N:M that format nm stores.
    dtype
        float32, bfloat16 or float16: values are rounded to it. Without it they stay as stored.
    signed_zeros
        Keep -0.0 as a value, bit for bit; without it it is dropped like any zero.
    json
        Print the report as JSON.
    """
    layouts.layout(format, pattern)
    require_new(out)
    loaded = _load(model)
    with bar(f"exporting {model}", quiet=json) as progress:
        report = exporting.write(
            loaded.model,
            out,
            format,
            pattern=pattern,
            tokenizer=loaded.tokenizer,
            dtype=dtype,
            signed_zeros=signed_zeros,
            progress=progress,
        )
    if json:
        print_json(report.to_dict())
        return
    for line in (report, f"written to {report.folder}"):
        console.print(str(line), markup=False, highlight=False, soft_wrap=True)


def _load(model: str) -> Loaded:
    """The model in the dtype it is stored in."""
    if exporting.is_export(model):
        return exporting.read(model)
    folder = resolve(model)
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    known = ("float32", "bfloat16", "float16")
    loaded = load_model(model, dtype=stored if stored in known else None)
    for stage in read_stages(folder):
        key = stage.method["method"]
        if methods.get(key).card.family != "weights":
            warn(f"{key} acts while the model runs; an export holds weights only and leaves it out")
    return loaded
