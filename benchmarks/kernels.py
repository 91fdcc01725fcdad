"""Every operator x implementation x workload of the registry, against its rivals.

    python -m benchmarks.kernels [--device cpu|cuda] [--op NAME ...] [--workload NAME ...] [--dtype NAME ...]
        [--pass NAME ...] [--impl NAME ...] [--threads N] [--budget SECONDS] [--stop-after SECONDS]
        [--json FILE] [--quick]

Refuses to run while the tests of these operators fail. Triton is measured on a GPU only. A contender is
tried in a process of its own first, which counts its memory and ends it at a limit; then its result must
agree with the reference's in float32; then all are timed in turn, each from a flushed cache. --quick and
--stop-after leave out the rivals that are slow to start.

Columns: time_ms, the median, and time_min_ms, the least, of `runs`; tflops and gbps, the least operations and
bytes the call needs (`Operator.cost`) over the median; share_of_ceiling, the larger of their times at the
machine's rates over the median; extra_mib, the most held beyond inputs, outputs and gradients, for
"backward" together with forward; naive_mib, what the naive expression must hold; speedup, the median over the
rounds of rival time / own time; what takes long runs in fewer (`runs`, `rival_runs`). `rivals_left_out` has
the reason for each rival that is not there, `left_out` that for each implementation; `winners` names the
fastest implementation of each case. Passes:
"forward"; "backward", autograd.grad from a graph that is there; "both", for losses whose gradient is made in
forward.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, machine, measure, rivals
from benchmarks.cases import (
    Call,
    CannotRunError,
    Case,
    DisagreementError,
    Result,
    expected,
    implementation_call,
    make_case,
    narrowed,
    off,
)
from benchmarks.tables import aligned
from cisc_ext.files import write_json
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS, PASSES

DTYPES = ("float32", "bfloat16", "float16")
OWN_LIMIT_S = 60.0
"""Longest run of an implementation."""
_START_S = 30.0  # of a trial beyond its runs: imports, compilers
_MEMORY_SHARE = 0.6
_COMPILED_BYTES = 2**30  # that the naive expression holds
_SLOW_TO_START = ("compile", "keops", "flex_attention", "flashlib")
_RIVAL_PACKAGES = ("faiss-cpu", "pykeops", "flashlib", "liger-kernel", "cut-cross-entropy")


@dataclass(frozen=True)
class Settings:
    device: str
    budget_s: float
    quick: bool
    threads: int
    in_haste: str | None = None
    """The flag by which rivals that are slow to start are left out."""


def red(ops: Sequence[str], device: str = "cpu") -> str | None:
    """Why the operators' tests on a device fail; None where they pass. On the CPU Triton is not measured."""
    files = ["tests/test_golden.py", "tests/test_ops.py"]
    chosen = " or ".join(ops)
    only = ["-k", chosen, "-m", "cuda"] if device == "cuda" else ["-k", f"({chosen}) and not triton"]
    command = ["-m", "pytest", "-x", "-q", *files, *only]
    done = subprocess.run(
        [sys.executable, *command], cwd=machine.ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.M)
    return (failed or [f"pytest ends with {done.returncode}"])[0][:200]


Key = tuple[str, str, str, str, str]
"""Operator, workload, dtype, pass and device of a case, as another process can make it."""


@dataclass(frozen=True)
class Contender:
    """An implementation or a rival, with its chunk; `call` makes it, in any process."""

    name: str
    rival: bool
    chunk: int = 0

    def call(self, case: Case, *, whole: bool = False) -> Call:
        if not self.rival:
            return implementation_call(case, self.name, whole=whole)
        return rivals.named(case, self.name).make(case, whole, self.chunk)


_cached_case = lru_cache(maxsize=1)(make_case)


