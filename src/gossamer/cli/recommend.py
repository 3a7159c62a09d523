"""``gossamer recommend``: the largest saving of attention that your own prompts do not notice."""

from typing import Annotated, Any

from cyclopts import Parameter

from gossamer.cli.show import bar, console, print_json, table, warn
from gossamer.core import GossamerError, check_count
from gossamer.evaluate.environment import environment
from gossamer.evaluate.long_context import TASKS, Sample, find_task, suite
from gossamer.evaluate.long_context.prompts import Kind, Source, prompts_of, read_source
from gossamer.evaluate.verdict import check_margin, samples_needed
from gossamer.models import Loaded, context_length
from gossamer.recipes import frontier
from gossamer.recipes.recipe import load

__all__ = ["recommend"]

_LENGTH = 4096


def recommend(
    model: str,
    *,
    prompts: str = "builtin",
    length: int | None = None,
    methods: str = "",
    sparsity: str = "0.5,0.75,0.9",
    tasks: str = "",
    margin: float = 0.02,
    samples: int | None = None,
    batch_size: int = 4,
    unseen: Annotated[bool, Parameter(negative=())] = False,
    timed: bool = True,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Try sparse attention on your prompts and print the largest saving that loses nothing.

    Every method climbs a ladder of sparsities beside the dense model. A step counts only if every
    task passes: a paired bootstrap must rule out a loss beyond the margin, corrected for all the
    methods and tasks tried. Nothing is saved or changed.

    Parameters
    ----------
    model
        nano (packaged), a folder, or a hub id.
    prompts
        builtin, for made-up needles, chains and counts; or a file: JSONL of {"prompt", "answer"},
        matched exactly, or plain text (.txt), whose continuation's loss is compared.
    length
        Tokens of a prompt with its answer; by default 4096, or the model's context if that is less.
        Longer prompts are refused.
    methods
        Keys, separated by commas, such as quest,snapkv:window=32. By default all that need no
        training.
    sparsity
        The ladder: shares of the attention pairs removed, separated by commas.
    tasks
        Of the built-in prompts, separated by commas. By default all.
    margin
        Loss still taken as none: 0.02 is two answers in a hundred, or 0.02 nats per token of text.
    samples
        Prompts per task. By default as many as equal answers need to pass, at most 512.
    batch_size
        Prompts run at once.
    unseen
        Read the context before the question is known.
    timed
        Time one layer's attention call, dense and sparse, selection included.
    seed
        Draws the built-in prompts and the bootstrap.
    dtype
        float32, bfloat16 or float16; by default float32 on CPU, bfloat16 on GPU.
    device
        cpu or cuda.
    allow_pickle
        Read a model that has only .bin weights (as tensors only, no code).
    json
        Print JSON.
    """
    check_margin(margin)
    check_count("batch_size", batch_size, 1)
    check_count("length", _LENGTH if length is None else length, 16)
    names = tuple(w.strip() for w in methods.split(",") if w.strip()) or frontier.candidates()
    rungs = sorted({frontier.number(word) for word in sparsity.split(",") if word.strip()})
    if not rungs:
        raise GossamerError("sparsity names no step; give numbers such as 0.5,0.75,0.9")
    for name in names:
        frontier.at_amount(name, rungs[0], length or _LENGTH)
    wanted = tuple(w.strip() for w in tasks.split(",") if w.strip()) or tuple(TASKS)
    for name in wanted:
        find_task(name)
    source = None if prompts == "builtin" else read_source(prompts, count=samples)
    loaded = load(model, dtype=dtype, device=device, allow_pickle=allow_pickle)
    limit = context_length(loaded.model)
    if length is None:
        length = _LENGTH if limit is None else min(_LENGTH, limit)
    if limit is not None and length > limit:
        raise GossamerError(
            f"length {length} is over the model's limit of {limit} tokens; give at most {limit}"
        )
    tests = len(names) * (len(wanted) if source is None else 1)
    needed = samples_needed(margin, tests=tests)
    kind, groups = _prompts(loaded, source, wanted, length, samples, min(needed, 512), seed)
    found, refused = _climb(
        loaded, groups, names, rungs, kind, margin, batch_size, unseen, timed, seed, json, length
    )
    for line in refused:
        warn(line)
    if json:
        print_json(_record(model, found, margin, device))
        return
    _show(model, found)
    fewest = min(map(len, groups.values()))
    if fewest < needed and kind == "answers":
        warn(
            f"{fewest} prompts a task cannot rule out a loss of {margin:g} in {tests} tests though "
            f"all answers agree; {needed} would; give more prompts, a larger --margin, or fewer "
            "methods"
        )
    for line in sentences(found, margin):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _prompts(
    loaded: Loaded,
    source: Source | None,
    tasks: tuple[str, ...],
    length: int,
    count: int | None,
    default: int,
    seed: int,
) -> tuple[Kind, dict[str, list[Sample]]]:
    """Prompts by task, and how they are scored; made up where there is no source."""
    if source is None:
        made = suite(
            loaded.tokenizer, length=length, count=count or default, tasks=tasks, seed=seed
        )
        return "answers", made
    kind, own = prompts_of(source, loaded.tokenizer, length=length, count=count)
    return kind, {"prompts": own}


def _climb(
    loaded: Loaded,
    groups: dict[str, list[Sample]],
    names: tuple[str, ...],
    rungs: list[float],
    kind: Kind,
    margin: float,
    batch_size: int,
    unseen: bool,
    timed: bool,
    seed: int,
    quiet: bool,
    length: int,
) -> tuple[frontier.Frontier, list[str]]:
    """Measure dense, then every method rung by rung until it fails; what refused, and why."""
    question = "unseen" if unseen else "seen"

    def cell(name: str, rung: float, dense: frontier.Cell | None) -> frontier.Cell:
        method = None if dense is None else frontier.at_amount(name, rung, length)
        return frontier.measure(
            loaded,
            groups,
            method,
            name=name,
            sparsity=rung,
            batch_size=batch_size,
            question=question,
            dense=dense,
            timed=timed,
            kind=kind,
        )

    total = 1 + len(names) * len(rungs)
    with bar("recommending", quiet=quiet) as progress:
        progress(0, total, "dense")
        dense = cell("dense", 0.0, None)
        least = frontier.ABLE if kind == "answers" else float("-inf")
        cells: list[frontier.Cell] = []
        refused: list[str] = []
        found = frontier.climb(dense, [], margin=margin, least=least, seed=seed)
        alive, done = list(names), 1
        for rung in rungs:
            for name in alive:
                progress(done, total, f"{name} at {rung:g}")
                try:
                    cells.append(cell(name, rung, dense))
                except GossamerError as error:
                    refused.append(f"{name} was not tried at {rung:g}: {error}")
                done += 1
            found = frontier.climb(dense, cells, margin=margin, least=least, seed=seed)
            alive = [name for name in alive if found.passes(name, rung)]
    if not cells:
        raise GossamerError(f"no method could be tried: {refused[0]}")
    return found, refused


def _show(model: str, found: frontier.Frontier) -> None:
    tasks = tuple(found.dense.scores)
    head = ["method", "sparsity", "verdict", "density", "mass", "time", *tasks]
    rows = [["dense", "0", "", "1", "1", "1x", *_scores(found.dense)]]
    failures: list[str] = []
    for (name, rung), cell in found.cells.items():
        failed = found.failed(name, rung)
        if failed:
            failures.append(f"{name} at {rung:g} fails {', '.join(failed)}")
        verdict = "fails" if failed else "passes"
        rows.append([name, f"{rung:g}", verdict, *_kept(cell), _speed(cell), *_scores(cell)])
    console.print(table(f"sparse attention on {model}", head, rows, right=3))
    for line in failures:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _scores(cell: frontier.Cell) -> list[str]:
    return [f"{row.score:.3f}" for row in cell.rows.values()]


def _kept(cell: frontier.Cell) -> list[str]:
    masses = [row.rho for row in cell.rows.values() if row.rho is not None]
    return [
        "?" if cell.density is None else f"{cell.density:.3f}",
        f"{sum(masses) / len(masses):.3f}" if masses else "?",
    ]


def speed_up(cell: frontier.Cell) -> float | None:
    """Dense over sparse time of one attention call, selection included; None if not timed."""
    rows = [r for r in cell.rows.values() if r.dense_attention_seconds is not None]
    if not rows:
        return None
    row = rows[0]
    assert row.selection_seconds is not None
    assert row.attention_seconds is not None
    assert row.dense_attention_seconds is not None
    return row.dense_attention_seconds / max(1e-12, row.selection_seconds + row.attention_seconds)


def _speed(cell: frontier.Cell) -> str:
    gain = speed_up(cell)
    return "?" if gain is None else f"{gain:.2f}x"


def sentences(found: frontier.Frontier, margin: float) -> list[str]:
    """What to do, in sentences."""
    lines: list[str] = []
    if found.unable:
        lines.append(
            f"the dense model itself cannot do {', '.join(found.unable)}, so no loss could show "
            "there and they do not count"
        )
    passing = {name: rung for name, rung in found.passing.items() if rung > 0}
    if not passing:
        return [
            *lines,
            f"no method passes every task at a margin of {margin:g}: keep full attention",
        ]
    # A method's saving is what it was measured to remove, not what it was asked to.
    saved = {name: found.saved(name) for name in passing}
    best = max(saved, key=lambda n: saved[n])
    cell = found.cells[best, passing[best]]
    phase = next(iter(cell.rows.values())).phase.replace("+", " and ")
    lines.append(
        f"largest saving that passes every task: {best} at sparsity {passing[best]:g} removes "
        f"{saved[best]:.1%} of the attention pairs in {phase}"
    )
    gain, length = speed_up(cell), max(row.length for row in cell.rows.values())
    if gain is None:
        lines.append("its speed was not measured: a saving of pairs is not a saving of time")
    elif gain > 1.0:
        lines.append(f"one attention call of {length} tokens runs {gain:.2f} times as fast here")
    else:
        lines.append(
            f"it is no speed-up here: one attention call of {length} tokens takes {1 / gain:.1f} "
            "times as long as full attention, selection included; break-even lies at longer "
            "contexts"
        )
    return lines


def _record(model: str, found: frontier.Frontier, margin: float, device: str) -> dict[str, Any]:
    return {
        "model": model,
        "margin": margin,
        "dense": [row.to_dict() for row in found.dense.rows.values()],
        "rows": [
            {**row.to_dict(), "sparsity": rung}
            for (_, rung), cell in found.cells.items()
            for row in cell.rows.values()
        ],
        "verdicts": [{**v.to_dict(), "sparsity": r} for (_, r, _), v in found.verdicts.items()],
        "passing": found.passing,
        "unable": list(found.unable),
        "recommendation": sentences(found, margin),
        "environment": environment(device),
    }
