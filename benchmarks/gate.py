"""What must hold on a machine with an NVIDIA GPU.

    python -m benchmarks.gate --out DIR [--only tests,step]

Each part is a process of its own with a time limit. DIR/gate.json is rewritten as each ends, DIR/PART.log
keeps its output. Exit 0 if every part succeeded, 1 if one failed or there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from cisc_ext.files import write_json

TAIL_CHARACTERS = 4000

PARTS: dict[str, tuple[tuple[str, ...], int]] = {
    "tests": (("pytest", "-m", "cuda", "-q", "--junitxml", "{out}/tests.xml"), 1200),
    "step": (
        ("benchmarks.step", "--device", "cuda", "--repeats", "20", "--json", "{out}/step_cuda.json"),
        600,
    ),
}
"""Module with arguments to run, and its time limit in seconds."""


def run_part(name: str, out: Path) -> dict[str, Any]:
    """Run one part to its end or limit; its return code is null when it was stopped."""
    words, limit_s = PARTS[name]
    module = [word.format(out=out.resolve()) for word in words]
    log = out / f"{name}.log"
    begin = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=machine.ROOT,
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
    return {
        "name": name,
        "command": shlex.join(["python", "-m", *module]),
        "returncode": returncode,
        "limit_s": limit_s,
        "seconds": round(time.monotonic() - begin, 1),
        "tail": log.read_text(errors="replace")[-TAIL_CHARACTERS:],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=summary)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    settings = parser.parse_args(arguments)
    names = settings.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: must be of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
    if not torch.cuda.is_available():
        print("error: the GPU gate needs an NVIDIA GPU that torch can use, found none", file=sys.stderr)
        return 1
    settings.out.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Any]] = []
    result = {**machine.facts("benchmarks.gate", arguments), "passed": False, "parts": parts}
    for name in names:
        parts.append(run_part(name, settings.out))
        result["passed"] = len(parts) == len(names) and all(part["returncode"] == 0 for part in parts)
        write_json(settings.out / "gate.json", result)
        state = "passed" if parts[-1]["returncode"] == 0 else "FAILED"
        print(f"{name}: {state} in {parts[-1]['seconds']} s", flush=True)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
