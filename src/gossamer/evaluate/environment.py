"""What a number was measured with: commit, versions, device, threads."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["commit", "device_name", "environment"]

_PACKAGES = ("gossamer", "torch", "transformers", "numpy", "scipy", "triton")


@cache
def commit() -> str:
    """Commit of the source checkout, with ``+changes`` where files differ.

    $GOSSAMER_COMMIT, where set, says it for a copy; outside any checkout it is ``released``.
    """
    if told := os.environ.get("GOSSAMER_COMMIT"):
        return told
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # A copy installed inside some other project's checkout is not that project's commit.
        if not git("ls-files", "environment.py"):
            return "released"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here.parent))
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "released"


def device_name(device: str | torch.device = "cpu") -> str:
    """The device in words, such as ``NVIDIA H200`` or the processor's name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(line for line in text.splitlines() if line.startswith("model name"))
        return model.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Commit, versions, device and threads, as plain values."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": commit(),
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