def trial(key: Key, contender: Contender, threads: int, limit_s: float) -> dict[str, Any]:
    """Seconds of a run, and the most memory of one in MiB unless that took more than `limit_s`; in a process
    where `measure` is exact."""
    torch.set_num_threads(threads)
    case = _cached_case(*key)
    call = contender.call(case, whole=True)
    few = None if contender.rival else narrowed(case)
    first_s = measure.timed_s(call if few is None else contender.call(few, whole=True))  # loads and compiles
    if few is None and first_s > limit_s:
        return {"seconds": first_s, "extra_mib": None}
    seconds, extra = _counted(call, case.device)
    if few is not None and seconds < measure.SLOW_S:  # what is kept for the whole size is there by now
        seconds, extra = _counted(call, case.device)
    return {"seconds": seconds if few is not None else min(first_s, seconds), "extra_mib": extra}


def _counted(call: Call, device: str) -> tuple[float, float | None]:
    """Seconds of a run, and its most memory in MiB where that can be measured."""
    seconds: list[float] = []

    def timed() -> Result:
        begin = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        return result

    if device != "cuda" and not measure.can_measure():
        timed()
        return seconds[0], None
    extra = measure.peak_extra_mib(timed, device=device, warm_up=False)
    return seconds[0], extra


class FailedError(CannotRunError):
    """A run raised an error."""


class BrokenError(Exception):
    """A kernel of this project raises an error instead of running."""


