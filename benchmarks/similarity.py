"""What `cross_similarity` comes to beside its rows in benchmarks.kernels.

    python -m benchmarks.similarity [--labels DIR] [--threads N] [--json FILE] [--quick]

peak: the row maximum, dense, against the machine's multiply-adds (of bfloat16 where the processor has
instructions for such) and against torch.mm.
own: each query pixel against the guide pixels of its own label, on pairs of label maps one after the other,
against as many dense row maxima of the same size. The maps are PNG masks from --labels DIR, or else generated
regions.
image: the row maximum between two images of Cityscapes' size, against its own rate at the smaller size.
avx2: the row maximum with CISC_ISA=avx2, in a process of its own, against the best chunked torch.
step: what benchmarks.step calls rectify, but with `--similarity max`: the map alone, and the whole step with
loss and gradient, against the map's operations at the rate of the row maximum.

Whatever "auto" takes, on the CPU. Refuses to run while the operator's tests fail, and checks each result
against the reference in float32. Machine rates are measured first; all else is timed in turn with what it is
held against, from a flushed cache. Columns: time_ms, the median, and time_min_ms, the least, of `runs`;
tflops, the least operations over the median; against_ms, the median time of the rival or at the ceiling's
rate; ratio, the median over the rounds of that time / own time; extra_mib as in benchmarks.kernels.
`left_out` has the reason for each line that is not there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import ceilings, kernels, machine, measure, rivals, step
from benchmarks.cases import (
    Call,
    Case,
    DisagreementError,
    Result,
    expected,
    implementation_call,
    make_case,
    off,
)
from benchmarks.tables import aligned
from cisc_ext import method
from cisc_ext.config import MethodConfig
from cisc_ext.files import write_json
from cisc_ext.models import SegOutput
from cisc_ext.ops.registry import Call as RegistryCall
from cisc_ext.ops.registry import decide

OP = "cross_similarity"
DTYPES = ("float32", "bfloat16")
PAIRS = 4
"""Pairs of masks that are read."""
_CROP, _QUICK_CROP = 721, 129
_ISA = "avx2"

Row = dict[str, Any]
LabelPair = tuple[Tensor, Tensor]  # of the query and of the guide, [1,H,W] uint8 each


class LeftOutError(RuntimeError):
    """A line cannot be measured here; the message is the reason."""


@dataclass(frozen=True)
class Settings:
    quick: bool
    threads: int
    ceilings: dict[str, Any]
    labels: list[LabelPair]
    """Of real scenes; without any, those of the workload are taken."""

    @property
    def size(self) -> str:
        """Of the workloads by which all others are judged."""
        return "n4096" if self.quick else "n16384"

    @property
    def image(self) -> str:
        return "image_256x512" if self.quick else "image_1024x2048"

    def case(self, workload: str, dtype: str) -> Case:
        return make_case(OP, workload, dtype, "forward", "cpu")

    def dense(self, dtype: str) -> Case:
        return self.case(f"{self.size}_dense_max", dtype)

    def times(self, *calls: Call) -> list[list[float]]:
        return measure.times_in_turn(calls, quick=self.quick)


def implementation(case: Case) -> str:
    """What "auto" takes."""
    return decide(OP, None, RegistryCall("cpu", (case.dtype, case.dtype)))[0].name


def flops(case: Case) -> int:
    return case.operator.cost(case.inputs, case.passes).flops


def checked(case: Case, call: Call | None = None) -> Call:
    """`call`, or the operator's own, once its result has agreed with the reference's."""
    call = call or implementation_call(case, "auto")
    reason = off(case, call(), expected(case, few=True))
    if reason:
        raise DisagreementError(f"{case.workload.name} {case.dtype_name}: {implementation(case)} is {reason}")
    return call


def line(
    what: str,
    case: Case,
    operations: int,
    times: Sequence[float],
    against: str,
    other: Sequence[float],
    **more: Any,
) -> Row:
    """A row; `other` are times of the rival or at the ceiling's rate, in the same rounds."""
    query, guide = case.inputs["query"], case.inputs["guide"]
    pixels = {"N": query.shape[2:].numel(), "M": guide.shape[2:].numel()}
    median = statistics.median(times)
    ratios = [o / t for o, t in zip(other, times, strict=False)]
    return {
        "what": what,
        "dtype": case.dtype_name,
        "impl": implementation(case),
        "shape": {"B": query.shape[0], "C": query.shape[1], **pixels},
        "time_ms": _significant(median),
        "time_min_ms": _significant(min(times)),
        "runs": len(times),
        "tflops": _significant(operations / (1e9 * median)),
        "against": against,
        "against_ms": _significant(statistics.median(other)),
        "ratio": _significant(statistics.median(ratios)),
        **more,
    }


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def _at_rate(times: Sequence[float], done: int, wanted: int) -> list[float]:
    """What `wanted` operations take at the rate of `done` operations in these times."""
    return [t * wanted / done for t in times]


