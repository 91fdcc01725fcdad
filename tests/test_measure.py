"""How time is measured, the machine's ceilings, and what a result says of the machine."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ceilings, machine, measure


def test_what_is_slow_is_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time_ms", lambda call, device: call())
    calls = [lambda ms=ms: ms for ms in (1.0, 600.0, 6000.0)]
    assert [len(times) for times in measure.times_in_turn(calls, budget_s=0)] == [5, 3, 2]
    assert [len(times) for times in measure.times_in_turn(calls, quick=True)] == [2, 2, 2]
    assert len(measure.times_in_turn(calls[:1], budget_s=60)[0]) == 30


def test_time_is_that_of_the_call() -> None:
    assert 20 <= measure.time_ms(lambda: time.sleep(0.02)) < 500


def test_nothing_is_left_to_be_written_back_by_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose second cache holds as much as some calls move."""
    done: list[str] = []

    class Block:
        def __init__(self, use: str) -> None:
            self.use = use

        def fill_(self, value: int) -> None:
            done.append(f"fill {self.use}")

        def sum(self) -> None:
            done.append(f"sum {self.use}")

    class Event:
        def __init__(self, **_: Any) -> None:
            self.record = lambda: done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, stop: Event) -> float:
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(measure, "_more_than_a_cache", lambda device, use="written": Block(use))
    assert measure.time_ms(lambda: done.append("call"), device="cuda") == 7.0
    assert done == ["fill written", "sum read", "record", "call", "record", "wait"]
    done.clear()
    measure.time_ms(lambda: done.append("call"))
    assert done == ["fill written", "call"]


def test_what_is_read_is_not_what_was_written() -> None:
    written, read = (measure._more_than_a_cache("cpu", use) for use in ("written", "read"))
    assert written.data_ptr() != read.data_ptr() and written.nbytes == read.nbytes == 256 * 2**20
    assert measure._more_than_a_cache("cpu", "read") is read


@pytest.mark.parametrize(("device", "least"), [("cpu", 9.0), ("cuda", 1.0)])
def test_a_ceiling_is_the_least_of_several_times(
    device: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(10, 0, -1))
    monkeypatch.setattr(measure, "time_ms", lambda call, device: float(next(times)))
    assert ceilings._best_ms(lambda: None, device) == least


def test_facts_name_triton_and_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "version", lambda package: f"{package} 3")
    versions = machine.facts("this", [])["versions"]
    assert (versions["triton"], versions["driver"]) == ("triton 3", None)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$*" = "--query-gpu=driver_version --format=csv,noheader" ] && echo 570.1\n')
    smi.chmod(0o755)
    assert machine.facts("this", [])["versions"]["driver"] == "570.1"


def test_version_of_what_is_not_installed() -> None:
    assert machine.version("torch") and machine.version("no-such-package") is None


def test_what_a_graph_reads_and_writes_lives_as_long_as_its_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replayed"))
    )
    buffers: list[weakref.ref[torch.Tensor]] = []

    def make() -> Callable[[], torch.Tensor]:
        buffer = torch.zeros(3)
        buffers.append(weakref.ref(buffer))

        def call() -> torch.Tensor:
            done.append("called")
            result = buffer + 1
            buffers.append(weakref.ref(result))
            return result

        return call

    replay = measure.captured(make)
    assert done == ["called"] * 4 + ["replayed"]
    gc.collect()
    assert buffers[0]() is not None and buffers[-1]() is not None and buffers[-2]() is None
    replay()
    assert done[-2:] == ["replayed"] * 2
    del replay
    gc.collect()
    assert buffers[0]() is None and buffers[-1]() is None
