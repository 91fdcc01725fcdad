"""NVIDIA's tools around a program of this project: where they are, and whether the machine forbids them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

FORBIDDEN = (
    r"ERR_NVGPUCTRPERM",
    r"Device not supported",
    r"LibraryNotLoaded",
    r"[Ii]nsufficient permissions",
    r"[Oo]peration not permitted",
    r"[Pp]rofiling is not supported",
    r"driver .* not supported",
    r"No supported GPU",
)
"""What the tools say where a machine does not let them work, in lines of their own (==...)."""


def find(name: str, env: Mapping[str, str] | None = None) -> str | None:
    """Path of a tool: on PATH, under CUDA_HOME, else in the usual folders."""
    env = os.environ if env is None else env
    folders = [env.get("PATH", "")]
    if env.get("CUDA_HOME"):
        folders += [str(Path(env["CUDA_HOME"]) / "bin"), str(Path(env["CUDA_HOME"]) / "compute-sanitizer")]
    folders += ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return next((found for folder in folders if (found := shutil.which(name, path=folder))), None)


def forbidden(output: str) -> str | None:
    """The line in which a tool says that this machine does not let it work."""
    for line in output.splitlines():
        if line.startswith("==") and any(re.search(pattern, line) for pattern in FORBIDDEN):
            return line.strip("= ")
    return None
