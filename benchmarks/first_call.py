"""How long the first call of each operator takes in Triton, with nothing compiled before.

    python -m benchmarks.first_call [--op NAME ...] [--limit SECONDS] [--json FILE]

Each operator runs in a process of its own with an empty Triton cache, once for each of its modes and
reductions, forward and then backward. `start_s` is what Triton takes once on any kernel: its import, and the
C of its driver, which are not counted with the first call. Exit 1 if a call takes longer than the limit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.tables import aligned
from cisc_ext.files import write_json
from cisc_ext.ops.registry import OPERATORS, Workload

LIMIT_S = 2.0
_PROCESS_S = 120


def modes(name: str) -> Iterator[Workload]:
    """The first workload of each mode and reduction."""
    seen = set()
    for workload in OPERATORS[name].workloads():
        if (workload.mode, workload.reduction) not in seen:
            seen.add((workload.mode, workload.reduction))
            yield workload


def _seconds(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - begin, 3), result


def _start() -> None:
    """Import Triton, and have it compile and load its driver."""
    driver = importlib.import_module("triton.runtime").driver
    driver.active.get_current_target()
    _ = driver.active.utils


def first_calls(name: str, device: str, impl: str = "triton") -> Iterator[dict[str, Any]]:
    """Seconds of the first forward and backward call of each mode, in this process."""
    operator = OPERATORS[name]
    _seconds(lambda: torch.zeros(1, device=device).sum(), device)  # the device itself
    start_s = _seconds(_start, device)[0] if device == "cuda" else 0.0
    for workload in modes(name):
        inputs: dict[str, Any] = {
            key: value.to(device).requires_grad_(key in operator.differentiable)
            if isinstance(value, Tensor)
            else value
            for key, value in workload.make().items()
        }
        forward_s, result = _seconds(lambda x=inputs: operator.function(**x, impl=impl), device)  # type: ignore[misc]
        row = {"op": name, "workload": workload.name, "start_s": start_s}
        row |= {"forward_s": forward_s, "backward_s": None}
        if operator.differentiable:
            value = result[0] if isinstance(result, tuple) else result
            cotangent = torch.ones_like(value)
            row["backward_s"], _ = _seconds(lambda v=value, c=cotangent: v.backward(c), device)  # type: ignore[misc]
        yield row


def apart(name: str) -> list[dict[str, Any]]:
    """The same in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.first_call", "--here", "--op", name],
            cwd=machine.ROOT,
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            timeout=_PROCESS_S,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{name}: its process ended with {done.returncode}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def too_long(rows: Sequence[dict[str, Any]], limit_s: float) -> list[str]:
    """A line for each call above the limit."""
    return [
        f"{row['op']} {row['workload']} {key.removesuffix('_s')}: {row[key]} s, the limit is {limit_s:g} s"
        for row in rows
        for key in ("forward_s", "backward_s")
        if row[key] is not None and row[key] > limit_s
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=summary)
    parser.add_argument(
        "--op", nargs="+", choices=sorted(OPERATORS), default=sorted(OPERATORS), metavar="NAME"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help=f"seconds of a call (default: {LIMIT_S:g})"
    )
    parser.add_argument("--here", action="store_true", help="in this process; print JSON")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    flags = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: first calls are those on an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 1
    if flags.here:
        print(json.dumps([row for name in flags.op for row in first_calls(name, "cuda")]))
        return 0
    rows: list[dict[str, Any]] = []
    result = {
        **machine.facts("benchmarks.first_call", arguments),
        **{"device": "cuda", "limit_s": flags.limit, "rows": rows},
    }
    path = flags.json or machine.ROOT / "benchmarks/results/first_call.json"
    for name in flags.op:
        rows += apart(name)
        write_json(path, result)
    print(aligned("first_call", rows))
    lines = too_long(rows, flags.limit)
    for line in lines:
        print(f"TOO LONG {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
