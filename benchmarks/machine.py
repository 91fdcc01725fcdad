"""What a result was measured with: machine, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


def first_line(*command: str) -> str | None:
    """First line that a command prints; None where there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0] if done.returncode == 0 else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the source, with "+dirty" where tracked files other than results differ from it.

    A copy that lacks its history is told it by CISC_COMMIT.
    """
    if os.environ.get("CISC_COMMIT"):
        return os.environ["CISC_COMMIT"]
    commit = first_line("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = first_line(
        "git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results"
    )
    return f"{commit}+dirty" if changed else commit


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _portable(word: str) -> str:
    """An argument without the folders of this machine."""
    return Path(word).name if Path(word).is_absolute() else word


def facts(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The head of every result file, of `python -m module arguments`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {
            "cpu": _cpu_model(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cores": cores,
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpu": gpu,
        },
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "compiler": first_line(os.environ.get("CXX", "c++"), "--version"),
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        },
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module, *map(_portable, arguments)]),
        "threads": torch.get_num_threads(),
    }
