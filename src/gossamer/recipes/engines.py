"""Where cells run: in this process, in processes beside it, or on a Ray cluster.

Every engine yields ``(cell, row)`` as cells end, in any order. The caller writes the rows, so
workers need no common disk.
"""

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, Literal

from gossamer.core import GossamerError
from gossamer.recipes.bench import Bench, Setup
from gossamer.recipes.cells import Cell

__all__ = ["Engine", "on_processes", "on_ray"]

Engine = Literal["local", "ray"]
Row = dict[str, Any]

_bench: Bench | GossamerError | None = None


def _start(setup: Setup) -> None:
    """Build a worker's bench; what a user must hear of is kept for the first cell."""
    global _bench
    # Ctrl-C ends the parent, which ends its workers; they have nothing to say of their own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _bench = Bench(setup)
    except GossamerError as error:
        _bench = error


def _run(cell: Cell) -> Row:
    if isinstance(_bench, GossamerError):
        raise _bench
    assert _bench is not None
    return _bench.run(cell)


class _Actor:
    """A bench on a Ray worker; its errors travel as values, so none is lost in a wrapper."""

    def __init__(self, setup: Setup) -> None:
        _start(setup)

    def run(self, cell: Cell) -> Row | str:
        try:
            return _run(cell)
        except GossamerError as error:
            return str(error)


def shared_threads(setup: Setup, jobs: int) -> Setup:
    """The setup with the machine's threads divided among the workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return replace(setup, threads=setup.threads or max(1, (cores or 1) // jobs))


def on_processes(setup: Setup, cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, Row]]:
    """Run cells in ``jobs`` processes, each with its own copy of the model."""
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, len(cells))
    pool = ProcessPoolExecutor(jobs, context, _start, (shared_threads(setup, jobs),))
    try:
        left = {pool.submit(_run, cell): cell for cell in cells}
        while left:
            done, _ = wait(left, return_when=FIRST_COMPLETED)
            for future in done:
                yield left.pop(future), future.result()
    except (KeyboardInterrupt, GossamerError):
        # A worker amid a long cell would keep the interpreter from ending.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    except BrokenProcessPool:
        raise GossamerError(
            "a worker was killed, perhaps for want of memory; "
            "use fewer jobs and run again to resume"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def on_ray(
    setup: Setup, cells: Sequence[Cell], jobs: int, address: str | None = None
) -> Iterator[tuple[Cell, Row]]:
    """Run cells on ``jobs`` actors of a Ray cluster; a local one is started without address.

    Parameters
    ----------
    address : as for ``ray.init``; also read from $RAY_ADDRESS by Ray itself.

    Raises
    ------
    GossamerError
        If Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise GossamerError("engine ray needs Ray; pip install 'gossamer[ray]'") from None
    begun = not ray.is_initialized()
    if begun:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        jobs = min(jobs, len(cells))
        worker: Any = ray.remote(_Actor)
        idle = [worker.remote(shared_threads(setup, jobs)) for _ in range(jobs)]
        waiting, running = list(reversed(cells)), {}
        while waiting or running:
            while waiting and idle:
                cell, actor = waiting.pop(), idle.pop()
                running[actor.run.remote(cell)] = (cell, actor)
            (done,), _ = ray.wait(list(running), num_returns=1)
            cell, actor = running.pop(done)
            idle.append(actor)
            yield cell, _ray_result(ray, done)
    finally:
        if begun:
            ray.shutdown()


def _ray_result(ray: Any, reference: Any) -> Row:
    """A worker's row; a user's error reaches the user as itself."""
    try:
        row = ray.get(reference)
    except ray.exceptions.RayActorError:
        raise GossamerError(
            "a Ray worker died, perhaps for want of memory; use fewer jobs and run again to resume"
        ) from None
    if isinstance(row, str):
        raise GossamerError(row)
    return row
