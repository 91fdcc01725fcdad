"""What Nsight Compute says of the kernels: time, shares of memory's and multiprocessors' rates, registers.

    python -m benchmarks.profile [--limit SECONDS] [--op NAME ...] [--json FILE]

Calls at the sizes of `benchmarks.targets` in bfloat16, by each implementation that runs here, the row maximum
of cross_similarity first. A row per launch: `case`, `kernel`, `time_us`, `dram_percent` and `sm_percent` of
the peak rates, `registers` of a thread, `occupancy_percent`, the warps that were there of those that a
multiprocessor holds. `outcome` is measured, or skipped with the `reason` where there is no ncu or the machine
forbids it; that is no failure.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import limited, machine, nvidia_tools, targets
from benchmarks.cases import Case, implementation_call
from benchmarks.tables import aligned
from cisc_ext.files import write_json
from cisc_ext.ops.registry import OPERATORS

TOOL = "ncu"
LIMIT_S = 50.0
METRICS = {
    "time_us": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
_RANGE = re.compile(r"Domain:(Start/Stop|Push/Pop)_Range")
"""In the names of the columns of NVTX's ranges."""
_NS_PER_US = 1e3
_SHARE = 0.6  # of the limit, after which no further call begins


def chosen(names: Sequence[str], device: str, quick: bool = False) -> list[Case]:
    """What is profiled: comparisons between pixels first."""
    dense = targets.dense_case(targets.FEW_PIXELS if quick else targets.PIXELS, torch.bfloat16, device)
    rest = targets.cases(targets.SMALL if quick else targets.FULL, device)
    found = [case for case in (dense, *rest) if case.operator.name in names]
    return [case for case in found if case.dtype == torch.bfloat16]


def here(names: Sequence[str], until: float) -> None:
    """Each call once, in sight of the profiler, after a first one out of its sight."""
    for case in chosen(names, "cuda"):
        if time.time() > until:
            return
        for impl in targets.IMPLEMENTATIONS:
            if targets.obstacles(case, impl):
                continue
            call = implementation_call(case, impl)
            call()
            torch.cuda.synchronize()
            # Not push and pop: these are of one thread, and torch has another one for backward.
            named = torch.cuda.nvtx.range_start(f"{case.operator.name} {case.passes} {impl}")
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            torch.cuda.nvtx.range_end(named)


def rows_of(output: str) -> list[dict[str, Any]]:
    """The launches in what ncu prints as CSV: a head, a line of units, a line each."""
    lines = output.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    table = [line for line in lines[first:] if line.startswith('"')]
    rows = []
    for line in csv.DictReader(table):
        if not line["ID"]:
            continue  # units
        of_range = [value for key, value in line.items() if key and _RANGE.search(key)]
        case = re.search(r"(\w+ (?:forward|backward|both) (?:cpp|triton))", " ".join(filter(None, of_range)))
        row: dict[str, Any] = {"case": case[1] if case else None, "kernel": line["Kernel Name"]}
        for key, metric in METRICS.items():
            text = (line.get(metric) or "").replace(",", "")
            try:
                row[key] = round(float(text), 2)
            except ValueError:
                row[key] = None
        if row["time_us"] is not None:
            row["time_us"] = round(row["time_us"] / _NS_PER_US, 2)
        rows.append(row)
    return rows


def profiled(names: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Outcome, reason and rows."""
    found = nvidia_tools.find(TOOL)
    if found is None:
        reason = f"{TOOL} was found neither on PATH nor under CUDA_HOME or /usr/local/cuda"
        return {"outcome": "skipped", "reason": reason, "rows": []}
    words = [found, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    words += ["--profile-from-start", "off", "--nvtx", "--metrics", ",".join(METRICS.values())]
    words += [sys.executable, "-m", "benchmarks.profile", "--here", "--op", *names]
    words += [
        "--until",
        str(time.time() + _SHARE * limit_s),
    ]  # what was profiled is printed when the program ends
    ran = limited.run(words, limit_s)
    rows = rows_of(ran.output)
    facts = {"returncode": ran.returncode, "seconds": ran.seconds, "tail": ran.tail, "rows": rows}
    if rows:
        return {"outcome": "measured", "reason": None, **facts}
    why_not = nvidia_tools.forbidden(ran.output)
    if why_not is not None:
        return {"outcome": "skipped", "reason": why_not, **facts}
    if ran.returncode is None:
        return {"outcome": "stopped", "reason": f"did not end within {limit_s:g} s", **facts}
    return {"outcome": "failed", "reason": f"ended with {ran.returncode}, and no launches", **facts}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=summary)
    parser.add_argument(
        "--op", nargs="+", choices=sorted(OPERATORS), default=sorted(OPERATORS), metavar="NAME"
    )
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds (default: {LIMIT_S:g})")
    parser.add_argument("--here", action="store_true", help="make the calls in this process, without ncu")
    parser.add_argument("--until", type=float, default=math.inf, help="time after which no call begins there")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    flags = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: ncu needs an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 1
    if flags.here:
        here(flags.op, flags.until)
        return 0
    found = profiled(flags.op, flags.limit)
    path = flags.json or machine.ROOT / "benchmarks/results/profile.json"
    write_json(path, {**machine.facts("benchmarks.profile", arguments), "device": "cuda", **found})
    print(aligned("profile", found["rows"]) if found["rows"] else f"{found['outcome']}: {found['reason']}")
    if found["outcome"] in ("stopped", "failed"):
        print(f"FAILED {found['reason']}\n{found['tail']}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
