"""Build: C++ kernels compiled on first use with the system's compiler, then cached.

A kernel is one source file with a plain C interface, so it needs no header of torch's and
compiles in seconds; it is called through ctypes with data pointers. The library's file name is
a hash of everything that decides its content, so a changed source is a new file and a stale
one is never read. Instruction sets are chosen inside the kernel at run time.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from gossamer.core.errors import GossamerError

__all__ = ["CannotBuild", "cache_folder", "compiler", "load"]

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")
_TIMEOUT = 300.0  # seconds; a compiler that takes longer hangs


class CannotBuild(GossamerError):  # noqa: N818
    """A kernel cannot be compiled here; the message gives the reason."""


def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: ``$CXX`` if set, else the first of c++, g++, clang++.

    Raises
    ------
    CannotBuild
        If there is none.
    """
    chosen = os.environ.get("CXX")
    for words in [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if words and (path := shutil.which(words[0])):
            return (path, *words[1:])
    wanted = f"CXX={chosen!r}" if chosen else "c++, g++ or clang++"
    raise CannotBuild(f"no C++ compiler ({wanted}) was found; install one or set CXX")


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``gossamer/kernels`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "gossamer" / "kernels"
    except RuntimeError:
        raise CannotBuild("no home folder to keep kernels in; set XDG_CACHE_HOME") from None


@cache
def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuild(f"{command[0]} --version failed: {error}") from None
    return done.stdout


def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ source, compiled unless an earlier process did so already.

    Safe for processes that start at the same time: each compiles to a file of its own and
    renames it into place; whoever is last wins, with the same content.

    Raises
    ------
    CannotBuild
        If there is no compiler, it fails, or the cache folder cannot be written.
    """
    command = compiler()
    text = source.read_bytes()
    parts = (text, *(word.encode() for word in (*command, *FLAGS)), _version(command).encode())
    machine = f"{platform.system()}-{platform.machine()}".encode()
    digest = hashlib.sha256(b"\0".join((*parts, machine))).hexdigest()[:20]
    target = cache_folder() / f"{source.parent.name}-{digest}.so"
    try:
        if not target.exists():
            _compile(command, source, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise CannotBuild(
            f"kernel {source.parent.name} cannot be stored or read: {error}"
        ) from None


def _compile(command: tuple[str, ...], source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, *FLAGS, str(source), "-o", name],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
            raise CannotBuild(f"{command[0]} failed on kernel {source.parent.name}: {reason}")
        os.replace(name, target)
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{command[0]} took over {_TIMEOUT:g} s; set CXX to another") from None
    finally:
        Path(name).unlink(missing_ok=True)
