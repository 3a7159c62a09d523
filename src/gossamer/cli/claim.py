"""``gossamer claim``: run the papers' claims, scaled down, and say how they came out."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from gossamer import methods
from gossamer.claims import runner
from gossamer.claims.lm import Place
from gossamer.cli.show import bar, console, print_json
from gossamer.core import GossamerError

__all__ = ["claim"]


def claim(
    key: str | None = None,
    *,
    all_: Annotated[bool, Parameter(name="--all", negative=())] = False,
    tier: Literal["smoke", "small", "gpu"] = "smoke",
    model: str | None = None,
    data: str | None = None,
    calibration: str | None = None,
    samples: int | None = None,
    windows: int = 8,
    length: int = 256,
    device: str = "cpu",
    out: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Run a method's claims and print verdict, the paper's figure and ours.

    The exit status is 1 when a claim fails.

    Parameters
    ----------
    key
        A method, see gossamer methods.
    all_
        Run the claims of every method.
    tier
        smoke (CPU, seconds), small (CPU, minutes) or gpu.
    model
        Folder or hub id of another language model to run portable claims on.
    data
        File of its held-out text (.txt, .jsonl, .parquet).
    calibration
        File of calibration text; the first half of data when left out.
    samples
        Calibration windows; what the claim says when left out.
    windows
        Held-out windows.
    length
        Tokens per window.
    device
        Where the model runs, such as cuda.
    out
        Results folder to write the records to.
    json
        Print the records as JSON.
    """
    if (key is None) != all_:
        raise GossamerError("name one method, or give --all")
    keys = methods.keys() if all_ else (key,)
    command = f"gossamer claim {'--all' if all_ else key} --tier {tier}"
    place = None
    if model is not None:
        place = Place(
            model=model,
            device=device,
            data=data,
            calibration=calibration,
            samples=samples,
            windows=windows,
            length=length,
        )
        command += f" --model {place.name} --data {Path(data or '').name} --windows {windows}"
        command += f" --length {length}" + (f" --samples {samples}" if samples else "")
        command += f" --device {device}"
    elif data is not None or calibration is not None or device != "cpu":
        raise GossamerError("data, calibration and device go with another model; name it by model")
    records = []
    with bar(f"{tier} claims", quiet=json) as progress:
        for done, name in enumerate(keys):
            assert name is not None
            progress(done, len(keys), name)
            folder = None if out is None else Path(out)
            for record in runner.run(name, tier, folder, command, place):
                records.append(record)
                if not json:
                    _show(record)
    if json:
        print_json(records)
    elif not records:
        console.print(f"no claims of tier {tier} here", markup=False)
    return int(any(r["verdict"] == "fails" for r in records))


_STYLES = {"holds": "green", "weaker": "yellow", "fails": "bold red"}


def _show(record: dict[str, object]) -> None:
    verdict = str(record["verdict"])
    console.print(
        f"[{_STYLES.get(verdict, 'dim')}]{verdict:>7}[/]  {record['method']}: {record['claim']}"
    )
    for name, text in (("says", "sentence"), ("paper", "paper"), ("ours", "ours")):
        console.print(
            f"         {name:<6}{record[text]}", markup=False, highlight=False, soft_wrap=True
        )
    console.print(
        f"         seeds {record['seeds']}, {record['seconds']} s, commit {record['commit']}",
        style="dim",
        markup=False,
        highlight=False,
    )