class Trials:
    """A process that tries contenders out, and is made anew when one kills it or has to be ended."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def end(self) -> None:
        """Kill the process, whatever it does."""
        if self.pool is not None:
            for process in list((self.pool._processes or {}).values()):
                process.kill()
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None

    def run(self, key: Key, contender: Contender, threads: int, limit_s: float) -> Any:
        if self.pool is None:
            with measure.environment(**measure.EXACT):
                self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
                self.pool.submit(os.getpid).result()
        try:
            # Memory that is given back at once takes time: the run that counts comes later, and is shorter.
            tried = self.pool.submit(trial, key, contender, threads, 2 * limit_s).result(
                3 * limit_s + _START_S
            )
        except TimeoutError:
            self.end()
            raise CannotRunError(f"three runs did not end within {3 * limit_s + _START_S:.0f} s") from None
        except BrokenProcessPool:
            self.end()
            raise CannotRunError("its process was killed, as for want of memory") from None
        except RuntimeError as error:
            self.end()  # after an error of a GPU nothing else works in that process
            raise FailedError(str(error).partition("\n")[0][:200]) from error
        if tried["seconds"] > 2 * limit_s:
            raise CannotRunError(_took_too_long(tried["seconds"], limit_s))
        return tried


@dataclass
class Entry:
    """A contender that runs, what is known of it, and its times in milliseconds by round."""

    contender: Contender
    call: Call
    extra_mib: float | None
    times: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.contender.name


def _memory_cap() -> float:
    """Bytes that a rival may take."""
    if torch.cuda.is_available():
        return _MEMORY_SHARE * torch.cuda.mem_get_info()[0]
    return _MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _least_s(flops: int, tflops: float) -> float:
    return flops / (1e12 * tflops)


def _too_large(case: Case, rival: rivals.Rival, peak: float) -> str | None:
    """Why a rival cannot be tried here, by its least memory and its least time."""
    needed, cap = rival.bytes(case), _memory_cap()
    if needed > cap:
        return f"needs {needed / 2**30:.1f} GiB at least, {cap / 2**30:.1f} GiB may be used"
    least = _least_s(rival.flops(case), peak)
    if least > measure.LIMIT_S:
        return _too_long(least, measure.LIMIT_S)
    return None


def _took_too_long(seconds: float, limit_s: float) -> str:
    return f"a run takes {seconds:.1f} s; the limit is {limit_s:g} s"


def _too_long(least_s: float, limit_s: float) -> str:
    return f"a run takes {least_s:.0f} s at the least, at the machine's rate; the limit is {limit_s:g} s"


def _agreed(case: Case, contender: Contender, call: Call, wanted: Result) -> str | None:
    """How far a result is off, or that it took too long; None where it is as it should be."""
    low_winners = (
        contender.rival
        and case.dtype != torch.float32
        and case.passes == "backward"
        and case.inputs.get("reduction") in ("max", "topk")
    )
    begin = time.monotonic()
    result = call()
    if contender.rival and time.monotonic() - begin > measure.LIMIT_S:
        return _took_too_long(time.monotonic() - begin, measure.LIMIT_S)
    if low_winners:  # a rival that normalises in low precision finds other winners, and other gradients
        return None
    return off(case, result, wanted)


def _admit_rivals(
    case: Case,
    key: Key,
    wanted: Result,
    peak: float,
    settings: Settings,
    trials: Trials,
) -> tuple[list[Entry], dict[str, str]]:
    """The rivals that run, and the reasons of the others."""
    entries: list[Entry] = []
    left_out: dict[str, str] = {}
    for rival in rivals.RIVALS[case.operator.name]:
        try:
            if settings.in_haste and rival.name in _SLOW_TO_START:
                raise CannotRunError(f"slow to start: left out by {settings.in_haste}")
            if rival.name == "compile" and (
                case.workload.ladder
                or case.dtype != torch.float32
                or case.passes == "backward"
                or rivals.naive_bytes(case) > _COMPILED_BYTES
            ):
                raise CannotRunError("compiled in float32, up to the size of the crops, backward not alone")
            reason = _too_large(case, rival, peak)
            if reason:
                raise CannotRunError(reason)
            last = Contender(rival.name, True, rival.chunks[-1])
            tried = trials.run(key, last, settings.threads, measure.LIMIT_S)
            chunk = rival.chunks[0] if settings.quick else rivals.best_chunk(case, rival)
            contender = Contender(rival.name, True, chunk)
            if contender.chunk != rival.chunks[-1]:
                tried = trials.run(key, contender, settings.threads, measure.LIMIT_S)
            call = contender.call(case)
            reason = _agreed(case, contender, call, wanted)
            if reason:
                raise CannotRunError(reason)
            entries.append(Entry(contender, call, tried["extra_mib"]))
        except CannotRunError as error:
            left_out[rival.name] = str(error)
    return entries, left_out


def _time_in_turn(entries: list[Entry], settings: Settings) -> None:
    times = measure.times_in_turn(
        [entry.call for entry in entries],
        device=settings.device,
        budget_s=settings.budget_s,
        quick=settings.quick,
    )
    for entry, of_entry in zip(entries, times, strict=True):
        entry.times = of_entry


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def _row(
    case: Case, own: Entry, others: list[Entry], left_out: dict[str, str], ceiling: dict[str, Any]
) -> dict[str, Any]:
    cost = case.operator.cost(case.inputs, case.passes)
    median = statistics.median(own.times)
    ratios = {other.name: [t / o for t, o in zip(other.times, own.times, strict=False)] for other in others}
    return {
        "op": case.operator.name,
        "impl": own.name,
        "reduction": case.workload.reduction,
        "mode": case.workload.mode,
        "dtype": case.dtype_name,
        "shape": case.workload.shape,
        "workload": case.workload.name,
        "ladder": case.workload.ladder,
        "pass": case.passes,
        "time_ms": _significant(median),
        "time_min_ms": _significant(min(own.times)),
        "runs": len(own.times),
        "tflops": _significant(cost.flops / (1e9 * median)),
        "gbps": _significant(cost.bytes / (1e6 * median)),
        "share_of_ceiling": round(ceilings.share(ceiling, case.dtype_name, cost, median), 4),
        "extra_mib": _rounded(own.extra_mib, 2),
        "extra_limit_mib": round(case.operator.extra_bytes_cpu / 2**20, 2),
        "naive_mib": round(rivals.naive_bytes(case) / 2**20, 2),
        "speedup": {name: _significant(statistics.median(values)) for name, values in ratios.items()},
        "rival_runs": {other.name: len(other.times) for other in others},
        "rival_ms": {other.name: _significant(statistics.median(other.times)) for other in others},
        "rival_extra_mib": {other.name: _rounded(other.extra_mib, 2) for other in others},
        "rival_chunk": {other.name: other.contender.chunk for other in others if other.contender.chunk},
        "rivals_left_out": left_out,
    }


def measure_case(
    key: Key,
    names: Sequence[str],
    ceiling: dict[str, Any],
    settings: Settings,
    trials: Trials,
    left_out: list[dict[str, str]],
) -> list[dict[str, Any]]:
    """A row per implementation that runs; the others go to `left_out`. `DisagreementError` where one is
    off, `BrokenError` where a kernel of ours raises."""
    case = make_case(*key)
    peak = ceiling["flops"][case.dtype_name]
    least_s = _least_s(case.operator.cost(case.inputs, case.passes).flops, peak)
    wanted = expected(case, few=least_s > measure.LIMIT_S)
    own: list[Entry] = []
    for implementation in case.operator.implementations:
        if names and implementation.name not in names:
            continue
        head = dict(zip(("op", "workload", "dtype", "pass"), key[:4], strict=True), impl=implementation.name)
        contender = Contender(implementation.name, False)
        try:
            asked = case.operator.call(settings.device, case.dtype)
            reasons = implementation.obstacles(asked)
            if settings.device == "cpu":  # an interpreter's times say nothing
                reasons = reasons or implementation.reservations(asked)
            if reasons:
                raise CannotRunError("; ".join(reasons))
            # The reference is plain torch as well: it has the rivals' limit.
            limit_s = measure.LIMIT_S if implementation.name == "reference" else OWN_LIMIT_S
            if least_s > limit_s:
                raise CannotRunError(_too_long(least_s, limit_s))
            tried = trials.run(key, contender, settings.threads, limit_s)
        except CannotRunError as error:
            # The reference may want more memory than there is; of our own kernels it is a finding.
            if isinstance(error, FailedError) and implementation.name != "reference":
                raise BrokenError(f"{' '.join(key[:4])}: {implementation.name}: {error}") from error
            left_out.append({**head, "reason": str(error)})
            continue
        call = contender.call(case)
        reason = _agreed(case, contender, call, wanted)
        if reason:
            raise DisagreementError(f"{' '.join(key[:4])}: {implementation.name} is {reason}")
        own.append(Entry(contender, call, tried["extra_mib"]))
    if not own:
        return []
    others, reasons_of = _admit_rivals(case, key, wanted, peak, settings, trials)
    del wanted
    _time_in_turn([*own, *others], settings)
    return [_row(case, entry, others, reasons_of, ceiling) for entry in own]


def winner(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The implementation with the least median of a case, and how many times as long the others take."""
    first, *others = sorted(rows, key=lambda row: float(row["time_ms"]))
    return {
        **{key: first[key] for key in ("op", "workload", "dtype", "pass", "impl", "time_ms")},
        "others": {row["impl"]: _significant(row["time_ms"] / first["time_ms"]) for row in others},
    }


