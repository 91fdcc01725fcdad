"""The tests that need a GPU, in several processes at once: most of their time goes into compiling.

    python -m benchmarks.gpu_tests --out DIR [--jobs N] [--limit SECONDS]

DIR/tests_I.xml and DIR/tests_I.log are those of process I. Exit 0 if all passed and there were some. What has
not ended at the limit is interrupted, which leaves the results until then; that is no success.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks import machine

_MOST_JOBS = 8
_NO_TESTS = 5
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Of each process: Inductor would start as many compilers in each as there are cores."""
_INTERRUPTED_S = 10.0
"""In which pytest writes its results after an interruption."""


def start(words: Sequence[str], shard: int, jobs: int, out: Path) -> subprocess.Popen[bytes]:
    """One of the processes; tests/conftest.py gives it its share."""
    with (out / f"tests_{shard}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *words, "--junitxml", str(out.resolve() / f"tests_{shard}.xml")],
            cwd=machine.ROOT,
            env={**os.environ, **_ONE_THREAD, "CISC_TESTS_SHARD": f"{shard}/{jobs}"},
            stdout=log,
            stderr=subprocess.STDOUT,
            # What a shell starts in the background ignores it, and so would this.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        )


def ended(processes: Sequence[subprocess.Popen[bytes]], limit_s: float | None) -> list[int]:
    """Exit codes of all; at the limit what still runs is interrupted, all of it at once."""
    _wait(processes, limit_s)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    _wait(processes, _INTERRUPTED_S)
    for process in processes:
        process.kill()  # nothing where it has ended
    return [process.wait() for process in processes]


def _wait(processes: Sequence[subprocess.Popen[bytes]], limit_s: float | None) -> None:
    """Until all have ended, or for that long."""
    until = None if limit_s is None else time.monotonic() + limit_s
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(None if until is None else max(0.0, until - time.monotonic()))


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description=summary)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(_MOST_JOBS, cores)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes at once (default: {jobs})")
    parser.add_argument("--limit", type=float, help="seconds (default: none)")
    parser.add_argument("words", nargs="*", help="of pytest, behind -- (default: all tests marked cuda)")
    flags = parser.parse_args(arguments)
    if flags.jobs < 1:
        parser.error("--jobs must be at least 1")
    flags.out.mkdir(parents=True, exist_ok=True)
    words = flags.words or ["-m", "cuda", "-q", "-rf"]
    started = [start(words, shard, flags.jobs, flags.out) for shard in range(flags.jobs)]
    codes = ended(started, flags.limit)
    for shard, code in enumerate(codes):
        lines = (flags.out / f"tests_{shard}.log").read_text(errors="replace").splitlines()
        failed = [line for line in lines if re.match(r"FAILED |ERROR ", line)]
        for line in failed or lines[-10:] * (code not in (0, _NO_TESTS)):
            print(line)
        print(f"{shard}: {lines[-1] if lines else 'no output'}")
    return 0 if set(codes) <= {0, _NO_TESTS} and 0 in codes else 1


if __name__ == "__main__":
    raise SystemExit(main())
