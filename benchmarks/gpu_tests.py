"""The tests that need a GPU, in several processes at once: most of their time goes into compiling.

    python -m benchmarks.gpu_tests --out DIR [--jobs N]

DIR/tests_I.xml and DIR/tests_I.log are those of process I. Exit 0 if all passed and there were some.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine

_MOST_JOBS = 8
_NO_TESTS = 5


def start(words: Sequence[str], shard: int, jobs: int, out: Path) -> subprocess.Popen[bytes]:
    """One of the processes; tests/conftest.py gives it its share."""
    with (out / f"tests_{shard}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *words, "--junitxml", str(out.resolve() / f"tests_{shard}.xml")],
            cwd=machine.ROOT,
            env={**os.environ, "CISC_TESTS_SHARD": f"{shard}/{jobs}", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description=summary)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(_MOST_JOBS, cores)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes at once (default: {jobs})")
    parser.add_argument("words", nargs="*", help="of pytest, behind -- (default: all tests marked cuda)")
    flags = parser.parse_args(arguments)
    if flags.jobs < 1:
        parser.error("--jobs must be at least 1")
    flags.out.mkdir(parents=True, exist_ok=True)
    words = flags.words or ["-m", "cuda", "-q", "-rf"]
    started = [start(words, shard, flags.jobs, flags.out) for shard in range(flags.jobs)]
    codes = [process.wait() for process in started]
    for shard, code in enumerate(codes):
        lines = (flags.out / f"tests_{shard}.log").read_text(errors="replace").splitlines()
        failed = [line for line in lines if re.match(r"FAILED |ERROR ", line)]
        for line in failed or lines[-10:] * (code not in (0, _NO_TESTS)):
            print(line)
        print(f"{shard}: {lines[-1] if lines else 'no output'}")
    return 0 if set(codes) <= {0, _NO_TESTS} and 0 in codes else 1


if __name__ == "__main__":
    raise SystemExit(main())
