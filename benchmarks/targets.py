"""Whether the kernels reach what they are to reach on a GPU, by each implementation that runs there.

    python -m benchmarks.targets [--impl NAME ...] [--json FILE] [--ghz CLOCK] [--quick]

At B = 16, K = 19, 256 channels, labels of 721 x 721 and features of 181 x 181:
losses and predict take at most 1.8 (Triton) or 1.5 (CUDA) times a floor + 10 us, which is the largest of the
bytes at the rate of a copy, the exponentials and logarithms at 16 a clock and multiprocessor, and the float32
instructions at 128, both counted for a kernel that computes each pixel by itself (`WORK`), at the highest
clock of the GPU unless `--ghz` names one; in CUDA also at most a fifth of the time and a twentieth of the
memory of plain PyTorch (benchmarks/naive.py). masked_average_pool and prototype_similarity move their bytes
at 0.75 (Triton) or 0.80 (CUDA) of the rate of a copy. The row maximum of cross_similarity, 131072 pixels
against as many, reaches in Triton 400 TFLOP/s and 1.2 times the rate of PyTorch in chunks; that in CUDA is
measured by benchmarks.sweeps.
Times are medians of replayed CUDA graphs, each from a flushed cache: the GPU's own, without Python; those of
plain PyTorch too, but for predict, which waits for the GPU there. `call_ms` is that of a call as it comes.
The result is compared with the reference's, that of the row maximum for some pixels. `left_out` has the
reasons for what cannot run here. Exit 1 if a target is missed, or if an implementation cannot run that
`--impl` does not leave out. `--quick` tries it at small sizes and judges no time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ceilings, machine, measure, naive
from benchmarks.cases import (
    Call,
    Case,
    call_of,
    expected,
    implementation_call,
    off,
    placed,
)
from benchmarks.pixel_cases import dense_case
from benchmarks.tables import aligned
from cisc_ext.files import write_json
from cisc_ext.ops._workloads import CHANNELS, Size
from cisc_ext.ops.registry import OPERATORS, Workload

DTYPES = ("float32", "bfloat16")
FULL, SMALL = Size("b16_721", 16, 19, 721, 721), Size("b2_97", 2, 19, 97, 97)
PIXELS, FEW_PIXELS = (256, 512), (32, 32)
CHUNKS = (512, 1024, 2048, 4096, 8192)
GHZ = 1.75
"""Clock where the GPU does not tell its own."""
SPECIAL_PER_CLOCK, FLOAT_PER_CLOCK = 16, 128
MORE_US = 10.0
_COPY_BYTES = 2**30
_RUNS = 20
_INTERPOLATION = 6
"""Three linear interpolations, each a product and a multiply-add."""


@dataclass(frozen=True)
class Targets:
    """Of an implementation; None is no target."""

    times_floor: float
    share_of_copy: float
    tflops: float | None = None
    """Of the row maximum; that of CUDA is measured elsewhere."""
    times_chunked: float | None = None
    times_plain: float | None = None
    """Plain PyTorch's time over the own; its memory below."""
    times_memory: float | None = None


TARGETS = {
    "cpp": Targets(1.5, 0.80, times_plain=5.0, times_memory=20.0),
    "triton": Targets(1.8, 0.75, tflops=400.0, times_chunked=1.2),
}
IMPLEMENTATIONS = tuple(TARGETS)


@dataclass(frozen=True)
class Plain:
    """Time and memory of plain PyTorch, and of the implementation the memory."""

    time_ms: float
    mib: float
    own_mib: float


@dataclass(frozen=True)
class Work:
    """Of one pixel of the labels and one class or map: exponentials, logarithms and reciprocals, and float32
    instructions, where each pixel is computed by itself.

    No lower bound: a kernel does with less that interpolates the corners of a row of pixels once, or has
    exponentials of neighbours by products, as that of rectified_cross_entropy does in CUDA, with 13
    instructions for loss and gradient.
    """

    special: int
    instructions: int


