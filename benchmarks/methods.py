"""The methods side by side on CamVid: scores, time and memory of whole runs.

    python -m benchmarks.methods --data-root DIR [--device cpu|cuda] [--split DIR] [--runs DIR]
        [--only NAME ...] [--json FILE]

On a CPU at a size for a small machine; on a GPU at full size, with the preset's network, for few steps. A run
is `train.py camvid` with the same settings; one that is there already is gone on with. Results are written
after each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.tables import aligned
from cisc_ext.files import write_json

SETTINGS = [
    "--model",
    "pspnet",
    "--backbone",
    "resnet18",
    "--output-stride",
    "16",
    "--load-size",
    "240",
    "180",
    "--base-size",
    "240",
    "--crop-size",
    "129",
    "--batch-size",
    "16",
    "--tta-scales",
    "0.75",
    "1",
    "1.5",
    "--intervals",
    "6",
    "--workers",
    "0",
]
SETTINGS_CUDA = ["--intervals", "2", "--workers", "12"]
RUNS_CUDA = {
    "sup": ["--method", "sup", "--steps", "200"],
    "cisc-r": ["--method", "cisc-r", "--steps", "200"],
}
RUNS = {
    "sup": ["--method", "sup", "--steps", "600"],
    "cisc-r": ["--method", "cisc-r", "--steps", "600"],
    "stpp": ["--method", "stpp", "--steps", "600"],
    "sup, three times the steps": ["--method", "sup", "--steps", "1800"],
}


def row(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """A line of the table from a run's metrics.json."""
    trained = [entry for entry in metrics["stages"] if entry["miou"] is not None]
    scores = [round(entry["miou"], 4) for entry in trained]
    return {
        "method": name,
        "steps": sum(entry["steps"] for entry in trained),
        "supervised_miou": scores[0],
        "reliable_miou": scores[1] if len(scores) > 1 else None,
        "final_miou": round(metrics["final"]["miou"], 4),
        "minutes": round(sum(entry["seconds"] for entry in metrics["stages"]) / 60, 1),
        "peak_mib": round(max(entry["peak_mib"] for entry in metrics["stages"])),
        "per_class_iou": metrics["final"]["per_class_iou"],
        "stages": metrics["stages"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; stops at the first run that fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data-root", type=Path, required=True, help="folder of CamVid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--split", type=Path, help="lists (default: splits/1_8/split_0 in --data-root)")
    parser.add_argument(
        "--runs", type=Path, default=machine.ROOT / "runs" / "methods", help="folder for the runs"
    )
    parser.add_argument(
        "--only", nargs="+", choices=tuple(RUNS), metavar="NAME", help="runs (default: all of the device)"
    )
    parser.add_argument("--steps", type=int, help="of every training, to try it out; the results are marked")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    flags = parser.parse_args(arguments)
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU")
    on_gpu = flags.device == "cuda"
    settings, runs = (SETTINGS_CUDA, RUNS_CUDA) if on_gpu else (SETTINGS, RUNS)
    if unknown := [name for name in flags.only or () if name not in runs]:
        parser.error(f"--only: on {flags.device} must be of {', '.join(runs)}, got {', '.join(unknown)}")
    file = "methods_camvid_cuda.json" if on_gpu else "methods_camvid.json"
    path = flags.json or machine.ROOT / "benchmarks" / "results" / file
    rows: list[dict[str, Any]] = []
    facts = {
        **machine.facts("benchmarks.methods", arguments),
        "device": flags.device,
        "shortened": flags.steps is not None,
    }
    for name in flags.only or runs:
        out = flags.runs / name.replace(", ", "_").replace(" ", "_")
        split = flags.split or flags.data_root / "splits" / "1_8" / "split_0"
        where = [
            "--data-root",
            str(flags.data_root),
            "--split",
            str(split),
            "--out",
            str(out),
            "--device",
            flags.device,
        ]
        short = [] if flags.steps is None else ["--steps", str(flags.steps), "--intervals", "1"]
        resume = ["--resume"] if (out / "config.json").exists() else []
        train = [str(machine.ROOT / "train.py"), "camvid", *settings, *runs[name], *where, *short, *resume]
        done = subprocess.run([sys.executable, *train], check=False)
        if done.returncode:
            return done.returncode
        rows.append(row(name, json.loads((out / "metrics.json").read_text())))
        write_json(path, {**facts, "settings": settings, "rows": rows})
    print(aligned("methods", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
