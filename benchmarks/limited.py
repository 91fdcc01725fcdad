"""A command with a time limit, and what it has printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine

TAIL_CHARACTERS = 4000
GRACE_S = 3.0
"""From SIGTERM to SIGKILL at the limit."""
_SHORT_GRACE_S = 1.0
"""The same where this process is told to end: shorter, for its own time runs too."""


@dataclass(frozen=True)
class Ran:
    """`returncode` is None where the limit ended it; `output` is all that it has printed until then."""

    returncode: int | None
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        return self.output[-TAIL_CHARACTERS:]


def run(
    words: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None, log: Path | None = None
) -> Ran:
    """Run a command to its end or its limit, when all that it has started ends with it; `log` keeps what it
    prints, as it prints it.

    The command has a process group of its own, which gets SIGTERM and then SIGKILL. Where this process gets
    SIGTERM itself, it ends the command first, so that a command may call this, too.
    """
    begin = time.monotonic()
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as stream, _raised_sigterm():
        process = subprocess.Popen(
            words,
            cwd=machine.ROOT,
            env=dict(os.environ if env is None else env),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        returncode: int | None
        try:
            returncode = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            returncode = None
            _terminate(process, GRACE_S)
        except BaseException:
            _terminate(process, _SHORT_GRACE_S)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what outlives the command
            process.wait()
        stream.seek(0)
        output = stream.read().decode(errors="replace")
    return Ran(returncode, output, round(time.monotonic() - begin, 1))


def _terminate(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Let each of a group end what it has started in groups of its own."""
    until = time.monotonic() + grace_s
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < until:
            process.poll()  # or it would stay in the group
            os.killpg(process.pid, 0)
            time.sleep(0.05)


@contextmanager
def _raised_sigterm() -> Iterator[None]:
    """SIGTERM raises meanwhile, where it would end this process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
