"""Peak memory and time of a call.

Memory is counted by the operating system, so that C++ workspaces are seen as well as tensors.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
EXACT = {"MALLOC_MMAP_THRESHOLD_": "524288"}
"""Environment of a process whose freed blocks leave the resident set at once, at the cost of page faults."""
SLOW_S, LONG_S = 0.5, 5.0
"""A run that takes this long is timed less often."""
_ROUNDS, _SLOW_ROUNDS, _LONG_ROUNDS = 5, 3, 2
_MOST_ROUNDS = 30
_WARM_UPS = 3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MIB = 2**20
_FLUSH_BYTES = 256 * _MIB
LIMIT_S = 5.0
"""Longest run of a rival; it is left out where it takes longer."""


def peak_extra_mib(fn: Callable[[], Any], *, device: str = "cpu", warm_up: bool = True) -> float:
    """Most memory in MiB that `fn()` held at once, beyond what was there before and what it returns.

    Return from `fn` whatever is not to be counted: outputs, gradients, saved winners. On the CPU it is the
    peak resident set of the process, reset before the call (Linux only); pages that are never written do not
    count. On "cuda" it is the peak of torch's allocator. With `warm_up` a first call, not measured,
    loads libraries and fills caches. Exact to a few MiB in a process started with `EXACT` in its
    environment; otherwise blocks that the C library keeps may add some tens.
    """
    if warm_up:
        fn()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = fn()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        with _freed_memory_returns():
            _CLEAR.write_text(_RESET_PEAK)
            before = _resident("VmRSS")
            kept = fn()
            peak = _resident("VmHWM")
    return (peak - before - _nbytes(kept)) / _MIB


def time_ms(fn: Callable[[], Any], *, device: str = "cpu") -> float:
    """Milliseconds that one call takes, started after writing more than any cache holds; on a GPU also after
    reading as much, or what is still to be written back would take its time from the call."""
    _more_than_a_cache(device).fill_(1)
    if device == "cuda":
        _more_than_a_cache(device, "read").sum()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))
    begin = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - begin)


def captured(make: Callable[[], Callable[[], Any]], warm_ups: int = _WARM_UPS) -> Callable[[], None]:
    """The replay of a CUDA graph of the call that `make` gives: the GPU's own time, without Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()  # here too: backward runs on the stream of its forward
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    replay = partial(_replay, graph, call, result)
    replay()
    return replay


def _replay(graph: torch.cuda.CUDAGraph, *kept: Any) -> None:
    """What the graph reads and writes lives as long as what replays it."""
    graph.replay()


def times_in_turn(
    calls: Sequence[Callable[[], Any]], *, device: str = "cpu", budget_s: float = 1.0, quick: bool = False
) -> list[list[float]]:
    """Milliseconds of each call by round: rounds of all until the budget is spent, `_ROUNDS` at least; what
    is slow runs in the first few only."""
    times: list[list[float]] = [[] for _ in calls]
    begin = time.monotonic()
    rounds = 2 if quick else _ROUNDS
    for number in range(2 if quick else _MOST_ROUNDS):
        if number >= rounds and time.monotonic() - begin > budget_s:
            break
        for call, of_call in zip(calls, times, strict=True):
            if number < _most_rounds(of_call):
                of_call.append(time_ms(call, device=device))
    return times


def _most_rounds(times: Sequence[float]) -> int:
    """How often a call is timed, by its first time."""
    seconds = 1e-3 * times[0] if times else 0.0
    return _LONG_ROUNDS if seconds > LONG_S else _SLOW_ROUNDS if seconds > SLOW_S else _MOST_ROUNDS


@cache
def _more_than_a_cache(device: str, use: str = "written") -> Tensor:
    """A block for each use; kept, since touching new pages takes longer than writing."""
    return torch.zeros(_FLUSH_BYTES, dtype=torch.uint8, device=device)


def can_measure() -> bool:
    """Whether the peak of the resident set can be reset and read here."""
    return sys.platform == "linux" and _CLEAR.exists()


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables meanwhile, for processes that are started and for compiled code that reads them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _freed_memory_returns() -> Iterator[None]:
    """Let freed blocks leave the resident set at once; the C library keeps up to 64 MiB otherwise."""
    c_library = ctypes.CDLL(None)
    c_library.malloc_trim(0)
    if EXACT.items() <= os.environ.items():
        yield
        return
    c_library.mallopt(_M_MMAP_THRESHOLD, 512 * 1024)
    try:
        yield
    finally:
        c_library.mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
        c_library.mallopt(_M_TRIM_THRESHOLD, 64 * _MIB)


def _resident(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS}: expected a line {key}, got none")


def _nbytes(kept: Any) -> int:
    if isinstance(kept, Tensor):
        return kept.untyped_storage().nbytes()
    if isinstance(kept, dict):
        kept = kept.values()
    if isinstance(kept, (list, tuple)) or hasattr(kept, "__iter__"):
        return sum(_nbytes(one) for one in kept)
    return 0


def timed_s(call: Callable[[], Any]) -> float:
    """Seconds of a call, from its start to the end of what it launched."""
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
