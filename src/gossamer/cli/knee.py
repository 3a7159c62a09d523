"""``gossamer knee``: how sparse a model may become before its loss turns up."""

from dataclasses import replace
from typing import Annotated, Any

from cyclopts import Parameter

from gossamer import methods
from gossamer.cli.show import bar, console, print_json, table
from gossamer.core import check_count
from gossamer.evaluate.environment import environment
from gossamer.methods.weights.essential_sparsity import EssentialSparsity
from gossamer.methods.weights.knee.curve import Curve
from gossamer.models import Loaded, Tokens, check_vocabulary, context_length, read_documents
from gossamer.recipes.bench import halves
from gossamer.recipes.recipe import load

__all__ = ["knee"]


def knee(
    model: str,
    *,
    base: str = "magnitude",
    pattern: str = "model",
    allocation: str = "uniform",
    sweep: str = "0.05:0.95:0.05",
    tolerance: float = 0.01,
    random: bool = True,
    data: str | None = None,
    samples: int = 32,
    length: int = 512,
    windows: int = 32,
    batch_size: int = 8,
    steps: int = 0,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Sweep the sparsity of a model and find where its loss turns up; the model is not changed.

    Prints the loss at every sparsity beside that of random pruning, the largest sparsity within
    the tolerance, and the elbow of two line segments with its 95 % interval. To prune there:
    gossamer sparsify MODEL essential_sparsity.

    Parameters
    ----------
    model
        nano (packaged), a folder, or a hub id.
    base
        The pruning method, such as magnitude, wanda, sparsegpt or random:seed=3.
    pattern
        Allowed shape: model, layer, row, block:16x16 ...; N:M (2:4) sweeps N of M.
    allocation
        uniform, er, erk, lamp, global or owl; other than uniform needs pattern layer or row.
    sweep
        Sparsities: start:stop:step, or a list such as 0.3,0.5,0.7.
    tolerance
        Share of the dense loss that may be added.
    random
        Sweep random masks too, as every comparison does; --no-random saves half the time.
    data
        Text to measure on: a text, JSONL or parquet file. A method that calibrates does so on its
        first half, and all is measured on the second. Without it the packaged texts.
    samples
        Calibration windows.
    length
        Tokens per window.
    windows
        Windows measured.
    batch_size
        Windows per forward pass.
    steps
        Updates of fine-tuning under the mask before each measurement; 0 is one shot.
    seed
        Draws the calibration windows and the random masks.
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
    check_count("samples", samples, 1)
    check_count("length", length, 2)
    check_count("batch_size", batch_size, 1)
    check_count("seed", seed, 0)
    method = methods.make(
        "essential_sparsity",
        base=base, pattern=pattern, allocation=allocation, sweep=sweep, tolerance=tolerance,
        steps=steps,
    )  # fmt: skip
    assert isinstance(method, EssentialSparsity)
    loaded = load(model, dtype=dtype, device=device, allow_pickle=allow_pickle)
    heldout, calibration = _texts(loaded, data, length, windows, samples, seed)
    sweeps = {base: method}
    if random and not base.startswith("random"):
        sweeps["random"] = replace(method, base=f"random:seed={seed}")
    curves: dict[str, Curve] = {}
    for name, one in sweeps.items():
        with bar(f"{name} on {model}", quiet=json) as progress:
            curves[name] = one.curve(
                loaded.model, heldout, calibration, batch_size=batch_size, progress=progress
            )
    if json:
        found = {name: curve.to_dict(tolerance) for name, curve in curves.items()}
        about = {"model": model, "method": method.to_dict(), "length": heldout.length, "seed": seed}
        print_json({**about, "curves": found, "environment": environment(device)})
        return
    _show(model, curves, tolerance)


def _texts(
    loaded: Loaded, data: str | None, length: int, windows: int, samples: int, seed: int
) -> tuple[Tokens, Tokens]:
    """Windows to measure on and windows to calibrate on, from different text."""
    length = min(length, context_length(loaded.model) or length)
    evaluated = read_documents(data, "heldout")
    if data is None:
        calibrated = read_documents(None, "calibration")
    else:
        calibrated, evaluated = halves(evaluated)
    heldout = Tokens.from_documents(evaluated, loaded.tokenizer, length=length).slice(windows)
    calibration = Tokens.from_documents(
        calibrated, loaded.tokenizer, length=length, samples=samples, seed=seed
    )
    for tokens in (heldout, calibration):
        check_vocabulary(tokens, loaded.model)
    return heldout, calibration


def _show(model: str, curves: dict[str, Curve], tolerance: float) -> None:
    first, *others = curves
    curve = curves[first]
    essential, elbow = curve.essential(tolerance), curve.elbow()
    rows: list[list[str]] = []
    for index, (share, loss) in enumerate(zip(curve.sparsity, curve.losses, strict=True)):
        marks = ["<- essential"] if share == essential.sparsity else []
        if elbow is not None and _nearest(curve.sparsity, elbow.sparsity) == index:
            marks.append("<- elbow")
        more = f"{(loss / curve.dense - 1):+.1%}"
        rest = [_beside(curves[name], share) for name in others]
        rows.append([f"{share:.1%}", curve.patterns[index], f"{loss:.4f}", more, *rest, *marks])
    wide = max(map(len, rows))
    head = ["sparsity", "pattern", "loss", "of dense", *others, ""][:wide]
    filled = [row + [""] * (len(head) - len(row)) for row in rows]
    console.print(table(f"{first} on {model}", head, filled, right=2))
    for name, one in curves.items():
        for line in _sentences(one, tolerance):
            console.print(f"{name}: {line}", markup=False, highlight=False, soft_wrap=True)


def _sentences(curve: Curve, tolerance: float) -> tuple[str, ...]:
    """The two answers; the points are in the table."""
    return curve.sentences(tolerance)[:2]


def _nearest(shares: tuple[float, ...], share: float) -> int:
    return min(range(len(shares)), key=lambda i: abs(shares[i] - share))


def _beside(curve: Curve, share: float) -> str:
    """The loss of another curve at a sparsity, where it was measured within half a percent."""
    index = _nearest(curve.sparsity, share)
    near: Any = abs(curve.sparsity[index] - share) <= 0.005
    return f"{curve.losses[index]:.4f}" if near else ""
