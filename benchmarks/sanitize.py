"""NVIDIA's compute-sanitizer over every operator's samples: memory errors, races, reads of what nobody wrote.

    python -m benchmarks.sanitize [--limit SECONDS] [--tool NAME ...] [--op NAME ...] [--json FILE]

memcheck, racecheck and initcheck of the CUDA kernels, then memcheck of Triton's as far as the time goes. Each
is a process of its own with a limit, and runs forward and backward of samples: those of benchmarks/
aligned_samples.py and the registry's, of which racecheck and initcheck, the slow ones, have one an operator;
one of each operator after another. Torch's cache is off, so that each tensor is a block of its own. What a
tool leaves of its time goes to the next. The result has a row per tool: `outcome` is clean, errors, stopped
(before it came to all samples), partial (the same of Triton's, where it came to some) or skipped, with the
`reason` where there is no tool, the machine forbids it, or no such kernels are there. Exit 1 for errors and
for what was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import limited, machine, nvidia_tools
from benchmarks.aligned_samples import aligned_samples
from benchmarks.cases import placed
from benchmarks.tables import aligned
from cisc_ext.files import write_json
from cisc_ext.ops.registry import OPERATORS, Operator

TOOL = "compute-sanitizer"
RUNS = (("memcheck", "cpp"), ("racecheck", "cpp"), ("initcheck", "cpp"), ("memcheck", "triton"))
OPTIONAL = ("memcheck", "triton")
"""May run out of time: Triton compiles meanwhile."""
SLOW = ("racecheck", "initcheck")
LIMIT_S = 40.0
DTYPES = (torch.float32, torch.bfloat16)
ERRORS_FOUND = 86  # the tool's own exit status then
_FOUND = r"^=+ (Invalid|Misaligned|Uninitialized|Error: Race|Program hit)\b"
"""Kinds of what is printed at once, also where no summary comes."""
_OF_API = "Program hit"
"""An error that a call of CUDA gave back; the tool counts it as well."""
_REPORT = "SANITIZED "
_SHARE = 0.75  # of a limit, after which no further sample begins


def samples(names: Sequence[str], few: bool = False) -> Iterator[tuple[Operator, dict[str, Any]]]:
    """The first sample of each operator, the second of each, and so on; on the CPU."""
    of_each = []
    for operator in (OPERATORS[name] for name in names):
        small = list(operator.samples())
        chosen = [*aligned_samples(operator), *(small[:1] if few else small)]
        of_each.append([(operator, sample.inputs) for sample in chosen])
    for turn in itertools.zip_longest(*of_each):
        yield from (one for one in turn if one is not None)


def call(operator: Operator, inputs: dict[str, Any], dtype: torch.dtype, device: str, impl: str) -> None:
    """Forward and backward once; what torch itself would compute on the GPU is made before, on the CPU."""
    leaves = {
        name: value.requires_grad_(name in operator.differentiable) if isinstance(value, Tensor) else value
        for name, value in placed(operator, inputs, dtype, device).items()
    }
    result = operator.function(**leaves, impl=impl)
    output = result[0] if isinstance(result, tuple) else result
    if operator.differentiable:
        start = torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape)
        wanted = [leaves[name] for name in operator.differentiable]
        torch.autograd.grad(output, wanted, start.to(output.dtype).to(device))


def here(
    names: Sequence[str], impl: str, device: str, until: float = math.inf, few: bool = False
) -> Iterator[dict[str, Any]]:
    """The samples in this process: how many calls there were, and what was left out or not reached; said
    before the first and after each, for the case that the process is stopped."""
    calls = 0
    left_out: dict[str, str] = {}
    for name in names:
        if reasons := OPERATORS[name].obstacles(impl, device, DTYPES[0]):
            left_out[name] = "; ".join(reasons)
    chosen = list(samples([name for name in names if name not in left_out], few))
    reached = 0
    while True:
        yield {"calls": calls, "samples_not_reached": len(chosen) - reached, "left_out": left_out}
        if reached == len(chosen) or time.time() > until:
            return
        for dtype in DTYPES:
            call(*chosen[reached], dtype, device, impl)
            if device == "cuda":
                torch.cuda.synchronize()
            calls += 1
        reached += 1


def reported(output: str) -> int | None:
    """How many errors or hazards the tool counts in its last line; None where it did not come to that."""
    counts = re.findall(
        r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output, flags=re.MULTILINE
    )
    return int(counts[-1]) if counts else None


def judged(tool: str, impl: str, ran: limited.Ran, limit_s: float) -> dict[str, Any]:
    """A row of the result."""
    found = re.findall(rf"^{_REPORT}(.*)$", ran.output, flags=re.MULTILINE)
    report: dict[str, Any] = json.loads(found[-1]) if found else {}
    errors = reported(ran.output)
    kinds = sorted(set(re.findall(_FOUND, ran.output, flags=re.MULTILINE)))
    why_not = nvidia_tools.forbidden(ran.output)
    calls, not_reached = report.get("calls", 0), report.get("samples_not_reached", 0)
    stopped = "partial" if (tool, impl) == OPTIONAL and calls else "stopped"
    outcome, reason = "clean", None
    if why_not is not None and not calls:
        outcome, reason, errors = "skipped", why_not, None
    elif errors:
        outcome, reason = "errors", f"{errors} reported: {', '.join(kinds) or 'of no known kind'}"
    elif ran.returncode is None and (wrong := [kind for kind in kinds if kind != _OF_API]):
        outcome, reason = "errors", f"reported before the end of {limit_s:g} s: {', '.join(wrong)}"
    elif ran.returncode is None:
        outcome = stopped
        reason = f"did not end within {limit_s:g} s, {not_reached if report else 'all'} samples not reached"
    elif ran.returncode or errors is None or not report:
        outcome, reason = "errors", f"ended with {ran.returncode} and without a summary of the samples"
    elif not_reached:
        outcome, reason = (
            stopped,
            f"{not_reached} samples not reached within {limit_s:g} s, {calls} calls made",
        )
    elif not calls and report["left_out"]:
        outcome, reason = "skipped", "; ".join(sorted(set(report["left_out"].values())))
    elif not calls:
        outcome, reason = "stopped", "no sample was reached"
    return {
        **{"tool": tool, "impl": impl, "outcome": outcome, "reason": reason, "errors": errors},
        **{"returncode": ran.returncode, "seconds": ran.seconds, **report, "tail": ran.tail},
    }


def sanitized(tool: str, impl: str, names: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run a tool, where it is there."""
    found = nvidia_tools.find(TOOL)
    if found is None:
        reason = f"{TOOL} was found neither on PATH nor under CUDA_HOME or /usr/local/cuda"
        empty = {"errors": None, "returncode": None, "seconds": 0.0, "tail": ""}
        return {"tool": tool, "impl": impl, "outcome": "skipped", "reason": reason, **empty}
    words = [found, "--tool", tool, "--error-exitcode", str(ERRORS_FOUND), "--print-limit", "20"]
    words += [sys.executable, "-m", "benchmarks.sanitize", "--here", impl, "--op", *names]
    words += ["--until", str(time.time() + _SHARE * limit_s), *(["--few"] if tool in SLOW else [])]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    return judged(tool, impl, limited.run(words, limit_s, env), limit_s)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=summary)
    tools = sorted({tool for tool, _ in RUNS})
    parser.add_argument("--tool", nargs="+", choices=tools, default=tools, metavar="NAME")
    parser.add_argument(
        "--op", nargs="+", choices=sorted(OPERATORS), default=sorted(OPERATORS), metavar="NAME"
    )
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds a tool (default: {LIMIT_S:g})")
    parser.add_argument("--here", metavar="IMPL", help="run the samples in this process, without a tool")
    parser.add_argument("--until", type=float, default=math.inf, help="time after which none begins there")
    parser.add_argument("--few", action="store_true", help="fewer samples there")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    flags = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: compute-sanitizer needs an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 1
    if flags.here:
        for report in here(flags.op, flags.here, "cuda", flags.until, flags.few):
            print(f"{_REPORT}{json.dumps(report)}", flush=True)
        return 0
    rows: list[dict[str, Any]] = []
    result = {**machine.facts("benchmarks.sanitize", arguments), "device": "cuda", "rows": rows}
    path = flags.json or machine.ROOT / "benchmarks/results/sanitizer.json"
    begin = time.monotonic()
    chosen = [(tool, impl) for tool, impl in RUNS if tool in flags.tool]
    for number, (tool, impl) in enumerate(chosen, 1):
        left_s = number * flags.limit - (time.monotonic() - begin)
        rows.append(sanitized(tool, impl, flags.op, max(round(left_s, 1), flags.limit)))
        write_json(path, result)
    print(aligned("sanitizer", rows))
    bad = [row for row in rows if row["outcome"] in ("errors", "stopped")]
    for row in bad:
        print(f"FAILED {row['tool']} of {row['impl']}: {row['reason']}\n{row['tail']}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
