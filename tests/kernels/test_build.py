"""Compiling, caching, and what is said when it cannot be done."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gossamer.kernels import build

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "sample" / "cpu.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE)
    try:
        build.compiler()
    except build.CannotBuild as error:
        pytest.skip(str(error))
    return path


def test_compiled_once_and_then_read_from_the_cache(source: Path, monkeypatch: pytest.MonkeyPatch):
    assert build.load(source).answer() == 42
    (stored,) = build.cache_folder().iterdir()
    assert stored.name.startswith("sample-")
    monkeypatch.setattr(build, "_compile", None)  # a second compilation would fail
    assert build.load(source).answer() == 42


def test_a_changed_source_is_a_new_library(source: Path):
    build.load(source)
    source.write_text(SOURCE.replace("42", "7"))
    assert build.load(source).answer() == 7
    assert len(list(build.cache_folder().iterdir())) == 2


def test_builds_at_the_same_time_leave_one_whole_library(source: Path):
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(build.load, [source] * 4))
    assert [library.answer() for library in libraries] == [42] * 4
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".so"]


def test_a_source_that_does_not_compile_leaves_nothing(source: Path):
    source.write_text("this is no C++\n")
    with pytest.raises(build.CannotBuild, match="failed on kernel sample"):
        build.load(source)
    assert list(build.cache_folder().iterdir()) == []


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.CannotBuild, match="install one or set CXX"):
        build.load(source)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.CannotBuild, match="CXX='no-such-compiler'"):
        build.load(source)


def test_a_compiler_that_does_not_answer(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.CannotBuild, match="--version failed"):
        build.load(source)


def test_a_compiler_that_hangs(source: Path, monkeypatch: pytest.MonkeyPatch):
    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 1.0)

    build._version(build.compiler())
    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(build.CannotBuild, match="took over"):
        build.load(source)
    assert list(build.cache_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch):
    blocked = source.with_name("file")
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(build.CannotBuild, match="cannot be stored"):
        build.load(source)


def test_compiler_options_may_come_with_the_name(source: Path, monkeypatch: pytest.MonkeyPatch):
    path = build.compiler()[0]
    monkeypatch.setenv("CXX", f"{path} -O0")
    assert build.compiler() == (path, "-O0")
    assert build.load(source).answer() == 42
