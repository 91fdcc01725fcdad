"""The tables of README.md, made from the result files.

    python -m benchmarks.tables [--check] [--readme FILE] [NAME=FILE ...]

A table stands between the lines `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Without NAME=FILE all tables
of `SOURCES` that README has markers for are refreshed; one of a GPU without a result says that it is awaited.
`--check` changes nothing, and fails if one is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.machine import ROOT
from cisc_ext.files import atomic_write

RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]

_STEP = {
    "step": "step",
    "crop": "crop",
    "variant": "variant",
    "time_ms": "ms",
    "time_min_ms": "least ms",
    "extra_mib": "extra MiB",
    "speedup": "x faster",
    "memory_ratio": "x memory",
}
_METHODS = {
    "method": "method",
    "steps": "steps",
    "supervised_miou": "supervised mIoU",
    "reliable_miou": "first re-training",
    "final_miou": "final mIoU",
    "minutes": "minutes",
    "peak_mib": "peak MiB",
}
_KERNELS = {
    "op": "operator",
    "workload": "workload",
    "pass": "pass",
    "impl": "by",
    "time_ms": "ms",
    "extra_mib": "extra MiB",
    "share_of_ceiling": "of ceiling",
    "naive": "x naive",
    "least": "x best rival",
    "rival": "best rival",
}
_SIMILARITY = {
    "what": "what",
    "dtype": "dtype",
    "impl": "by",
    "time_ms": "ms",
    "tflops": "TFLOP/s",
    "extra_mib": "extra MiB",
    "against": "against",
    "ratio": "ratio",
}
_TARGETS = {
    "op": "operator",
    "dtype": "dtype",
    "pass": "pass",
    "impl": "by",
    "bytes": "bytes",
    "special": "special",
    "instructions": "instructions",
    "floor_us": "floor us",
    "time_ms": "ms",
    "call_ms": "ms of a call",
    "reached": "reached",
    "target": "target",
}
_SWEEPS = {
    "part": "part",
    "what": "what",
    "dtype": "dtype",
    "time_ms": "ms",
    "tflops": "TFLOP/s",
    "ratio": "ratio",
    "extra_mib": "extra MiB",
    "reached": "reached",
    "target": "target",
}
COLUMNS: dict[str, dict[str, str]] = {
    "step": _STEP,
    "step_cuda": _STEP,
    "methods": _METHODS,
    "methods_cuda": _METHODS,
    "kernels": _KERNELS,
    "kernels_cuda": {"op": _KERNELS["op"], "workload": "workload", "dtype": "dtype", "wins": "wins"}
    | {key: heading for key, heading in _KERNELS.items() if key not in ("op", "workload")},
    "similarity": _SIMILARITY,
    "targets_cuda": _TARGETS,
    "sweeps_cuda": _SWEEPS,
}
"""Per table the keys of a row to show, and their headings; a table that is not here shows every key."""


def _nearest(row: Row) -> Row:
    """What a row says of the naive expression and of the fastest rival."""
    speedup = row["speedup"]
    rival = min(speedup, key=lambda name: speedup[name], default=None)
    return {"naive": speedup.get("naive"), "least": speedup.get(rival), "rival": rival}


def _kernels(rows: Sequence[Row]) -> list[Row]:
    """Float32 rows outside ladders, and bfloat16 where pixels are compared with pixels, with the nearest
    rival; without a kernel the reference forward."""

    def case(row: Row) -> tuple[str, ...]:
        return row["op"], row["workload"], row["dtype"], row["pass"]

    written = {case(row) for row in rows if row["impl"] != "reference"}
    shown = []
    for row in rows:
        unwritten = row["pass"] != "backward" and case(row) not in written
        low = row["dtype"] == "bfloat16" and row["mode"] is not None
        wanted = (row["dtype"] == "float32" or low) and not row["ladder"]
        if wanted and (row["impl"] != "reference" or unwritten):
            workload = f"{row['workload']}, bfloat16" if low else row["workload"]
            shown.append({**row, **_nearest(row), "workload": workload})
    return shown


def _kernels_cuda(rows: Sequence[Row]) -> list[Row]:
    """Rows outside ladders, in all precisions, with the fastest implementation of each case; the reference
    where nothing else ran."""
    by_case: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not row["ladder"]:
            by_case.setdefault((row["op"], row["workload"], row["dtype"], row["pass"]), []).append(row)
    shown = []
    for of_case in by_case.values():
        wins = min(of_case, key=lambda row: float(row["time_ms"]))["impl"]
        written = [row for row in of_case if row["impl"] != "reference"]
        shown += [{**row, **_nearest(row), "wins": wins} for row in written or of_case]
    return shown


CHOSEN: dict[str, Callable[[Sequence[Row]], list[Row]]] = {
    "kernels": _kernels,
    "kernels_cuda": _kernels_cuda,
}
"""Which rows of a result a table shows, where it is not all as they are."""
SOURCES = {
    "kernels": RESULTS / "kernels_cpu.json",
    "kernels_cuda": RESULTS / "kernels_cuda.json",
    "similarity": RESULTS / "similarity_cpu.json",
    "step": RESULTS / "step_cpu.json",
    "step_cuda": RESULTS / "step_cuda.json",
    "targets_cuda": RESULTS / "targets_cuda.json",
    "sweeps_cuda": RESULTS / "sweeps_cuda.json",
    "methods": RESULTS / "methods_camvid.json",
    "methods_cuda": RESULTS / "methods_camvid_cuda.json",
}


def _cells(name: str, rows: Sequence[Row]) -> list[list[str]]:
    rows = CHOSEN.get(name, list)(rows)
    columns = COLUMNS.get(name) or {key: key.replace("_", " ") for row in rows for key in row}
    return [list(columns.values()), *([_text(row.get(key)) for key in columns] for row in rows)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def _padded(name: str, rows: Sequence[Row]) -> tuple[list[list[str]], list[bool]]:
    """Cells of equal width, and which columns hold numbers."""
    cells = _cells(name, rows)
    columns = list(zip(*cells, strict=True))
    numeric = [all(re.fullmatch(r"-?[\d.]*(e[-+]\d+)?", cell) for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(line, widths, numeric, strict=True)]
        for line in cells
    ]
    return padded, numeric


def aligned(name: str, rows: Sequence[Row]) -> str:
    """A table for the terminal."""
    return "\n".join("  ".join(line).rstrip() for line in _padded(name, rows)[0])


def markdown(name: str, rows: Sequence[Row]) -> str:
    """A table for README."""
    cells, numeric = _padded(name, rows)
    rule = ["-" * (len(c) - 1) + (":" if n else "-") for c, n in zip(cells[0], numeric, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def table(name: str, path: Path) -> str:
    """The table of a result file, with a line that says where it was measured."""
    result = json.loads(path.read_text())
    machine, versions = result["machine"], result["versions"]
    where = (
        machine["gpu"] if result.get("device") == "cuda" else f"{machine['cpu']}, {result['threads']} threads"
    )
    command = re.sub(r"(--data-root|--labels) ('[^']*'|\S+)", r"\1 DATA", result["command"])
    return f"{markdown(name, result['rows'])}\n\n{where}, torch {versions['torch']}: `{command}`"


AWAITED = "Awaits a GPU: `make gpu` measures it."


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def replace_between(text: str, name: str, content: str) -> str:
    """`text` with the lines between the markers of `name` replaced; `ValueError` without exactly one pair."""
    begin, end = _markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} and one {end} after it")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.partition(end)[2]}"


def refreshed(text: str, sources: dict[str, Path]) -> str:
    """`text` with the table of each source."""
    for name, path in sources.items():
        awaited = name.endswith("_cuda") and path == SOURCES.get(name) and not path.is_file()
        text = replace_between(text, name, AWAITED if awaited else table(name, path))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=summary)
    parser.add_argument(
        "sources", nargs="*", metavar="NAME=FILE", help="tables to refresh (default: all known)"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    settings = parser.parse_args(arguments)
    try:
        text = settings.readme.read_text()
        given = dict(source.split("=", 1) for source in settings.sources if "=" in source)
        if len(given) != len(settings.sources):
            parser.error("sources must be NAME=FILE, each NAME once")
        known = {name: path for name, path in SOURCES.items() if _markers(name)[0] in text}
        new = refreshed(text, {name: Path(path) for name, path in given.items()} or known)
    except (OSError, ValueError) as error:
        print(f"error: {settings.readme}: {error}", file=sys.stderr)
        return 1
    if new == text:
        return 0
    if settings.check:
        print(f"error: {settings.readme.name} is stale, run: python -m benchmarks.tables", file=sys.stderr)
        return 1

    def write(stream: BinaryIO) -> None:
        stream.write(new.encode())

    atomic_write(settings.readme, write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
