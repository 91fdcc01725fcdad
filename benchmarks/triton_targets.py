"""Whether the Triton kernels reach what they are to reach on a GPU.

    python -m benchmarks.triton_targets [--json FILE] [--ghz CLOCK] [--quick]

At B = 16, K = 19, 256 channels, labels of 721 x 721 and features of 181 x 181:
losses and predict take at most 1.8 times a floor + 10 us, which is the largest of the bytes at the rate of a
copy, the exponentials and logarithms at 16 a clock and multiprocessor, and the float32 instructions at 128;
masked_average_pool and prototype_similarity move their bytes at 0.75 of the rate of a copy; and the row
maximum of cross_similarity, 131072 pixels against as many, reaches 400 TFLOP/s and 1.2 times the rate of
PyTorch in chunks. Times are medians of replayed CUDA graphs, each from a flushed cache: the GPU's own,
without Python. `call_ms` is that of a call as it comes. The result is compared with the reference's, that of
the row maximum for some pixels. Exit 1 if a target is missed; `--quick` tries it at small sizes and judges
nothing.
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

from benchmarks import ceilings, machine, measure
from benchmarks.cases import Call, Case, disagreement, expected, implementation_call, matching, tolerance
from benchmarks.tables import aligned
from cisc_ext.files import write_json
from cisc_ext.ops._workloads import CHANNELS, Size
from cisc_ext.ops.registry import OPERATORS, Workload

DTYPES = ("float32", "bfloat16")
FULL, SMALL = Size("b16_721", 16, 19, 721, 721), Size("b2_97", 2, 19, 97, 97)
PIXELS, FEW_PIXELS = (256, 512), (32, 32)
CHUNKS = (512, 1024, 2048, 4096, 8192)
GHZ = 1.75
SPECIAL_PER_CLOCK, FLOAT_PER_CLOCK = 16, 128
TIMES_FLOOR, MORE_US = 1.8, 10.0
SHARE_OF_COPY = 0.75
TFLOPS, TIMES_CHUNKED = 400.0, 1.2
_COPY_BYTES = 2**30
_RUNS, _WARM_UPS = 20, 3
_INTERPOLATION = 6
"""Three linear interpolations, each a product and a multiply-add."""


@dataclass(frozen=True)
class Work:
    """Of one pixel of the labels and one class or map: exponentials, logarithms and reciprocals, and float32
    instructions, at the least."""

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


def floor(case: Case, rates: Rates) -> dict[str, float]:
    """The counts of a case, and the microseconds that each takes at the least."""
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


def against_floor(case: Case, rates: Rates, time_ms: float) -> dict[str, Any]:
    """A row of a loss or of predict."""
    parts = floor(case, rates)
    least_us = max(parts["bytes_us"], parts["special_us"], parts["instructions_us"])
    limit_ms = 1e-3 * (TIMES_FLOOR * least_us + MORE_US)
    return {
        **{key: round(value, 2) for key, value in parts.items()},
        "floor_us": round(least_us, 2),
        "target": f"{limit_ms:.4f} ms",
        "reached": f"{time_ms:.4f} ms",
        "met": time_ms <= limit_ms,
    }


def against_copy(case: Case, rates: Rates, time_ms: float) -> dict[str, Any]:
    """A row of an operator that is bound by its bytes."""
    moved = case.operator.cost(case.inputs, case.passes).bytes
    gbps = moved / (1e6 * time_ms)
    share = gbps / rates.copy_gbps
    target = {"target": f"{SHARE_OF_COPY} of copy", "reached": f"{share:.3f} of copy"}
    return {
        "bytes": moved,
        "gbps": round(gbps, 1),
        **target,
        "met": share >= SHARE_OF_COPY,
    }


def against_chunked(case: Case, time_ms: float, chunked_ms: float) -> dict[str, Any]:
    """A row of the row maximum."""
    n, m = (case.inputs[name].shape[2:].numel() for name in ("query", "guide"))
    flops = 2 * CHANNELS * n * m
    tflops, times = flops / (1e9 * time_ms), chunked_ms / time_ms
    return {
        "flops": flops,
        "tflops": round(tflops, 1),
        "chunked_ms": round(chunked_ms, 4),
        "target": f"{TFLOPS:g} TFLOP/s, {TIMES_CHUNKED} x chunked",
        "reached": f"{tflops:.1f} TFLOP/s, {times:.2f} x chunked",
        "met": tflops >= TFLOPS and times >= TIMES_CHUNKED,
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
            cast = {
                key: value.to(device, precision if key in operator.features else value.dtype)
                if isinstance(value, Tensor)
                else value
                for key, value in of_op.items()
            }
            for one in passes:
                yield Case(operator, workload, precision, one, cast)


def dense_case(low: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """Every pixel against every pixel."""
    generator = torch.Generator().manual_seed(41)
    query, guide = (torch.randn(1, CHANNELS, *low, generator=generator).to(device, dtype) for _ in range(2))
    inputs = {
        **{"query": query, "guide": guide, "reduction": "max"},
        "guide_labels": torch.zeros(1, *low, dtype=torch.uint8, device=device),
        "classes": torch.zeros(1, 1, dtype=torch.int64, device=device),
    }
    pixels = low[0] * low[1]
    shape = {"B": 1, "C": CHANNELS, "N": pixels, "M": pixels}
    workload = Workload(f"n{pixels}_dense_max", shape, dict, ("forward",), mode="dense", reduction="max")
    return Case(OPERATORS["cross_similarity"], workload, dtype, "forward", inputs)


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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()  # here too: backward runs on the stream of its forward
        for _ in range(_WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()
    graph.replay()
    times = [measure.time_ms(graph.replay, device="cuda") for _ in range(_RUNS)]
    del kept
    return statistics.median(times)


def called_ms(call: Call) -> float:
    """Median milliseconds of a call as it comes."""
    call()
    return statistics.median(measure.time_ms(call, device="cuda") for _ in range(_RUNS))


def _wrong(case: Case) -> str:
    """How far the result is off the reference's, where it is; empty where it is right."""
    wanted = expected(case, few=case.operator.name == "cross_similarity")
    error = disagreement(matching(implementation_call(case, "triton")(), wanted), wanted)
    return "" if error <= tolerance(case) else f"{error:.1e} off the float32 reference"


