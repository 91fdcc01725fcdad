"""A command with a time limit, and what it has printed."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine

TAIL_CHARACTERS = 4000


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
    prints, as it prints it."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as stream:
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
        finally:
            # Its own group, so that what it started ends with it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stream.seek(0)
        output = stream.read().decode(errors="replace")
    return Ran(returncode, output, round(time.monotonic() - begin, 1))
