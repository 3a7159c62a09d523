"""Measured choice: the fastest of several ways to compute the same thing, timed here, remembered.

A choice belongs to a device, a number of threads, a version of torch and the kernels' sources;
all of them are in the key it is remembered under, in memory and in one small file per choice in
the user's cache folder. ``GOSSAMER_CHOICES`` names another folder; ``off`` keeps nothing on disk.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gossamer.core.errors import GossamerError
from gossamer.kernels import build

__all__ = ["DENSE", "Choice", "ChoiceRow", "cache_folder", "environment", "fastest", "forget"]

DENSE = "dense"
_VARIABLE = "GOSSAMER_CHOICES"
_COLD = 1 << 26  # bytes read between calls on CPU; as large as the last cache of most machines
_WARM_UP = 2
_SLACK = 2e-3  # milliseconds a launch may vary
_LEAST = 3  # rounds that are run however long they take
_remembered: dict[str, dict[str, float]] = {}


@dataclass(frozen=True)
class Choice:
    """What was taken, and what every candidate cost.

    Parameters
    ----------
    name : of the candidate to run.
    milliseconds : the least a call took, by candidate; ``dense`` is always among them.
    """

    name: str
    milliseconds: dict[str, float]

    @property
    def speedup(self) -> float:
        """Dense time over the time of what was taken; 1 where dense was."""
        if self.name == DENSE:
            return 1.0
        return self.milliseconds[DENSE] / max(self.milliseconds[self.name], 1e-9)


class ChoiceRow(NamedTuple):
    """A line of the table of choices.

    Parameters
    ----------
    layer : name of the module, or of the group of equal ones.
    shape : (O, I). rows : range of batch sizes as text, such as ``2 to 4``.
    chosen : name of the candidate. milliseconds : of all candidates; empty if none was timed.
    """

    layer: str
    shape: tuple[int, ...]
    rows: str
    chosen: str
    milliseconds: dict[str, float]


def cache_folder() -> Path | None:
    """Where choices are kept; None where nothing is to be kept on disk."""
    chosen = os.environ.get(_VARIABLE)
    if chosen is not None:
        return Path(chosen).expanduser() if chosen.lower() not in ("", "0", "off") else None
    try:
        return build.cache_folder().parent / "choices"
    except build.CannotBuild:
        return None


@cache
def _sources() -> str:
    """A digest of every kernel's source."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cpp"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: torch.device | str, threads: int | None = None) -> dict[str, Any]:
    """What a measurement depends on beside its key, as plain values."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if threads is None else threads,
        "kernels": _sources(),
    }


def fastest(
    key: str,
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str,
    threads: int | None = None,
    margin: float = 0.05,
    repeats: int = 15,
    seconds: float = 2.0,
    launches: bool = True,
    flush: bool = True,
) -> Choice:
    """Time candidates in turn and take dense unless another is faster by a margin.

    A candidate's time is the least of its rounds: other programs can only add to it. What is
    measured while they keep every core busy serves this process but is not kept on disk.

    Every call finds the last cache full of something else, as a layer of a model larger than the
    cache does.

    Parameters
    ----------
    key : names the measurement: operation, shape, dtype, rows, sparsity.
    candidates : name to a call without arguments; ``dense`` must be one. On CUDA a call only
        launches.
    device : where they run.
    threads : of the CPU while measuring; torch's present number when left out.
    margin : share of dense's time that another must save to be taken, 0 <= margin < 1.
    repeats : rounds; a round runs every candidate once.
    seconds : no further round begins after so long, once three are done.
    launches : on CUDA, no candidate may cost the host more than dense does: where the host is
        behind, as in most decoding without CUDA graphs, a launch that takes longer is a loss
        however soon the device is done. A candidate's time is then dense's and the extra
        launch. False where CUDA graphs replay the calls: only the device's time counts.
    flush : on CPU, empty the last cache before every call. That slows the interpreter too, by
        about 0.1 ms a call: False where candidates go through copies that no cache holds.

    Raises
    ------
    GossamerError
        If ``dense`` is missing, or the margin or a count is out of range.
    """
    if DENSE not in candidates:
        raise GossamerError(f"candidates of {key!r} are {', '.join(candidates)}; dense is missing")
    if not 0.0 <= margin < 1.0:
        raise GossamerError(f"margin is {margin!r}; it is a share of time, 0 <= margin < 1")
    if repeats < 1:
        raise GossamerError(f"repeats is {repeats!r}; give a whole number, at least 1")
    device = torch.device(device)
    setting = {"key": key, "launches": launches, "flush": flush, **environment(device, threads)}
    setting["candidates"] = sorted(candidates)
    text = json.dumps(setting, sort_keys=True)
    times = _remembered.get(text) or _read(text, setting["candidates"])
    if times is None:
        with _threads(threads), torch.no_grad():
            if len(candidates) == 1:
                times = {DENSE: 0.0}  # nothing to decide
            elif device.type == "cuda":
                times = _time_cuda(candidates, device, repeats, seconds, launches)
            else:
                times = _time_cpu(candidates, repeats, seconds, flush)
        if len(candidates) > 1 and not _busy(device):
            _write(text, times)
    _remembered[text] = times
    best = min(times, key=lambda name: times[name])
    enough = times[best] <= (1.0 - margin) * times[DENSE]
    return Choice(best if enough else DENSE, dict(times))


def forget() -> None:
    """Drop what this process remembers; files stay."""
    _remembered.clear()


def _busy(device: torch.device) -> bool:
    """Whether more threads than the cores can serve have been waiting to run for a minute."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1) + 1