def peak_lines(settings: Settings, dtype: str) -> Iterator[Row]:
    case = settings.dense(dtype)
    operations = flops(case)
    (times,) = settings.times(checked(case))
    fma = settings.ceilings["fma_tflops"][dtype]
    rates = [("torch.mm", settings.ceilings["gemm_tflops"][dtype])]
    if fma is not None:
        rates.insert(0, ("FMA peak", fma))
    for name, tflops in rates:
        at_rate = [operations / (1e9 * tflops)] * len(times)
        yield line(f"{settings.size}, row maximum", case, operations, times, name, at_rate)
    if fma is None:
        raise LeftOutError("the FMA peak is measured by the compiled operators, which are not there")


def own_lines(settings: Settings, dtype: str) -> Iterator[Row]:
    dense, plain = settings.dense(dtype), settings.case(f"{settings.size}_own_max", dtype)
    cases = [plain.with_inputs(query_labels=query, guide_labels=guide) for query, guide in settings.labels]
    cases = cases or [plain]
    calls = [checked(case) for case in cases]

    def run() -> Result:
        return tuple(value for call in calls for value in call())

    operations = sum(map(flops, cases))
    times, of_dense = settings.times(run, checked(dense))
    yield line(
        f"{settings.size}, own labels of {'street scenes' if settings.labels else 'generated regions'}",
        plain,
        operations,
        times,
        "all guide pixels",
        [t * len(cases) for t in of_dense],
        images=2 * len(cases),
        share_of_pairs=_significant(operations / (len(cases) * flops(dense))),
    )


def image_lines(settings: Settings, dtype: str) -> Iterator[Row]:
    case, small = settings.case(f"{settings.image}_dense_max", dtype), settings.dense(dtype)
    with kernels.Trials() as trials:
        key = (OP, case.workload.name, dtype, case.passes, "cpu")
        contender = kernels.Contender(implementation(case), False)
        tried = trials.run(key, contender, settings.threads, kernels.OWN_LIMIT_S)
    times, of_small = settings.times(checked(case), checked(small))
    yield line(
        f"{settings.image}, row maximum",
        case,
        flops(case),
        times,
        f"rate of {settings.size}",
        _at_rate(of_small, flops(small), flops(case)),
        extra_mib=None if tried["extra_mib"] is None else round(tried["extra_mib"], 2),
    )


def avx2_lines(settings: Settings) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    with measure.environment(CISC_ISA=_ISA), ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            yield pool.submit(against_chunked, replace(settings, labels=[])).result()
        except ValueError as error:
            raise LeftOutError(str(error)) from error


def against_chunked(settings: Settings) -> Row:
    """The row maximum with the instruction set of this process."""
    torch.set_num_threads(settings.threads)
    isa = kernels.instruction_set()  # `ValueError` where the processor lacks it
    case = settings.dense("float32")
    rival = rivals.named(case, "chunked")
    chunk = rivals.best_chunk(case, rival)
    times, other = settings.times(checked(case), checked(case, rival.make(case, False, chunk)))
    what = f"{settings.size}, row maximum, AVX2"
    return line(what, case, flops(case), times, "chunked torch", other, chunk=chunk, isa=isa)


