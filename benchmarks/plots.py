"""Pictures of the kernels' result file: time and memory over the size of an image, doubly logarithmic.

    python -m benchmarks.plots [--json FILE] [--out DIR]

Writes kernels_time_DEVICE.svg and kernels_memory_DEVICE.svg, the same bytes each time. Broken lines are what
the naive expression must hold, computed; where that is more than the machine has, there is a wall.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import make_case
from benchmarks.machine import ROOT
from benchmarks.rivals import naive_bytes
from cisc_ext.files import atomic_write

Row = dict[str, Any]
Points = list[tuple[int, float]]

STYLES = {
    "triton": ("#8e44ad", "D"),
    "cpp": ("#c0392b", "o"),
    "reference": ("#2c3e50", "s"),
    "chunked": ("#2980b9", "^"),
    "naive": ("#7f8c8d", "v"),
}
"""Colour and mark of each line: implementations, then the rivals that run at every size."""
_STRIDE = 4
_COLUMNS = 3
_TIME, _MEMORY = "time in ms", "memory beyond inputs and outputs in MiB"


def image_pixels(row: Row) -> int:
    """Pixels at label resolution."""
    shape = row["shape"]
    return int(shape["H"] * shape["W"] if "H" in shape else _STRIDE**2 * _feature_pixels(shape))


def _feature_pixels(shape: dict[str, int]) -> int:
    return shape["N"] if "N" in shape else shape["h"] * shape["w"]


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Float32 rows of the images, by operator, each in the pass that training needs."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["ladder"] and row["workload"].startswith("image_") and row["dtype"] == "float32":
            found[row["op"]].append(row)
    return {op: [row for row in of_op if row["pass"] == _pass(of_op)] for op, of_op in sorted(found.items())}


def _pass(rows: Sequence[Row]) -> str:
    return "both" if any(row["pass"] == "both" for row in rows) else "forward"


def lines(rows: Sequence[Row], of_memory: bool) -> dict[str, Points]:
    """Points of each line, by implementation or rival."""
    own, of_rivals = ("extra_mib", "rival_extra_mib") if of_memory else ("time_ms", "rival_ms")
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        pixels = image_pixels(row)
        for name, value in {**row[of_rivals], row["impl"]: row[own]}.items():
            if name in STYLES and value is not None and value > 0:
                points[name][pixels] = value
    return {name: sorted(points[name].items()) for name in STYLES if name in points}


def unmeasured(result: Row, op: str) -> list[Row]:
    """Images at which nothing ran within its limit: what the naive expression would need there."""
    needs = []
    for left in result.get("left_out", []):
        case = (left["op"], left["workload"], left["dtype"], left["pass"])
        if left["op"] == op and left["workload"].startswith("image_") and left["dtype"] == "float32":
            made = make_case(*case, "cpu")
            needs.append({**left, "shape": made.workload.shape, "naive_mib": naive_bytes(made) / 2**20})
    return needs


def wall(rows: Sequence[Row], memory_mib: float) -> float | None:
    """Pixels from which on the naive expression needs more memory than there is; None below all."""
    needs = sorted({(image_pixels(row), row["naive_mib"]) for row in rows})
    for (x0, y0), (x1, y1) in itertools.pairwise(needs):
        if y0 <= memory_mib < y1:
            share = math.log(memory_mib / y0) / math.log(y1 / y0)
            return float(x0 * (x1 / x0) ** share)
    return None


def draw(result: Row, of_memory: bool, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    by_op = panels(result["rows"])
    if not by_op:
        raise ValueError("expected rows of images, found none")
    memory_mib = 1024 * result["machine"]["memory_gib"]
    with matplotlib.rc_context():
        matplotlib.rc("svg", hashsalt="cisc_ext", fonttype="none")
        matplotlib.rc("font", size=8)
        matplotlib.rc("axes", grid=True)
        matplotlib.rc("grid", linewidth=0.3)
        count = -(-len(by_op) // _COLUMNS)
        figure, axes = pyplot.subplots(count, _COLUMNS, figsize=(9, 2.7 * count), squeeze=False)
        for axis in axes.flat[len(by_op) :]:
            axis.set_visible(False)
        shown: dict[str, Any] = {}
        for axis, (op, rows) in zip(axes.flat, by_op.items(), strict=False):
            for name, points in lines(rows, of_memory).items():
                colour, mark = STYLES[name]
                (line,) = axis.loglog(*zip(*points, strict=True), color=colour, marker=mark, markersize=3)
                shown.setdefault(name, line)
            rows = rows + unmeasured(result, op)
            if of_memory:
                needs = sorted({(image_pixels(row), row["naive_mib"]) for row in rows})
                (line,) = axis.loglog(
                    *zip(*needs, strict=True), color=STYLES["naive"][0], linestyle="--", linewidth=0.9
                )
                shown.setdefault("naive, computed", line)
            limit = wall(rows, memory_mib)
            if limit is not None:
                line = axis.axvline(limit, color="black", linestyle=":", linewidth=1)
                shown.setdefault(f"naive needs more than {memory_mib / 1024:.0f} GiB", line)
            axis.set_title(f"{op}, {'with gradient' if _pass(rows) == 'both' else 'forward'}")
            ticks = {image_pixels(row): row["workload"].split("_")[1] for row in rows}
            axis.set_xticks([*ticks], [*ticks.values()])
            axis.minorticks_off()
            axis.set_xlabel("image, pixels")
        for axis in axes[:, 0]:
            axis.set_ylabel(_MEMORY if of_memory else _TIME)
        figure.legend(shown.values(), shown.keys(), loc="lower center", ncol=len(shown), frameon=False)
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        atomic_write(
            path,
            lambda stream: figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}),
        )
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=summary)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/kernels_cpu.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures")
    flags = parser.parse_args(arguments)
    try:
        result = json.loads(flags.json.read_text())
        for name, of_memory in (("time", False), ("memory", True)):
            draw(result, of_memory, flags.out / f"kernels_{name}_{result['device']}.svg")
    except (OSError, ValueError) as error:
        print(f"error: {flags.json}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