def row(case: Case, rates: Rates) -> dict[str, Any]:
    """A measured case."""
    wrong = _wrong(case)
    time_ms = graph_ms(lambda: implementation_call(case, "triton"))
    name = case.operator.name
    if name == "cross_similarity":
        found = against_chunked(
            case,
            time_ms,
            min(graph_ms(lambda c=c: chunked(case, c)) for c in CHUNKS),  # type: ignore[misc]
        )
    else:
        judge = against_floor if _bound_by(name) == "floor" else against_copy
        found = judge(case, rates, time_ms)
    head = {"op": name, "workload": case.workload.name, "dtype": case.dtype_name, "pass": case.passes}
    times = {
        "time_ms": round(time_ms, 4),
        "call_ms": round(called_ms(implementation_call(case, "triton")), 4),
    }
    return {**head, **times, **found, **({"met": False, "reached": wrong} if wrong else {})}


def measured(device: str, rates: Rates, quick: bool) -> Iterator[dict[str, Any]]:
    """All rows, one after another."""
    for case in cases(SMALL if quick else FULL, device):
        yield row(case, rates)
    for dtype in (torch.bfloat16, torch.float16):
        yield row(dense_case(FEW_PIXELS if quick else PIXELS, dtype, device), rates)


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each target that is missed."""
    return [
        f"{one['op']} {one['workload']} {one['dtype']} {one['pass']}: {one['reached']},"
        f" target {one['target']}"
        for one in rows
        if not one["met"]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_targets", description=summary)
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    parser.add_argument("--ghz", type=float, default=GHZ, help=f"clock of the floors (default: {GHZ})")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; judges nothing")
    flags = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: these targets are of an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 1
    copy_gbps = ceilings.copy_gbps("cuda", _COPY_BYTES)
    rates = Rates(copy_gbps, torch.cuda.get_device_properties(0).multi_processor_count, flags.ghz)
    rows: list[dict[str, Any]] = []
    result = {
        **machine.facts("benchmarks.triton_targets", arguments),
        **{"device": "cuda", "quick": flags.quick, "rates": vars(rates), "rows": rows},
    }
    path = flags.json or machine.ROOT / "benchmarks/results/triton_targets.json"
    for one in measured("cuda", rates, flags.quick):
        rows.append(one)
        write_json(path, result)
    print(aligned("triton_targets", rows))
    lines = [] if flags.quick else missed(rows)
    for line in lines:
        print(f"MISSED {line}")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