def step_lines(settings: Settings) -> Iterator[Row]:
    crop = _QUICK_CROP if settings.quick else _CROP
    x = step.make_inputs(crop)
    config, num_classes = MethodConfig(similarity="max"), x.logits.shape[1]
    small = settings.dense("float32")
    case = settings.case("cityscapes_labels_max", "float32").with_inputs(
        query=x.query.detach(), guide=x.guide.detach(), guide_labels=x.guide_labels, classes=x.classes
    )

    @torch.no_grad()
    def cisc_map() -> Result:
        sides = (x.query, x.query_labels, x.guide, x.guide_labels)
        return (method.cisc_map(*sides, x.classes, num_classes, config),)

    def whole() -> Result:
        (similarity,) = cisc_map()
        output = SegOutput(x.logits, x.query)
        loss = method.rectified_loss(output, x.query_labels, similarity, x.classes)
        return loss.detach(), *torch.autograd.grad(loss, [x.logits])

    operations = flops(case)
    *times, of_small = settings.times(checked(case, cisc_map), whole, checked(small))
    at_rate = _at_rate(of_small, flops(small), operations)
    for name, of_part in zip(("its map", "whole"), times, strict=True):
        what = f"rectify step at {crop}, {name}"
        yield line(what, case, operations, of_part, f"rate of {settings.size}", at_rate)


def read_pairs(folder: Path) -> list[LabelPair]:
    """Masks from all over the folder, each with one from half the folder away."""
    paths = sorted(folder.rglob("*.png"))
    count = min(PAIRS, len(paths) // 2)
    if count == 0:
        raise ValueError(f"--labels: expected a folder with two PNG masks at least, got {folder.name!r}")
    masks = [read_mask(paths[i * len(paths) // (2 * count)]) for i in range(2 * count)]
    return list(zip(masks[:count], masks[count:], strict=True))


def read_mask(path: Path) -> Tensor:
    """Classes of a mask's pixels, [1,H,W] uint8."""
    with Image.open(path) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"--labels: {path.name}: expected a mask of mode L or P, got {image.mode}")
        return torch.from_numpy(np.array(image))[None]


def sections(settings: Settings) -> Iterator[tuple[str, Iterator[Row]]]:
    """The lines, by section; they are measured as they are asked for."""
    for name, lines in (("peak", peak_lines), ("own", own_lines), ("image", image_lines)):
        for dtype in DTYPES:
            yield name, lines(settings, dtype)
    yield "avx2", avx2_lines(settings)
    yield "step", step_lines(settings)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.similarity", description=summary)
    parser.add_argument("--labels", type=Path, metavar="DIR", help="folder of PNG masks of real scenes")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="to try it out; the result is marked")
    flags = parser.parse_args(arguments)
    if (flags.threads or 1) < 1:
        parser.error("--threads must be at least 1")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parse(arguments)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    try:
        labels = read_pairs(flags.labels) if flags.labels else []
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    reason = kernels.red([OP])
    if reason:
        print(f"error: the operator's tests fail, nothing is measured: {reason}", file=sys.stderr)
        return 1
    begin = time.monotonic()
    ceiling = ceilings.measured(DTYPES, "cpu", size=512 if flags.quick else ceilings.GEMM_SIZE)
    settings = Settings(flags.quick, torch.get_num_threads(), ceiling, labels)
    rows: list[Row] = []
    left_out: list[dict[str, str]] = []
    result: dict[str, Any] = {
        **machine.facts("benchmarks.similarity", arguments),
        "device": "cpu",
        "quick": flags.quick,
        "cisc_isa": kernels.instruction_set(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "ceilings": ceiling,
        "labels": "masks of street scenes" if labels else "generated regions",
        "left_out": left_out,
        "rows": rows,
    }
    path = flags.json or machine.ROOT / "benchmarks/results/similarity_cpu.json"
    for section, lines in sections(settings):
        try:
            for row in lines:
                rows.append(row)
                shown = f"{row['time_ms']:g} ms, {row['ratio']:g} x {row['against']}"
                print(f"{section}: {row['what']}, {row['dtype']}: {shown}", flush=True)
        except LeftOutError as error:
            left_out.append({"section": section, "reason": str(error)})
        except DisagreementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        result["minutes"] = round((time.monotonic() - begin) / 60, 1)
        write_json(path, result)
    print(aligned("similarity", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
