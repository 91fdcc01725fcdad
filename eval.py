"""Score a checkpoint: `python eval.py CHECKPOINT --data-root DIR [flags]`; `--help` lists them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cisc_ext import checkpoint, method
from cisc_ext.cli import OneLineParser, reporting
from cisc_ext.config import PRECISIONS, MethodConfig
from cisc_ext.data.datasets import DATASETS, DatasetSpec, Item, load_list, pseudo_path
from cisc_ext.data.pairs import EvalSet, eval_loader
from cisc_ext.engine import Views, decide_runtime, evaluate
from cisc_ext.files import write_json
from cisc_ext.models import BACKBONES, MODELS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = OneLineParser(prog="eval.py", description="Score a checkpoint on a list of labeled images.")
    p.add_argument(
        "checkpoint", type=Path, help="file in checkpoints/ of a run, or a published ST++ or CISC-R model"
    )
    p.add_argument(
        "--data-root", type=Path, required=True, help="folder that the list's paths are relative to"
    )
    p.add_argument(
        "--list", type=Path, help="images to score; by default val.txt in --data-root or its splits/"
    )
    p.add_argument(
        "--mode", choices=("whole", "slide"), default="whole", help="whole images or overlapping windows"
    )
    p.add_argument(
        "--window", type=int, help="side of a window in pixels; by default the crop of the training"
    )
    p.add_argument("--tta", action="store_true", help="average over scales and mirror images")
    scales = " ".join(map(str, MethodConfig.tta_scales))
    p.add_argument("--scales", type=float, nargs="+", metavar="FLOAT", help=f"of --tta (default: {scales})")
    p.add_argument(
        "--save-masks", type=Path, metavar="DIR", help="write the predicted classes as palette PNGs"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the scores as JSON")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    p.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the network (default: auto)")
    p.add_argument("--workers", type=int, default=2, help="processes that read images (default: 2)")
    foreign = p.add_argument_group("network", "needed for a checkpoint that does not say what it is")
    foreign.add_argument("--dataset", choices=tuple(DATASETS))
    foreign.add_argument("--model", choices=MODELS)
    foreign.add_argument("--backbone", choices=BACKBONES)
    foreign.add_argument("--output-stride", type=int)
    foreign.add_argument(
        "--load-size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="size to read images at"
    )
    return p


def network_spec(flags: argparse.Namespace) -> checkpoint.NetworkSpec:
    """What the checkpoint holds: its own word, and the flags for what it does not say; they must not
    contradict it."""
    given = {
        name: getattr(flags, name)
        for name in ("model", "backbone", "output_stride", "dataset")
        if getattr(flags, name) is not None
    }
    if flags.load_size is not None:
        given["load_size"] = tuple(flags.load_size)
    spec = checkpoint.read_spec(flags.checkpoint)
    if spec is not None:
        for name in ("model", "backbone", "dataset"):
            if name in given and given[name] != getattr(spec, name):
                raise ValueError(
                    f"--{name} {given[name]} contradicts {flags.checkpoint}: {getattr(spec, name)}"
                )
        return dataclasses.replace(spec, **given)
    missing = [f"--{name}" for name in ("dataset", "model", "backbone") if name not in given]
    if missing:
        raise ValueError(f"{flags.checkpoint} does not say what it is: add {', '.join(missing)}")
    return checkpoint.NetworkSpec(num_classes=DATASETS[given["dataset"]].num_classes, **given)


def images(spec: DatasetSpec, flags: argparse.Namespace) -> tuple[Item, ...]:
    """The images to score."""
    if flags.list is not None:
        return load_list(spec, flags.data_root, flags.list)
    for folder in (flags.data_root, flags.data_root / "splits"):
        if (folder / "val.txt").is_file():
            return load_list(spec, flags.data_root, folder / "val.txt")
    raise FileNotFoundError(f"{flags.data_root}: no val.txt there or in splits/; name one with --list")


def refuse_overwriting(folder: Path, items: Sequence[Item]) -> None:
    """`ValueError` where a mask written under `folder` would replace an image or label of the data set."""
    sources = {path.resolve() for item in items for path in (item.image, item.label) if path is not None}
    for item in items:
        target = pseudo_path(folder, item.name)
        if target.resolve() in sources:
            raise ValueError(f"--save-masks {folder}: would overwrite {target} of the data set")


def scores(spec: DatasetSpec, confusion: Tensor) -> dict[str, Any]:
    """mIoU, pixel accuracy and IoU of each class, as fractions; null for a class that is nowhere."""
    counts = confusion.double()
    total = float(counts.sum())
    return {
        "miou": method.mean_iou(confusion),
        "pixel_accuracy": float(counts.diagonal().sum()) / total if total else 0.0,
        "per_class_iou": dict(zip(spec.classes, method.class_iou(confusion), strict=True)),
    }


def run(flags: argparse.Namespace) -> None:
    """Score, print, write."""
    if flags.scales is not None and not flags.tta:
        raise ValueError("--scales belongs to --tta")
    if flags.window is not None and flags.mode != "slide":
        raise ValueError("--window belongs to --mode slide")
    if flags.scales is not None and not all(scale > 0 for scale in flags.scales):
        raise ValueError(f"--scales must be above 0, got {' '.join(map(str, flags.scales))}")
    if flags.window is not None and flags.window < 1:
        raise ValueError(f"--window must be at least 1, got {flags.window}")
    if flags.json is not None and flags.json.is_dir():
        raise ValueError(f"--json {flags.json}: is a folder, expected a file")
    network = network_spec(flags)
    spec = DATASETS[network.dataset or flags.dataset]
    runtime = decide_runtime(flags.device, flags.precision)
    items = images(spec, flags)
    if flags.save_masks is not None:
        refuse_overwriting(flags.save_masks, items)
    window = 0
    if flags.mode == "slide":
        window = flags.window or network.crop_size or spec.crop_size
    scales = tuple(flags.scales or MethodConfig.tta_scales) if flags.tta else (1.0,)
    views = Views(scales, flip=flags.tta, window=window)
    print("\n".join(runtime.reasons))
    confusion = evaluate(
        runtime.move(checkpoint.load_network(flags.checkpoint, network)),
        eval_loader(EvalSet(spec, items, load_size=network.load_size, cache_mib=0), workers=flags.workers),
        len(items),
        runtime,
        spec,
        views,
        flags.save_masks,
    )
    result = scores(spec, confusion)
    for name, iou in result["per_class_iou"].items():
        print(f"{name:<20} {'absent' if iou is None else f'{iou:.4f}':>7}")
    print(f"{'mIoU':<20} {result['miou']:>7.4f}\n{'pixel accuracy':<20} {result['pixel_accuracy']:>7.4f}")
    if flags.json is not None:
        settings = {
            "checkpoint": str(flags.checkpoint),
            "images": len(items),
            "mode": flags.mode,
            "window": window,
        }
        write_json(flags.json, {**settings, "scales": scales, "flip": flags.tta, **result})


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and score; one line and a non-zero status where that cannot be."""
    flags = parser().parse_args(arguments)
    return reporting("eval.py", lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())
