"""The measured choice: dense unless faster by a margin, remembered, and safe from bad files."""

import json
import logging
import time

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.kernels import measured
from gossamer.kernels.measured import Choice, fastest


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("GOSSAMER_CHOICES", str(tmp_path))
    monkeypatch.setattr(measured, "_busy", lambda device: False)
    measured.forget()
    yield tmp_path
    measured.forget()


def sleeping(calls: list[str], **milliseconds: float):
    """Candidates that take so long and say that they ran."""

    def one(name: str, duration: float):
        def call() -> None:
            calls.append(name)
            time.sleep(duration / 1e3)

        return call

    return {name: one(name, duration) for name, duration in milliseconds.items()}


def stored(monkeypatch, **milliseconds: float) -> None:
    """Every measurement gives these times."""
    monkeypatch.setattr(measured, "_time_cpu", lambda *_: dict(milliseconds))


def nothing() -> None:
    """A candidate that is never timed."""


def test_the_fastest_is_found():
    calls: list[str] = []
    choice = fastest("k", sleeping(calls, dense=30, slow=60, fast=1), device="cpu", repeats=3)
    assert choice.name == "fast"
    assert choice.speedup > 1
    assert choice.milliseconds["dense"] < choice.milliseconds["slow"]
    assert calls[:6] == ["dense", "slow", "fast"] * 2  # in turn, never one after the other


@pytest.mark.parametrize(
    ("other", "margin", "wanted"),
    [(0.96, 0.05, "dense"), (0.94, 0.05, "other"), (0.94, 0.2, "dense"), (1.5, 0.0, "dense")],
)
def test_dense_stays_unless_beaten_by_the_margin(monkeypatch, other, margin, wanted):
    stored(monkeypatch, dense=1.0, other=other)
    runs = {"dense": nothing, "other": nothing}
    assert fastest("k", runs, device="cpu", margin=margin).name == wanted


def test_a_second_call_measures_nothing(folder):
    calls: list[str] = []
    runs = sleeping(calls, dense=0, other=0)
    first = fastest("k", runs, device="cpu", repeats=1)
    count = len(calls)
    assert fastest("k", runs, device="cpu", repeats=1) == first
    measured.forget()  # as a new process
    assert fastest("k", runs, device="cpu", repeats=1) == first
    assert len(calls) == count
    assert len(list(folder.glob("*.json"))) == 1


def test_what_it_depends_on_is_measured_anew(folder):
    calls: list[str] = []
    runs = sleeping(calls, dense=0, other=0)
    for key, threads in (("k", 1), ("l", 1), ("l", 2)):
        before = len(calls)
        fastest(key, runs, device="cpu", threads=threads, repeats=1)
        assert len(calls) > before
    assert torch.get_num_threads() == 1  # put back
    fastest("l", {**runs, "third": nothing}, device="cpu", threads=2, repeats=1)
    assert len(list(folder.glob("*.json"))) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"setting": {}, "milliseconds": {"dense": 1, "other": 2}}',
        '{"milliseconds": {"dense": NaN, "other": 1}}',
    ],
)
def test_a_broken_file_costs_one_line(folder, caplog, text):
    runs = sleeping([], dense=0, other=0)
    fastest("k", runs, device="cpu", repeats=1)
    (path,) = folder.glob("*.json")
    whole = path.read_text()
    path.write_text(text)
    measured.forget()
    with caplog.at_level(logging.WARNING, logger="gossamer"):
        fastest("k", runs, device="cpu", repeats=1)
    assert len(caplog.records) == 1
    assert "measured anew" in caplog.text
    assert json.loads(path.read_text())["setting"] == json.loads(whole)["setting"]


def test_nothing_is_kept_when_told_so(folder, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CHOICES", "off")
    assert measured.cache_folder() is None
    fastest("k", sleeping([], dense=0, other=0), device="cpu", repeats=1)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_survived(folder, monkeypatch, caplog):
    (folder / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CHOICES", str(folder / "file" / "below"))
    assert fastest("k", sleeping([], dense=0, other=0), device="cpu", repeats=1)
    assert "not kept" in caplog.text


def test_what_a_busy_machine_gave_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(measured, "_busy", lambda device: True)
    calls: list[str] = []
    runs = sleeping(calls, dense=0, other=0)
    first = fastest("k", runs, device="cpu", repeats=1)
    assert list(folder.iterdir()) == []
    count = len(calls)
    assert fastest("k", runs, device="cpu", repeats=1) == first
    assert len(calls) == count


def test_a_call_costs_the_least_it_took(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])
    # Two calls of warm-up, then three rounds.
    order = {"dense": [5, 5, 9, 1, 7], "other": [5, 5, 9, 9, 9]}

    def call(name: str):
        def run() -> None:
            now[0] += order[name].pop(0) / 1e3

        return run

    choice = fastest("k", {n: call(n) for n in order}, device="cpu", repeats=3)
    assert choice.name == "dense"
    assert choice.milliseconds == pytest.approx({"dense": 1.0, "other": 9.0})


def test_a_longer_launch_costs_dense_and_the_difference():
    work = {"dense": 0.1, "sparse": 0.05, "light": 0.05, "slow": 0.3}
    host = {"dense": 0.01, "sparse": 0.05, "light": 0.011, "slow": 0.05}
    assert measured._with_launches(work, host) == pytest.approx(
        {"dense": 0.1, "sparse": 0.14, "light": 0.05, "slow": 0.3}
    )


def test_threads_are_put_back_after_an_error():
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fastest("k", {"dense": nothing, "other": broken}, device="cpu", threads=2)
    assert torch.get_num_threads() == 1


def test_dense_alone_is_not_timed():
    calls: list[str] = []
    choice = fastest("k", sleeping(calls, dense=0), device="cpu")
    assert (choice.name, choice.speedup, calls) == ("dense", 1.0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": {"csr": nothing}}, "dense is missing"),
        ({"margin": 1.0}, "0 <= margin < 1"),
        ({"margin": float("nan")}, "0 <= margin < 1"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_what_is_wrong_is_said(arguments, message):
    given = {"candidates": {"dense": nothing, "other": nothing}, **arguments}
    with pytest.raises(GossamerError, match=message):
        fastest("k", device="cpu", **given)


def test_speedup_of_dense_is_one():
    assert Choice("dense", {"dense": 3.0, "csr": 9.0}).speedup == 1.0
