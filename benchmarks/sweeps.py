"""What pixel-level similarity by the CUDA kernels comes to on a GPU, and whether that is what it is to reach.

    python -m benchmarks.sweeps [--only PART,PART] [--labels DIR] [--stop-after SECONDS] [--json FILE]
        [--quick]

Features of 256 channels, 256 x 512 pixels against as many (131072), in float16 and by the row maximum, where
nothing else is said. What is compared is timed in turn, in the same rounds, and medians are held against each
other. Rates are 2 C N M FLOP over the median, backward of softmax 4 C N M more for each gradient.

products: torch.mm of two matrices of 8192 x 8192, into an output that is there: the rate of cuBLAS, in
float16 and bfloat16.
dense: max with the index at 700 TFLOP/s and at 0.88 of products in its dtype; softmax at 620; topk of 8 at
500; also in bfloat16. Memory beyond inputs and outputs: packed operands, (N + M) C 2 bytes, and 64 MiB.
highest: float32 features under either precision of products. No target.
variants: the other forms of the sweep that the library has, beside the usual one, as a multiple of its time.
screened: CISC_CROSS_SCREEN=1, at 1100 TFLOP/s in effect, faster than dense, with the very same result.
own: each pixel against those of its own label, a third of the time of dense; labels in regions with the
frequencies of Cityscapes, or pairs of PNG masks from --labels.
linear: 64 x 64, 128 x 128 and 256 x 256 pixels against as many, in at most 1.1 times the time for a pair of
pixels that the full size takes.
small: batches of 16 at the crops of the published runs, at 0.6 of the rate of the full size.
backward: value and gradients. No target.
rivals: max 1.15 times, softmax and topk 1.3 times as fast as the best of what else runs here: the package's
own Triton kernels, PyTorch in chunks of the best size, attention, and the libraries that are installed;
`rivals_left_out` has the reasons of the others.

Times are of replayed CUDA graphs, each from a flushed cache: the GPU's own; among rivals, some of which wait
for the GPU, of calls as they come. Every result is compared with float64 for some pixels first, gradients at
the smaller size with float32. `left_out` names what cannot run here, `failed` what broke or was not begun
within --stop-after. Exit 1 if a target is missed, a result is wrong or something failed. `--quick` tries it
at small sizes, on the CPU too, and judges nothing but results.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, similarity
from benchmarks.pixel_cases import OP
from benchmarks.sweep_parts import FULL, PARTS, QUICK, Bench, LeftOutError, Row
from benchmarks.tables import aligned
from cisc_ext.files import write_json
from cisc_ext.ops.registry import OPERATORS


def missed(rows: Sequence[Row]) -> list[str]:
    """A line for each target that is missed, and for each wrong result."""
    return [
        f"{one['part']} {one['what']}, {one['dtype']}: {one['reached']}"
        + (f", target {one['target']}" if one["target"] else "")
        for one in rows
        if one["met"] is False
    ]


def fastest(rows: Sequence[Row]) -> dict[str, str]:
    """The form of the sweep that took the least time, by reduction."""
    by_reduction: dict[str, Row] = {}
    for row in rows:
        if row["part"] == "variants" and row["met"] is not False:
            best = by_reduction.get(row["reduction"], row)
            by_reduction[row["reduction"]] = min(best, row, key=lambda one: float(one["time_ms"]))
    return {reduction: str(row["what"]) for reduction, row in by_reduction.items()}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweeps",
        description=summary,
        epilog=rest.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="folder of PNG masks of real scenes")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin nothing after that")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; judges no time")
    flags = parser.parse_args(arguments)
    if flags.quick and flags.json is None:
        parser.error("--quick: needs --json, as its result is none to keep")
    flags.only = flags.only.split(",")
    if unknown := [name for name in flags.only if name not in PARTS]:
        parser.error(f"--only: must be of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
    return flags


def run(bench: Bench, names: Sequence[str], result: dict[str, Any], path: Path) -> None:
    """These parts, into `result`, which is written as each row is there."""
    for name in names:
        start = time.monotonic()
        if start > bench.until:
            result["failed"].append({"part": name, "reason": "not begun: the time was over"})
            write_json(path, result)
            continue
        try:
            for row in PARTS[name](bench):
                result["rows"].append(row)
                write_json(path, result)
                shown = f", {row['reached']}" if row["reached"] else ""
                print(f"{name}: {row['what']}, {row['dtype']}: {row['time_ms']:g} ms{shown}", flush=True)
        except LeftOutError as error:
            result["left_out"].append({"part": name, "reason": str(error)})
        except Exception as error:  # of a GPU also that its memory is spent; the next parts may go
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
            result["failed"].append({"part": name, "reason": reason})
            write_json(path, result)
        if bench.device == "cuda":
            with contextlib.suppress(RuntimeError):  # after some errors a GPU answers nothing any more
                torch.cuda.empty_cache()
        result["seconds"][name] = round(time.monotonic() - start, 1)
        result["fastest"] = fastest(result["rows"])
        write_json(path, result)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not flags.quick:
        print("error: these targets are of an NVIDIA GPU, torch sees none", file=sys.stderr)
        return 1
    if reasons := OPERATORS[OP].obstacles("cpp", device, torch.float16):
        print(f"error: no kernel to measure: {'; '.join(reasons)}", file=sys.stderr)
        return 1
    try:
        labels = similarity.read_pairs(flags.labels) if flags.labels else []
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        **machine.facts("benchmarks.sweeps", arguments),
        **{"device": device, "quick": flags.quick},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "labels": "masks of street scenes" if labels else "generated regions",
        **{"left_out": [], "failed": [], "seconds": {}, "fastest": {}, "rows": []},
    }
    path = flags.json or machine.ROOT / "benchmarks/results/sweeps_cuda.json"
    # What is set here would be measured instead of the usual sweep.
    for name in ("CISC_CROSS_SCREEN", "CISC_CROSS_VARIANT"):
        os.environ.pop(name, None)
    until = time.monotonic() + flags.stop_after if flags.stop_after is not None else math.inf
    bench = Bench(device, flags.quick, QUICK if flags.quick else FULL, labels, until)
    run(bench, flags.only, result, path)
    print(aligned("sweeps_cuda", result["rows"]))
    for reduction, name in result["fastest"].items():
        print(f"FASTEST {reduction}: {name}")
    for kind in ("left_out", "failed"):
        for entry in result[kind]:
            print(f"{kind.upper().replace('_', ' ')} {entry['part']}: {entry['reason']}")
    lines = missed(result["rows"])
    for line in lines:
        print(f"MISSED {line}")
    return 1 if lines or result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
