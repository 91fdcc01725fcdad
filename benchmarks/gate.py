"""What must hold on a machine with an NVIDIA GPU.

    python -m benchmarks.gate --out DIR [--only tests,targets,sanitizer,step,first_call,kernels,profile]
        [--within SECONDS]

tests: all tests that need a GPU: results, runs that are alike in every bit, CUDA graphs, memory.
targets: the rates and times that the kernels are to reach.
sanitizer: compute-sanitizer over the operators' samples. step: a training step.
first_call: the first call of each operator in Triton, with nothing compiled before.
kernels: every operator by every implementation against its rivals, at the published crops, as far as its time
goes; it tests them itself unless "tests" has just passed. profile: Nsight Compute on the kernels.

Each part is a process of its own with a time limit. DIR/gate.json is rewritten as each ends, DIR/PART.log
keeps its output. Exit 0 if every part succeeded, 1 if one failed or there is no GPU. The parts run in this
order, the most important first; all of them end within 8 minutes, and what does not begin until then failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import limited, machine
from cisc_ext.files import write_json

WITHIN_S = 480.0
_LEAST_S = 5.0  # in which a part could end

PARTS: dict[str, tuple[tuple[str, ...], int]] = {
    "tests": (("benchmarks.gpu_tests", "--limit", "220", "--out", "{out}"), 240),
    "targets": (("benchmarks.targets", "--json", "{out}/targets_cuda.json"), 90),
    "sanitizer": (("benchmarks.sanitize", "--limit", "30", "--json", "{out}/sanitizer.json"), 150),
    "step": (
        ("benchmarks.step", "--device", "cuda", "--repeats", "20", "--json", "{out}/step_cuda.json"),
        150,
    ),
    "first_call": (("benchmarks.first_call", "--json", "{out}/first_call.json"), 90),
    "kernels": (
        (
            *("benchmarks.kernels", "--device", "cuda", "--budget", "0.1", "--stop-after", "50", "{tested}"),
            *("--workload", "pascal", "cityscapes", "cityscapes_all_classes", "cityscapes_ohem"),
            *("n16384_dense_max", "n16384_dense_topk", "n16384_dense_softmax", "n4096_dense_mean"),
            *("cityscapes_labels_max", "--json", "{out}/kernels_cuda.json"),
        ),
        120,
    ),
    "profile": (("benchmarks.profile", "--limit", "35", "--json", "{out}/profile.json"), 45),
}
"""Module with arguments to run, and its time limit in seconds; "{tested}" is --tested once "tests" passed."""


def run_part(name: str, out: Path, tested: bool = False, left_s: float = WITHIN_S) -> dict[str, Any]:
    """Run one part to its end or limit; its return code is null when it was stopped or had no time."""
    words, limit_s = PARTS[name]
    limit_s = min(limit_s, int(left_s))
    filled = [word.format(out=out.resolve(), tested="--tested" if tested else "") for word in words]
    module = [word for word in filled if word]
    head = {"name": name, "command": shlex.join(["python", "-m", *module])}
    if left_s < _LEAST_S:
        why = "not begun: the time of the whole is over"
        return {**head, "returncode": None, "limit_s": 0, "seconds": 0.0, "tail": why}
    ran = limited.run([sys.executable, "-m", *module], limit_s, log=out / f"{name}.log")
    return {
        **head,
        "returncode": ran.returncode,
        "limit_s": limit_s,
        "seconds": ran.seconds,
        "tail": ran.tail,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=summary)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    parser.add_argument(
        "--within", type=float, default=WITHIN_S, help=f"seconds of all parts (default: {WITHIN_S:g})"
    )
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
    begin = time.monotonic()
    for name in names:
        tested = any(part["name"] == "tests" and part["returncode"] == 0 for part in parts)
        left_s = settings.within - (time.monotonic() - begin)
        parts.append(run_part(name, settings.out, tested, left_s))
        result["passed"] = len(parts) == len(names) and all(part["returncode"] == 0 for part in parts)
        write_json(settings.out / "gate.json", result)
        state = "passed" if parts[-1]["returncode"] == 0 else "FAILED"
        print(f"{name}: {state} in {parts[-1]['seconds']} s", flush=True)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
