"""Train from few labels: `python train.py PRESET [flags]`; `--help` lists them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch

from cisc_ext import stages
from cisc_ext.cli import reporting
from cisc_ext.config import Config, parse
from cisc_ext.data import synthetic
from cisc_ext.data.datasets import DATASETS
from cisc_ext.engine import decide_runtime
from cisc_ext.ops.registry import choices
from cisc_ext.runs import RunFolder

DEMO_DATA = "demo_data"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, decide, run the stages that are not finished, and print what they gave."""
    config = parse(arguments)
    return reporting("train.py", lambda: run(config))


def run(config: Config) -> None:
    """The visible stages of a run."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    runtime = decide_runtime(config.run.device, config.run.precision)
    folder = RunFolder(config.out, config, DATASETS[config.preset].classes)
    if config.preset == "demo" and config.data.data_root is None:
        root = config.out.parent / DEMO_DATA
        lists = synthetic.generate(root)
        data = dataclasses.replace(config.data, data_root=str(root), split=str(lists))
        config = dataclasses.replace(config, data=data)
    setup = stages.prepare(config, runtime, folder)
    folder.open({"precision": runtime.precision, "images": setup.split.fingerprint()})
    print_decisions(setup)
    names = stages.STAGES[config.method.method]
    for stage in names:
        if not folder.finished(stage):
            stages.run_stage(setup, stage)
    folder.write_final(names[-1])
    folder.close()
    print_table(folder)


def print_decisions(setup: stages.Setup) -> None:
    """What was decided at start, and why."""
    split, config = setup.split, setup.config
    sizes = f"{len(split.labeled)} labeled, {len(split.unlabeled)} unlabeled, {len(split.val)} validation"
    lines = [f"data: {sizes} images", *setup.runtime.reasons, f"threads: {torch.get_num_threads()}"]
    lines += [f"operator {line}" for line in choices(setup.runtime.device.type)]
    lines.append(f"method: {config.method.method}; run folder: {setup.run.path}")
    print("\n".join(lines), flush=True)


def print_table(folder: RunFolder) -> None:
    """Time, memory and mIoU of each stage."""
    print(f"{'stage':<18} {'mIoU':>7} {'steps':>7} {'seconds':>9} {'peak MiB':>9}")
    for entry in folder.metrics["stages"]:
        miou = "" if entry["miou"] is None else f"{entry['miou']:.4f}"
        print(f"{entry['name']:<18} {miou:>7} {entry['steps']:>7} ", end="")
        print(f"{entry['seconds']:>9.1f} {entry['peak_mib']:>9.0f}")
    print(f"final mIoU {folder.metrics['final']['miou']:.4f}; {folder.path / 'metrics.json'}")


if __name__ == "__main__":
    sys.exit(main())
