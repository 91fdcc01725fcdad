"""NVIDIA's tools around a program of this project: where they are, a run with a time limit, and whether the
machine forbids them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine

TAIL_CHARACTERS = 2000
FORBIDDEN = (
    r"ERR_NVGPUCTRPERM",
    r"Device not supported",
    r"LibraryNotLoaded",
    r"[Ii]nsufficient permissions",
    r"[Oo]peration not permitted",
    r"[Pp]rofiling is not supported",
    r"driver .* not supported",
    r"No supported GPU",
)
"""What the tools say where a machine does not let them work, in lines of their own (==...)."""


def find(name: str, env: Mapping[str, str] | None = None) -> str | None:
    """Path of a tool: on PATH, under CUDA_HOME, else in the usual folders."""
    env = os.environ if env is None else env
    folders = [env.get("PATH", "")]
    if env.get("CUDA_HOME"):
        folders += [str(Path(env["CUDA_HOME"]) / "bin"), str(Path(env["CUDA_HOME"]) / "compute-sanitizer")]
    folders += ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return next((found for folder in folders if (found := shutil.which(name, path=folder))), None)


@dataclass(frozen=True)
class Ran:
    """`returncode` is None where the limit ended it; `output` is all that it has printed until then."""

    returncode: int | None
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        return self.output[-TAIL_CHARACTERS:]


def run(words: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Ran:
    """Run a command to its end or its limit, when all that it has started ends with it."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as stream:
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
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stream.seek(0)
        output = stream.read().decode(errors="replace")
    return Ran(returncode, output, round(time.monotonic() - begin, 1))


def forbidden(output: str) -> str | None:
    """The line in which a tool says that this machine does not let it work."""
    for line in output.splitlines():
        if line.startswith("==") and any(re.search(pattern, line) for pattern in FORBIDDEN):
            return line.strip("= ")
    return None