def chosen_cases(flags: argparse.Namespace) -> list[Key]:
    """In the order of the registry."""
    found = []
    for name in flags.op:
        for workload in OPERATORS[name].workloads():
            if flags.workload and workload.name not in flags.workload:
                continue
            dtypes = flags.dtype or workload.dtypes
            found += [
                (name, workload.name, dtype, passes, flags.device)
                for dtype in dtypes
                for passes in workload.passes
                if not flags.passes or passes in flags.passes
            ]
    return found


def _turns(cases: Sequence[Key]) -> Iterator[tuple[int, Key]]:
    """Each case with its number among those of its operator."""
    seen: Counter[str] = Counter()
    for key in cases:
        yield seen[key[0]], key
        seen[key[0]] += 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=summary)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--op", nargs="+", choices=sorted(OPERATORS), default=sorted(OPERATORS), metavar="NAME"
    )
    parser.add_argument("--workload", nargs="+", metavar="NAME", help="of the registry (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: those of a workload")
    parser.add_argument("--pass", nargs="+", choices=PASSES, dest="passes", help="default: all of a workload")
    parser.add_argument("--impl", nargs="+", metavar="NAME", help="implementations (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timed runs of a case")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no case after that time")
    parser.add_argument("--tested", action="store_true", help="the tests have just passed: do not run them")
    parser.add_argument("--quick", action="store_true", help="to try it out; the result is marked")
    flags = parser.parse_args(arguments)
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU")
    if (flags.threads or 1) < 1 or flags.budget <= 0 or (flags.stop_after or 1) <= 0:
        parser.error("--threads must be at least 1, --budget and --stop-after above 0")
    workloads = {workload.name for name in flags.op for workload in OPERATORS[name].workloads()}
    implementations = {one.name for name in flags.op for one in OPERATORS[name].implementations}
    for flag, given, known in (
        ("workload", flags.workload, workloads),
        ("impl", flags.impl, implementations),
    ):
        if unknown := sorted(set(given or ()) - known):
            parser.error(f"--{flag}: must be of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return flags


def instruction_set() -> str | None:
    """What the compiled operators use on this CPU."""
    if not _library.LOADED:
        return None
    from cisc_ext import _build  # only there once the extension is built

    return str(_build.info()["instruction_set_in_use"])


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parse(arguments)
    reason = None if flags.tested else red(flags.op, flags.device)
    if reason:
        print(f"error: the operators' tests fail, nothing is measured: {reason}", file=sys.stderr)
        return 1
    if flags.threads:
        torch.set_num_threads(flags.threads)
    in_haste = "--quick" if flags.quick else "--stop-after" if flags.stop_after else None
    settings = Settings(flags.device, flags.budget, flags.quick, torch.get_num_threads(), in_haste)
    cases = chosen_cases(flags)
    if flags.stop_after:  # each operator's first case, then each one's second
        cases = [key for _, key in sorted(_turns(cases), key=lambda one: one[0])]
    if not cases:
        print("error: no workload has what is asked for", file=sys.stderr)
        return 1
    begin = time.monotonic()
    facts = machine.facts("benchmarks.kernels", arguments)
    facts["versions"].update({name: machine.version(name) for name in _RIVAL_PACKAGES})
    dtypes = [name for name in DTYPES if name in {"float32", *(case[2] for case in cases)}]
    ceiling = ceilings.measured(dtypes, flags.device, size=512 if flags.quick else ceilings.GEMM_SIZE)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    winners: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        **facts,
        "device": flags.device,
        "quick": flags.quick,
        "cisc_isa": instruction_set(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "ceilings": ceiling,
        "left_out": left_out,
        "winners": winners,
        "rows": rows,
    }
    path = flags.json or machine.ROOT / f"benchmarks/results/kernels_{flags.device}.json"
    with Trials() as trials:
        for number, key in enumerate(cases, 1):
            start = time.monotonic()
            if flags.stop_after and start - begin > flags.stop_after:
                head = dict(zip(("op", "workload", "dtype", "pass"), key[:4], strict=True))
                left_out.append({**head, "reason": f"not begun within {flags.stop_after:g} s"})
                write_json(path, result)
                continue
            try:
                new = measure_case(key, flags.impl or (), ceiling, settings, trials, left_out)
            except (DisagreementError, BrokenError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            rows += new
            winners += [winner(new)] if new else []
            result["minutes"] = round((time.monotonic() - begin) / 60, 1)
            write_json(path, result)
            took = time.monotonic() - start
            shown = ", ".join(f"{row['impl']} {row['time_ms']:g} ms" for row in new) or "nothing runs"
            print(f"[{number}/{len(cases)}] {' '.join(key[:4])}: {shown} ({took:.0f} s)", flush=True)
    print(aligned("kernels", rows))
    if flags.stop_after and (missed := sorted({key[0] for key in cases} - {row["op"] for row in rows})):
        print(f"error: nothing was measured of {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
