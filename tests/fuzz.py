"""Fuzzes the compiled operators under AddressSanitizer and UBSan.

    python tests/fuzz.py [--cases N] [--seed S] [--isa portable avx2 ...] [--jobs N] [--json FILE]
    python tests/fuzz.py --only SEED [--isa avx2]
    python tests/fuzz.py --simt [--isa forward reverse shuffle] ...

Builds csrc with CISC_SANITIZE=1 into build/sanitized and runs cases S .. S + N - 1 in processes that load it.
A case is a pure function of its seed and the list of operators; the seed also chooses the instruction set
(CISC_ISA). With --simt it is the CUDA kernels that run, simulated on the CPU (CISC_SIMT=1), and the seed
chooses the order of a block's threads (CISC_SIMT_ORDER) instead, and the chip (CISC_SIMT_CHIP). Each failure
is printed with its seed; a process that a sanitizer ends counts as one, and another goes on after it.
Exit 0 if nothing failed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ISAS = {  # name: what the processor must have
    "portable": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_bf16": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"),
}
ORDERS = ("forward", "reverse", "shuffle")
"""In which a simulated block's threads run."""
CHIPS = ("75", "80", "90")
"""Compute capabilities that a simulated GPU says it has."""
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
OPTIONS = {
    # Leaks: Python's own. Torch refuses what malloc refuses; without a limit a huge size would be tried.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
CHUNK = 5000
"""Cases of one process at most."""
SHOWN, KEPT = 20, 500
"""Failures printed, and written to the summary."""
REPORT_CHARACTERS = 6000
REPORT_LINES = 16
CASE_LIMIT_S = 120
WORKER = ("-c", "import fuzz; fuzz.work()")


def isas_here() -> tuple[str, ...]:
    """The instruction sets that this processor has kernels for."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return tuple(name for name, needed in ISAS.items() if flags.issuperset(needed))


def preloads(compiler: str = "g++") -> list[str]:
    """The sanitizers' libraries of the compiler; empty where one is missing."""
    if shutil.which(compiler) is None:
        return []
    paths = []
    for name in LIBRARIES:
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(done.stdout.strip())
        if done.returncode or not path.is_absolute() or not path.is_file():
            return []
        paths.append(str(path))
    return paths


def environment(package: Path, sanitized: bool = True) -> dict[str, str]:
    """Of a process that loads `cisc_ext` from `package`, under the sanitizers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    kept["PYTHONPATH"] = os.pathsep.join(map(str, dict.fromkeys([package, ROOT / "tests", ROOT])))
    return kept | OPTIONS | {"LD_PRELOAD": " ".join(preloads())} if sanitized else kept


def build(folder: Path, simt: bool = False) -> None:
    """A sanitized copy of the package in `folder`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    env |= {"CISC_SANITIZE": "1", "CISC_CUDA": "0", "CISC_SIMT": str(int(simt))}
    shutil.rmtree(folder / "cisc_ext", ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"fuzz: the sanitized build failed:\n{done.stdout[-REPORT_CHARACTERS:]}")


@dataclass(frozen=True)
class Task:
    """Seeds of one process."""

    seeds: tuple[int, ...]
    isa: str
    impl: str
    operators: tuple[str, ...]
    package: str


@dataclass
class Tally:
    """What ran and what failed."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.failures += other.failures


def fuzzed(impl: str) -> tuple[str, ...]:
    """Operators that have this implementation, each of which must have cases."""
    from fuzzcases import VALUES

    from cisc_ext.ops.registry import OPERATORS

    names = tuple(sorted(n for n, o in OPERATORS.items() if any(i.name == impl for i in o.implementations)))
    if impl == "cpp" and (missing := set(names) - set(VALUES)):
        raise AssertionError(f"no cases for {', '.join(sorted(missing))}: add them to tests/fuzzcases.py")
    return tuple(name for name in names if name in VALUES)


def run_case(seed: int, operators: tuple[str, ...], impl: str) -> tuple[list[str], dict[str, Any] | None]:
    """What is counted of a case, and its failure if it failed."""
    import torch
    from fuzzcases import make
    from fuzzjudge import describe, judge

    case, counted = None, []
    if os.environ.get("CISC_SIMT_ORDER"):
        # Each order of threads meets each chip.
        os.environ["CISC_SIMT_CHIP"] = chip = CHIPS[seed // len(ORDERS) % len(CHIPS)]
        counted = [f"chip {chip}"]
    try:
        case = make(seed, operators)
        arguments = describe(case.inputs)
        judge(case, impl)
        failure = None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if case is None:
            return [], {"seed": seed, "message": message}
        failure = {"seed": seed, "operator": case.operator, "kind": case.kind, "what": case.what}
        failure |= {"arguments": arguments, "threads": case.threads, "message": message}
    first = next(iter(case.inputs.values()))
    dtype = str(first.dtype).removeprefix("torch.") if isinstance(first, torch.Tensor) else "none"
    return [*counted, f"operator {case.operator}", f"kind {case.kind}", f"dtype {dtype}"], failure


def work(run: Callable[..., tuple[list[str], dict[str, Any] | None]] = run_case) -> None:
    """A process of its own: reads a `Task` as JSON; prints a line of JSON before and after each case."""
    task = Task(**json.loads(sys.stdin.readline()))
    from cisc_ext.ops import _library

    loaded = _library.PATH.parents[1]
    if loaded != Path(task.package).resolve() or (task.impl == "cpp" and not _library.LOADED):
        sys.exit(f"fuzz: loaded {loaded} instead of {task.package}: {_library.REASON}")
    for seed in task.seeds:
        print(json.dumps({"begins": seed}), flush=True)
        counted, failure = run(seed, tuple(task.operators), task.impl)
        print(json.dumps({"ends": seed, "counted": counted, "failure": failure}), flush=True)


def supervise(task: Task, env: Mapping[str, str], worker: Sequence[str] = WORKER) -> Tally:
    """Run a task; where its process dies, note the case that ran, and go on behind it."""
    tally = Tally()
    seeds = task.seeds
    # Threads that wait by spinning would slow down the other processes.
    variable = "CISC_SIMT_ORDER" if task.isa in ORDERS else "CISC_ISA"
    settings = {**env, variable: task.isa, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    while seeds:
        limit_s = CASE_LIMIT_S + len(seeds)
        process = subprocess.Popen(
            [sys.executable, *worker],
            cwd=ROOT / "tests",  # Python 3.10 looks here first: not where another cisc_ext is
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            output, report = process.communicate(json.dumps({**vars(task), "seeds": seeds}) + "\n", limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, report = process.communicate()
            report += f"\nstopped after {limit_s} s"
        begun = ended = None
        for line in (json.loads(text) for text in output.splitlines() if text.startswith('{"')):
            begun, ended = line.get("begins", begun), line.get("ends")
            if "ends" in line:
                tally.counts.update([*line["counted"], "cases", f"isa {task.isa}"])
                if line["failure"]:
                    tally.failures.append({"isa": task.isa, **line["failure"]})
        if begun is None:
            sys.exit(f"fuzz: a process did not start:\n{report[-REPORT_CHARACTERS:]}")
        if begun != ended:
            message = f"process ended with {process.returncode}\n{_shorten(report)}"
            tally.failures.append({"seed": begun, "isa": task.isa, "message": message})
            tally.counts.update(["cases", f"isa {task.isa}", "kind ended the process"])
        seeds = seeds[seeds.index(begun) + 1 :]
    return tally


def _shorten(report: str) -> str:
    """What a sanitizer says with the frames of our own sources, or else the last lines."""
    lines = [line.replace(f"{ROOT}/", "") for line in report.strip().splitlines()]
    speaks = [
        i for i, line in enumerate(lines) if "ERROR: AddressSanitizer" in line or "runtime error:" in line
    ]
    if speaks:
        ours = [
            line for line in lines[speaks[0] + 1 :] if " csrc/" in line or not line.lstrip().startswith("#")
        ]
        lines = [lines[speaks[0]], *ours[: REPORT_LINES - 1]]
    return "\n".join(line[:200] for line in lines[-REPORT_LINES:])


def plan(settings: argparse.Namespace, package: Path) -> list[Task]:
    """Seeds by instruction set, cut so that all processors have work."""
    seeds = (
        [settings.only] if settings.only is not None else range(settings.seed, settings.seed + settings.cases)
    )
    tasks = []
    for k, isa in enumerate(settings.isa):
        mine = [seed for seed in seeds if settings.only is not None or seed % len(settings.isa) == k]
        size = min(CHUNK, -(-len(mine) * len(settings.isa) // (settings.jobs * 2)) or 1)
        for start in range(0, len(mine), size):
            seeds_here = tuple(mine[start : start + size])
            tasks.append(Task(seeds_here, isa, settings.impl, tuple(settings.operators), str(package)))
    return tasks


def show(failure: dict[str, Any]) -> None:
    head = " ".join(f"{key} {failure[key]}" for key in ("seed", "isa", "operator", "kind") if key in failure)
    print(f"FAILED {head}", file=sys.stderr)
    for key in ("what", "arguments", "threads", "message"):
        if key in failure:
            print(f"  {key}: {failure[key]}", file=sys.stderr)


def summary(
    settings: argparse.Namespace, arguments: Sequence[str], tally: Tally, seconds: float
) -> dict[str, Any]:
    from benchmarks import machine

    def by(word: str) -> dict[str, int]:
        chosen = {
            k.removeprefix(f"{word} "): n for k, n in sorted(tally.counts.items()) if k.startswith(f"{word} ")
        }
        return chosen

    facts = machine.facts("tests.fuzz", arguments)
    return {
        **facts,
        "command": facts["command"].replace("-m tests.fuzz", "tests/fuzz.py"),
        "sanitizers": ["address", "undefined", "float-cast-overflow"] if settings.sanitized else [],
        "implementation": settings.impl,
        "first_seed": settings.seed,
        "cases": tally.counts["cases"],
        "operators": by("operator"),
        "orders" if settings.simt else "instruction_sets": by("isa"),
        **({"chips": by("chip")} if settings.simt else {}),
        "kinds": by("kind"),
        "dtypes": by("dtype"),
        "seconds": round(seconds, 1),
        "failures": len(tally.failures),
        "failed": tally.failures[:KEPT],
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="python tests/fuzz.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default: 0)")
    parser.add_argument("--only", type=int, metavar="SEED", help="one case, with each instruction set")
    parser.add_argument("--simt", action="store_true", help="the CUDA kernels, simulated on the CPU")
    parser.add_argument(
        "--isa",
        nargs="+",
        choices=(*ISAS, *ORDERS),
        help="default: all that are here, or with --simt all orders",
    )
    parser.add_argument("--impl", default="cpp", help="implementation to run (default: cpp)")
    parser.add_argument("--operators", nargs="+", help="default: all that have the implementation")
    parser.add_argument("--jobs", type=int, default=cores, help="processes at once (default: one per core)")
    parser.add_argument("--build", type=Path, help="folder of the build (default: build/sanitized)")
    parser.add_argument(
        "--plain",
        dest="sanitized",
        action="store_false",
        help="run the package as installed, without sanitizers",
    )
    parser.add_argument("--json", type=Path, help="write a summary")
    settings = parser.parse_args(arguments)
    if settings.cases < 1 or settings.jobs < 1:
        parser.error("--cases and --jobs must be at least 1")
    if settings.simt and not settings.sanitized:
        parser.error("--simt needs the sanitized build")
    settings.isa = settings.isa or (ORDERS if settings.simt else isas_here())
    if not set(settings.isa) <= set(ORDERS if settings.simt else ISAS):
        parser.error(f"--isa must be of {', '.join(ORDERS if settings.simt else ISAS)} here")
    folder = "sanitized_simt" if settings.simt else "sanitized"
    settings.build = settings.build or ROOT / "build" / folder
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = parse(arguments)
    sys.path[:0] = [path for path in (str(ROOT / "tests"), str(ROOT)) if path not in sys.path]
    if settings.sanitized and not preloads():
        print(f"error: needs g++ with {', '.join(LIBRARIES)}", file=sys.stderr)
        return 1
    settings.operators = settings.operators or list(fuzzed(settings.impl))
    begin = time.monotonic()
    package = settings.build.resolve() if settings.sanitized else ROOT
    if settings.sanitized:
        build(package, settings.simt)
    tasks = plan(settings, package)
    run = partial(supervise, env=environment(package, settings.sanitized))
    tally, reported = Tally(), 0
    with ThreadPoolExecutor(settings.jobs) as pool:
        for part in pool.map(run, tasks):
            tally.add(part)
            for failure in tally.failures[reported:SHOWN]:
                show(failure)
            reported = len(tally.failures)
            print(
                f"{tally.counts['cases']} cases, {reported} failed, {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    if settings.json is not None:
        from cisc_ext.files import write_json

        write_json(settings.json, summary(settings, arguments, tally, time.monotonic() - begin))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
