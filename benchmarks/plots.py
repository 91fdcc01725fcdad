"""Pictures of the kernels' result file: time and memory over the size of an image, doubly logarithmic.

    python -m benchmarks.plots [--json FILE] [--out DIR]

Writes kernels_time_DEVICE.svg and kernels_memory_DEVICE.svg, and similarity_DEVICE.svg with cross_similarity
alone, the same bytes each time. Broken lines are what the naive expression must hold, computed; where that is
more than the machine has, there is a wall. A rival's line ends where it takes longer than its limit.
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
from benchmarks.rival_counts import naive_bytes
from cisc_ext.files import atomic_write

Row = dict[str, Any]
Points = list[tuple[int, float]]

STYLES = {
    "triton": ("triton", "#8e44ad", "D"),
    "cpp": ("cpp", "#c0392b", "o"),
    "reference": ("reference", "#2c3e50", "s"),
    "chunked": ("torch in chunks", "#2980b9", "^"),
    "naive": ("torch, naive", "#7f8c8d", "v"),
    "brgemm": ("torch's brgemm", "#16a085", "<"),
    "faiss": ("faiss", "#d68910", ">"),
    "keops": ("KeOps", "#6e2c00", "x"),
}
"""Name, colour and mark of each line: implementations, then rivals."""
_STRIDE = 4
_COLUMNS = 3
_WIDTH, _ASPECT = 9.0, 0.9  # inches of a picture; height of a panel over its width
_ENTRIES, _LINE = 5, 0.2  # of the legend: in a line, inches of a line
_ALONE = "cross_similarity"
_TIME, _MEMORY = "time in ms", "extra memory in MiB"


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
    ran = {row["workload"] for row in panels(result["rows"]).get(op, ())}
    for left in result.get("left_out", []):
        case = (left["op"], left["workload"], left["dtype"], left["pass"])
        of_image = left["workload"].startswith("image_") and left["workload"] not in ran
        if left["op"] == op and of_image and left["dtype"] == "float32":
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


def draw(result: Row, shown: Sequence[tuple[str, bool]], columns: int, path: Path) -> None:
    """A picture with a panel for each operator in `shown`, of its memory or else of its time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    by_op = panels(result["rows"])
    with matplotlib.rc_context():
        matplotlib.rc("svg", hashsalt="cisc_ext", fonttype="none")
        matplotlib.rc("font", size=8)
        matplotlib.rc("axes", grid=True)
        matplotlib.rc("grid", linewidth=0.3)
        count = -(-len(shown) // columns)
        height = count * _ASPECT * _WIDTH / columns
        figure, axes = pyplot.subplots(count, columns, figsize=(_WIDTH, height), squeeze=False)
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        legend: dict[str, Any] = {}
        for number, (axis, (op, of_memory)) in enumerate(zip(axes.flat, shown, strict=False)):
            _draw_panel(axis, result, by_op[op], op, of_memory, legend)
            if number % columns == 0 or of_memory != shown[number - 1][1]:
                axis.set_ylabel(_MEMORY if of_memory else _TIME)
        order = [label for label, *_ in STYLES.values()]
        labels = sorted(legend, key=lambda label: order.index(label) if label in order else len(order))
        handles = [legend[label] for label in labels]
        figure.legend(handles, labels, loc="lower center", ncol=min(_ENTRIES, len(labels)), frameon=False)
        figure.tight_layout(rect=(0, _LINE * -(-len(labels) // _ENTRIES) / height, 1, 1))
        atomic_write(
            path,
            lambda stream: figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}),
        )
        pyplot.close(figure)


def _draw_panel(
    axis: Any, result: Row, rows: list[Row], op: str, of_memory: bool, legend: dict[str, Any]
) -> None:
    memory_mib = 1024 * result["machine"]["memory_gib"]
    for name, points in lines(rows, of_memory).items():
        label, colour, mark = STYLES[name]
        (line,) = axis.loglog(*zip(*points, strict=True), color=colour, marker=mark, markersize=3)
        legend.setdefault(label, line)
    axis.set_title(f"{op}, {'with gradient' if _pass(rows) == 'both' else 'forward'}")
    rows = rows + unmeasured(result, op)
    if of_memory:
        needs = sorted({(image_pixels(row), row["naive_mib"]) for row in rows})
        (line,) = axis.loglog(
            *zip(*needs, strict=True), color=STYLES["naive"][1], linestyle="--", linewidth=0.9
        )
        legend.setdefault("naive, computed", line)
    limit = wall(rows, memory_mib)
    if limit is not None:
        line = axis.axvline(limit, color="black", linestyle=":", linewidth=1)
        legend.setdefault(f"naive needs more than {memory_mib / 1024:.0f} GiB", line)
    ticks = {image_pixels(row): row["workload"].split("_")[1] for row in rows}
    axis.set_xticks([*ticks], [*ticks.values()])
    axis.minorticks_off()
    axis.set_xlabel("image, pixels")


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=summary)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/kernels_cpu.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures")
    flags = parser.parse_args(arguments)
    try:
        result = json.loads(flags.json.read_text())
        ops = [*panels(result["rows"])]
        if not ops:
            raise ValueError("expected rows of images, found none")
        for name, of_memory in (("time", False), ("memory", True)):
            path = flags.out / f"kernels_{name}_{result['device']}.svg"
            draw(result, [(op, of_memory) for op in ops], _COLUMNS, path)
        if _ALONE in ops:
            draw(
                result, [(_ALONE, False), (_ALONE, True)], 2, flags.out / f"similarity_{result['device']}.svg"
            )
    except (OSError, ValueError) as error:
        print(f"error: {flags.json}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