@contextmanager
def _threads(count: int | None):
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_cpu(
    candidates: Mapping[str, Callable[[], object]], repeats: int, seconds: float, flush: bool
) -> dict[str, float]:
    """Least milliseconds of a call; flush empties the last cache before each."""
    other = torch.ones(_COLD // 4 if flush else 1)
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for turn in range(_WARM_UP + repeats):
        for name, call in candidates.items():
            other.sum()
            begin = time.perf_counter()
            call()
            if turn >= _WARM_UP:
                taken[name].append(time.perf_counter() - begin)
        if turn + 1 >= _WARM_UP + _LEAST and time.perf_counter() - start > seconds:
            break
    return {name: 1e3 * min(times) for name, times in taken.items()}


def _time_cuda(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    seconds: float,
    launches: bool,
) -> dict[str, float]:
    """Least milliseconds of a call on the device, or of dense and what launching costs more."""
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, _COLD)
    other = torch.empty(size // 4, device=device)
    work: dict[str, list[float]] = {name: [] for name in candidates}
    host: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.cuda.device(device):
        start = time.perf_counter()
        for turn in range(_WARM_UP + repeats):
            for name, call in candidates.items():
                # Filling also keeps the device busy while the call is launched, so the events
                # do not see the launch.
                other.fill_(1.0)
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                begin = time.perf_counter()
                call()
                launched = 1e3 * (time.perf_counter() - begin)
                after.record()
                after.synchronize()
                if turn >= _WARM_UP:
                    work[name].append(before.elapsed_time(after))
                    host[name].append(launched)
            if turn + 1 >= _WARM_UP + _LEAST and time.perf_counter() - start > seconds:
                break
    least = {name: min(times) for name, times in work.items()}
    return _with_launches(least, {n: min(h) for n, h in host.items()}) if launches else least


def _with_launches(work: dict[str, float], host: dict[str, float]) -> dict[str, float]:
    """What a call costs where the host is behind, if its launch is longer than dense's."""
    extra = {name: host[name] - host[DENSE] for name in work}
    return {
        name: max(time, work[DENSE] + extra[name]) if extra[name] > _SLACK else time
        for name, time in work.items()
    }


def _path(text: str) -> Path | None:
    folder = cache_folder()
    name = hashlib.sha256(text.encode()).hexdigest()[:24]
    return None if folder is None else folder / f"{name}.json"


def _read(text: str, names: list[str]) -> dict[str, float] | None:
    """The remembered times, or None; a file that is not what was written is measured anew."""
    path = _path(text)
    if path is None or not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        times = {str(name): float(value) for name, value in data["milliseconds"].items()}
        good = data["setting"] == json.loads(text) and sorted(times) == names
        if good and all(isfinite(value) and value >= 0 for value in times.values()):
            return times
        reason = "its content does not fit its name"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    logging.getLogger("gossamer").warning("choice %s is measured anew: %s", path.name, reason)
    return None


def _write(text: str, times: dict[str, float]) -> None:
    """Keep the times for the next process, whole or not at all; a full disk only costs time."""
    path = _path(text)
    if path is None:
        return
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"setting": json.loads(text), "milliseconds": times}, file, indent=1)
        os.replace(name, path)
    except OSError as error:
        logging.getLogger("gossamer").warning("choice %s is not kept: %s", path.name, error)
    finally:
        if name:
            Path(name).unlink(missing_ok=True)