WORK = {
    # Maximum, shift and scale, sum; with the gradient the product with the weight, and interpolation back.
    ("rectified_cross_entropy", "forward"): Work(1, _INTERPOLATION + 3),
    ("rectified_cross_entropy", "both"): Work(1, 2 * _INTERPOLATION + 4),
    # Clamp, the logarithm of one side, sum; with the gradient a reciprocal.
    ("map_consistency", "forward"): Work(1, _INTERPOLATION + 4),
    ("map_consistency", "both"): Work(2, 2 * _INTERPOLATION + 5),
    # Comparison, and choice of value and index.
    ("predict", "forward"): Work(0, _INTERPOLATION + 3),
}


@dataclass(frozen=True)
class Rates:
    """Of the machine."""

    copy_gbps: float
    multiprocessors: int
    ghz: float


def clock_ghz() -> float:
    """The highest clock of the first GPU's multiprocessors."""
    mhz = machine.first_line("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
    try:
        return float(mhz or "") / 1e3
    except ValueError:
        return GHZ


def floor(case: Case, rates: Rates) -> dict[str, float]:
    """The counts of a case, and the microseconds that each takes at its rate."""
    work = WORK[case.operator.name, case.passes]
    x = case.inputs
    depth = (x["logits"] if "logits" in x else x["similarity"]).shape[1]
    of_labels = x["labels"].numel() * depth
    cost = case.operator.cost(x, case.passes)
    per_us = 1e3 * rates.ghz * rates.multiprocessors
    return {
        "bytes": cost.bytes,
        "special": work.special * of_labels,
        "instructions": work.instructions * of_labels,
        "bytes_us": cost.bytes / (1e3 * rates.copy_gbps),
        "special_us": work.special * of_labels / (SPECIAL_PER_CLOCK * per_us),
        "instructions_us": work.instructions * of_labels / (FLOAT_PER_CLOCK * per_us),
    }


def against_floor(
    case: Case, rates: Rates, time_ms: float, targets: Targets, plain: Plain | None = None
) -> dict[str, Any]:
    """A row of a loss or of predict."""
    parts = floor(case, rates)
    least_us = max(parts["bytes_us"], parts["special_us"], parts["instructions_us"])
    limit_ms = 1e-3 * (targets.times_floor * least_us + MORE_US)
    found: dict[str, Any] = {
        **{key: round(value, 2) for key, value in parts.items()},
        "floor_us": round(least_us, 2),
        "target": f"{limit_ms:.4f} ms",
        "reached": f"{time_ms:.4f} ms",
        "met": time_ms <= limit_ms,
    }
    if plain is None or targets.times_plain is None or targets.times_memory is None:
        return found
    times, of_memory = plain.time_ms / time_ms, plain.mib / max(plain.own_mib, 2**-20)
    found["target"] += f", {targets.times_plain:g} x plain, 1/{targets.times_memory:g} of its memory"
    found["reached"] += f", {times:.1f} x plain, {plain.own_mib:.1f} of {plain.mib:.1f} MiB"
    found["met"] = found["met"] and times >= targets.times_plain and of_memory >= targets.times_memory
    memory = {"extra_mib": round(plain.own_mib, 2), "plain_mib": round(plain.mib, 2)}
    return {**found, "plain_ms": round(plain.time_ms, 4), **memory}


def against_copy(case: Case, rates: Rates, time_ms: float, targets: Targets) -> dict[str, Any]:
    """A row of an operator that is bound by its bytes."""
    moved = case.operator.cost(case.inputs, case.passes).bytes
    gbps = moved / (1e6 * time_ms)
    share = gbps / rates.copy_gbps
    target = {"target": f"{targets.share_of_copy:.2f} of copy", "reached": f"{share:.3f} of copy"}
    return {
        "bytes": moved,
        "gbps": round(gbps, 1),
        **target,
        "met": share >= targets.share_of_copy,
    }


def against_chunked(case: Case, time_ms: float, chunked_ms: float, targets: Targets) -> dict[str, Any]:
    """A row of the row maximum, by an implementation that has a target for it."""
    n, m = (case.inputs[name].shape[2:].numel() for name in ("query", "guide"))
    flops = 2 * CHANNELS * n * m
    tflops, times = flops / (1e9 * time_ms), chunked_ms / time_ms
    assert targets.tflops is not None and targets.times_chunked is not None
    return {
        "flops": flops,
        "tflops": round(tflops, 1),
        "chunked_ms": round(chunked_ms, 4),
        "target": f"{targets.tflops:g} TFLOP/s, {targets.times_chunked} x chunked",
        "reached": f"{tflops:.1f} TFLOP/s, {times:.2f} x chunked",
        "met": tflops >= targets.tflops and times >= targets.times_chunked,
    }


def _bound_by(name: str) -> str:
    return "floor" if any(op == name for op, _ in WORK) else "copy"


def cases(size: Size, device: str) -> Iterator[Case]:
    """Losses, predict, pooling and similarity at a size, in all precisions and passes."""
    generator = torch.Generator().manual_seed(37)
    labels = size.labels(generator).to(device)
    logits, features = size.logits(generator), size.features(generator)
    classes = torch.zeros(size.batch, 1, dtype=torch.int64, device=device)
    maps = torch.rand(size.batch, 1, *size.low, generator=generator)
    prototypes = torch.randn(size.batch, 1, CHANNELS, generator=generator)
    inputs: dict[str, dict[str, Any]] = {
        "rectified_cross_entropy": {
            **{"logits": logits, "labels": labels, "similarity": maps, "classes": classes}
        },
        "map_consistency": {"similarity": maps, "labels": labels, "classes": classes},
        "predict": {"logits": logits, "size": (size.height, size.width), "labels": labels},
        "masked_average_pool": {"features": features, "labels": labels, "classes": classes},
        "prototype_similarity": {"query": features, "prototypes": prototypes},
    }
    for name, of_op in inputs.items():
        operator = OPERATORS[name]
        passes = [one for op, one in WORK if op == name] or ["forward", "backward"]
        workload = Workload(size.name, size.shape(), dict, tuple(passes))
        for dtype in DTYPES:
            precision: torch.dtype = getattr(torch, dtype)
            on_device = placed(operator, of_op, precision, device)
            for one in passes:
                yield Case(operator, workload, precision, one, on_device)


def chunked(case: Case, chunk: int) -> Call:
    """The row maximum in PyTorch, in buffers made once."""
    guide_pixels = case.inputs["guide"].shape[2:].numel()
    query = case.inputs["query"]
    buffer = torch.empty(chunk, guide_pixels, dtype=case.dtype, device=query.device)
    result = torch.empty(query.shape[2:].numel(), dtype=case.dtype, device=query.device)

    def call() -> tuple[Tensor, ...]:
        q, g = (F.normalize(case.inputs[name][0].flatten(1), dim=0) for name in ("query", "guide"))
        rows = q.t().contiguous()
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            scores = torch.mm(part, g, out=buffer[: len(part)])
            torch.amax(scores, 1, out=result[start : start + chunk])
        return (result.view(1, 1, *query.shape[2:]),)

    return call


def graph_ms(make: Callable[[], Call]) -> float:
    """Median milliseconds of a replayed CUDA graph of the call that `make` gives."""
    replay = measure.captured(make)
    return statistics.median(measure.time_ms(replay, device="cuda") for _ in range(_RUNS))


def called_ms(call: Call) -> float:
    """Median milliseconds of a call as it comes."""
    call()
    return statistics.median(measure.time_ms(call, device="cuda") for _ in range(_RUNS))


def obstacles(case: Case, impl: str) -> list[str]:
    """Why an implementation cannot run a case."""
    return case.operator.obstacles(impl, case.device, case.dtype)


_WAITS = ("predict",)
"""Plain expressions that read a number from the GPU, and so are in no graph."""


def plain_cost(case: Case) -> tuple[float, float]:
    """Milliseconds and MiB of plain PyTorch."""

    def make(whole: bool = False) -> Call:
        return call_of(naive.ORACLES[case.operator.name], case, whole=whole)

    time_ms = called_ms(make()) if case.operator.name in _WAITS else graph_ms(make)
    return time_ms, measure.peak_extra_mib(make(whole=True), device="cuda")


def rows_of(case: Case, rates: Rates, impls: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A measured case by each implementation; what they are held against is measured once."""
    name = case.operator.name
    wanted = expected(case, few=name == "cross_similarity")
    chunked_ms, plain = 0.0, None
    if name == "cross_similarity":
        chunked_ms = min(graph_ms(lambda c=c: chunked(case, c)) for c in CHUNKS)  # type: ignore[misc]
    elif _bound_by(name) == "floor" and any(TARGETS[impl].times_plain is not None for impl in impls):
        plain = plain_cost(case)
    for impl in impls:
        targets = TARGETS[impl]
        wrong = off(case, implementation_call(case, impl)(), wanted)
        time_ms = graph_ms(lambda i=impl: implementation_call(case, i))  # type: ignore[misc]
        if name == "cross_similarity":
            found = against_chunked(case, time_ms, chunked_ms, targets)
        elif _bound_by(name) == "copy":
            found = against_copy(case, rates, time_ms, targets)
        elif plain is None or targets.times_plain is None:
            found = against_floor(case, rates, time_ms, targets)
        else:
            own = measure.peak_extra_mib(implementation_call(case, impl, whole=True), device="cuda")
            found = against_floor(case, rates, time_ms, targets, Plain(*plain, own))
        head = {"op": name, "workload": case.workload.name, "dtype": case.dtype_name, "pass": case.passes}
        times = {
            "time_ms": round(time_ms, 4),
            "call_ms": round(called_ms(implementation_call(case, impl)), 4),
        }
        yield {**head, "impl": impl, **times, **found, **({"met": False, "reached": wrong} if wrong else {})}


def every_case(device: str, quick: bool) -> Iterator[Case]:
    """All that is measured, one after another."""
    for dtype in (torch.bfloat16, torch.float16):
        yield dense_case(FEW_PIXELS if quick else PIXELS, dtype, device)
    yield from cases(SMALL if quick else FULL, device)


def measured(
    device: str,
    rates: Rates,
    quick: bool,
    impls: Sequence[str] = IMPLEMENTATIONS,
    left_out: list[dict[str, str]] | None = None,
) -> Iterator[dict[str, Any]]:
    """All rows, one after another; `left_out` gets each operator and implementation that cannot run."""
    for case in every_case(device, quick):
        able = []
        for impl in impls:
            if case.operator.name == "cross_similarity" and TARGETS[impl].tflops is None:
                continue
            reasons = obstacles(case, impl)
            if not reasons:
                able.append(impl)
            entry = {"op": case.operator.name, "impl": impl, "reason": "; ".join(reasons)}
            if reasons and left_out is not None and entry not in left_out:
                left_out.append(entry)
        if able:
            yield from rows_of(case, rates, able)


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each target that is missed."""
    return [
        f"{one['op']} {one['workload']} {one['dtype']} {one['pass']} {one['impl']}: {one['reached']},"
        f" target {one['target']}"
        for one in rows
        if one["met"] is False
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=summary)
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS, metavar="NAME")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    parser.add_argument("--ghz", type=float, help=f"clock of the floors (default: the GPU's, or {GHZ})")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; judges nothing")
    flags = parser.parse_args(arguments)
    if flags.quick and flags.json is None:
        parser.error("--quick: needs --json, as its result is none to keep")
    if not torch.cuda.is_available():
        print("error: these targets are of an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 1
    copy_gbps = ceilings.copy_gbps("cuda", _COPY_BYTES)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    rates = Rates(copy_gbps, multiprocessors, flags.ghz or clock_ghz())
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    result = {
        **machine.facts("benchmarks.targets", arguments),
        **{"device": "cuda", "quick": flags.quick, "rates": vars(rates)},
        **{"left_out": left_out, "rows": rows},
    }
    path = flags.json or machine.ROOT / "benchmarks/results/targets_cuda.json"
    for one in measured("cuda", rates, flags.quick, flags.impl, left_out):
        rows.append(one)
        write_json(path, result)
    print(aligned("targets_cuda", rows))
    for entry in left_out:
        print(f"LEFT OUT {entry['op']} {entry['impl']}: {entry['reason']}")
    lines = [] if flags.quick else missed(rows)
    for line in lines:
        print(f"MISSED {line}")
    return 1 if lines or left_out else 0


if __name__ == "__main__":
    raise SystemExit(main())
