"""What must hold on a machine with an NVIDIA GPU.

    python -m benchmarks.gate --out DIR [--only PART,PART] [--within SECONDS] [--triton-only]

tests: all tests that need a GPU: results, runs that are alike in every bit, CUDA graphs, memory.
targets: the rates and times that the kernels are to reach. sweeps: those of pixel-level similarity in CUDA.
full_step: a training step at full size, and what it is to reach. step: smaller ones. sanitizer:
compute-sanitizer over the operators' samples.
first_call: the first call of each operator in Triton, with nothing compiled before.
kernels: every operator by every implementation against its rivals, at the published crops, as far as its time
goes; it tests them itself unless "tests" has just passed. profile: Nsight Compute on the kernels.

Each part is a process of its own with a time limit; what it measures is a JSON in DIR. As each ends,
DIR/gate.json is rewritten, and DIR/logs.tar.gz with what all have printed, the tests' XML, sanitizer.json and
first_call.json: eight files in all. The parts run in this order, the most important first, and all end within
8 minutes: none takes from those after it what they need at the least, and where there is less, each has its
share. Exit 0 if every part succeeded; 1 if one failed or did not begin, if there is no GPU, or if the library
has no CUDA kernels that run on it, unless --triton-only is given, which leaves out "sweeps".
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks import limited, machine, sanitize
from cisc_ext.files import atomic_write, write_json
from cisc_ext.ops.registry import OPERATORS

WITHIN_S = 480.0
LOGS = "logs.tar.gz"
_LEAST_S = 5.0  # in which a part could end


@dataclass(frozen=True)
class Part:
    """A module with its arguments, and the seconds that it may take at the most, and needs at the least.

    In the arguments "{out}" is the folder of the results and "{logs}" that of what is archived, "{tested}" is
    --tested once "tests" passed, "{impl}" is --impl=triton for Triton alone, and "{limit}" the limit of each
    of the `runs` of which it consists, once `start_s` are taken off for its start and its own end.
    """

    words: tuple[str, ...]
    most_s: int
    least_s: int
    start_s: int = 0
    runs: int = 1
    cuda_only: bool = False
    """Whether it is of the CUDA kernels alone."""

    def limit_of_run(self, limit_s: float) -> int:
        return max(1, int((limit_s - self.start_s) / self.runs))


PARTS: dict[str, Part] = {
    "tests": Part(("benchmarks.gpu_tests", "--limit", "{limit}", "--out", "{logs}"), 240, 170, start_s=15),
    "targets": Part(("benchmarks.targets", "{impl}", "--json", "{out}/targets_cuda.json"), 90, 45),
    "sweeps": Part(
        ("benchmarks.sweeps", "--stop-after", "{limit}", "--json", "{out}/sweeps_cuda.json"),
        most_s=110,
        least_s=60,
        start_s=20,
        cuda_only=True,
    ),
    "full_step": Part(
        (
            *("benchmarks.step", "--device", "cuda", "--full", "full", "--full-alone"),
            *("--json", "{out}/full_step_cuda.json"),
        ),
        most_s=120,
        least_s=50,
    ),
    "step": Part(
        (
            *("benchmarks.step", "--device", "cuda", "--repeats", "20", "--full", "none"),
            *("--json", "{out}/step_cuda.json"),
        ),
        most_s=60,
        least_s=20,
    ),
    "sanitizer": Part(
        ("benchmarks.sanitize", "--limit", "{limit}", "--json", "{logs}/sanitizer.json"),
        most_s=150,
        least_s=45,
        start_s=20,
        runs=len(sanitize.RUNS),
    ),
    "first_call": Part(("benchmarks.first_call", "--json", "{logs}/first_call.json"), 90, 25),
    "kernels": Part(
        (
            *("benchmarks.kernels", "--device", "cuda", "--budget", "0.1", "--stop-after", "{limit}"),
            *("{tested}", "--workload", "pascal", "cityscapes", "cityscapes_all_classes", "cityscapes_ohem"),
            *("n16384_dense_max", "n16384_dense_topk", "n16384_dense_softmax", "n4096_dense_mean"),
            *("cityscapes_labels_max", "--json", "{out}/kernels_cuda.json"),
        ),
        most_s=120,
        least_s=40,
        start_s=25,
    ),
    "profile": Part(
        ("benchmarks.profile", "--limit", "{limit}", "--json", "{out}/profile.json"), 60, 25, start_s=15
    ),
}


def limit_of(name: str, later: Sequence[str], left_s: float) -> int:
    """Seconds of a part: what is left but for what the later ones need, its own end included; where there is
    too little for all, its share."""
    part = PARTS[name]
    kept_s = sum(PARTS[one].least_s for one in later)
    share_s = left_s * part.least_s / (part.least_s + kept_s)
    return int(min(part.most_s, max(left_s - kept_s, share_s) - limited.GRACE_S))


def run_part(name: str, limit: int, out: Path, logs: Path, tested: bool, triton_only: bool) -> dict[str, Any]:
    """Run one part to its end or limit; its return code is null when it was stopped or had no time."""
    part = PARTS[name]
    filling = {
        **{"out": out.resolve(), "logs": logs, "limit": part.limit_of_run(limit)},
        **{"tested": "--tested" if tested else "", "impl": "--impl=triton" if triton_only else ""},
    }
    module = [word for word in (word.format(**filling) for word in part.words) if word]
    head = {"name": name, "command": shlex.join(["python", "-m", *module])}
    if limit < _LEAST_S:
        why = "not begun: the time of the whole is over"
        return {**head, "returncode": None, "limit_s": 0, "seconds": 0.0, "tail": why}
    env = {**os.environ, **({"CISC_CUDA": "0"} if triton_only else {})}  # read by the tests
    ran = limited.run([sys.executable, "-m", *module], limit, env, logs / f"{name}.log")
    return {
        **head,
        "returncode": ran.returncode,
        "limit_s": limit,
        "seconds": ran.seconds,
        "tail": ran.tail,
    }


def archive(folder: Path, path: Path) -> None:
    """The files of a folder, as one that is compressed."""

    def write(stream: BinaryIO) -> None:
        with tarfile.open(fileobj=stream, mode="w:gz") as tar:
            for one in sorted(folder.iterdir()):
                tar.add(one, one.name)

    atomic_write(path, write)


def lacking() -> dict[str, str]:
    """The operators that have no CUDA kernel that runs here, and why."""
    reasons = {name: operator.obstacles("cpp", "cuda") for name, operator in sorted(OPERATORS.items())}
    return {name: "; ".join(those) for name, those in reasons.items() if those}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=summary)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    parser.add_argument(
        "--within", type=float, default=WITHIN_S, help=f"seconds of all parts (default: {WITHIN_S:g})"
    )
    parser.add_argument("--triton-only", action="store_true", help="go on where no CUDA kernels can run")
    settings = parser.parse_args(arguments)
    names = settings.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: must be of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
    names = [name for name in names if not (settings.triton_only and PARTS[name].cuda_only)]
    if not torch.cuda.is_available():
        print("error: the GPU gate needs an NVIDIA GPU that torch can use, found none", file=sys.stderr)
        return 1
    if not settings.triton_only and (without := lacking()):
        why = "; ".join(sorted(set(without.values())))
        print(f"error: no CUDA kernel of {', '.join(without)} ({why}); see --triton-only", file=sys.stderr)
        return 1
    begin = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Any]] = []
    result = {**machine.facts("benchmarks.gate", arguments), "passed": False, "parts": parts}
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        for number, name in enumerate(names, 1):
            tested = any(part["name"] == "tests" and part["returncode"] == 0 for part in parts)
            limit = limit_of(name, names[number:], settings.within - (time.monotonic() - begin))
            try:
                parts.append(run_part(name, limit, settings.out, logs, tested, settings.triton_only))
            finally:
                archive(logs, settings.out / LOGS)
            result["passed"] = number == len(names) and all(part["returncode"] == 0 for part in parts)
            write_json(settings.out / "gate.json", result)
            state = "passed" if parts[-1]["returncode"] == 0 else "FAILED"
            print(f"{name}: {state} in {parts[-1]['seconds']} s", flush=True)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
