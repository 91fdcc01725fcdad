"""The implementations of an operator, why one cannot serve a call, and why "auto" passes over one that can.

Functions of the call and of what a machine has, `registry.Found`; `HERE` is that of this machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sysconfig
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from . import _library, _tiles
from .registry import Call, Found, Implementation, never

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
"""Compute capability that Triton supports."""
OLDEST_CUDA = (7, 5)
"""The same of the CUDA kernels."""

_CUDA_FASTER = {("cross_similarity", (9, 0)): "sm_90a"}
"""Operators and compute capabilities, with what CUDA kernels must be compiled for that were measured to be
faster than Triton's: forward in float16, by "max", "topk" and "softmax" (`benchmarks.sweeps`)."""

Reasons = Callable[[Call], list[str]]


def _look() -> Found:
    kernels = set()
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if _library.LOADED else []:
        namespace, _, operator = name.partition("::")
        if namespace == "cisc_ext":
            kernels.add(operator)
    return Found(
        library="" if _library.LOADED else _library.REASON,
        triton=_triton_missing(),
        driver=driver_missing(os.environ),
        interpreted=interprets(os.environ),
        cuda_kernels=frozenset(kernels),
        cuda_faster=faster(_library.chips()),
    )


def faster(chips: Collection[str]) -> frozenset[tuple[str, tuple[int, int]]]:
    """Operators that are faster in CUDA than in Triton in a build for these chips, each with the compute
    capability of the GPU."""
    return frozenset(one for one, chip in _CUDA_FASTER.items() if chip in chips)


def _triton_missing() -> str:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install triton)"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton must be {'.'.join(map(str, OLDEST_TRITON))} or newer, got {version}"
    return ""


def interprets(env: Mapping[str, str]) -> bool:
    """Whether Triton runs its kernels in its interpreter, as it reads the environment."""
    return env.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def driver_missing(env: Mapping[str, str]) -> str:
    """Why Triton cannot be started on a GPU: it compiles a little C there, some versions for each kernel."""
    path = env.get("PATH", "")
    if not env.get("CC") and not any(shutil.which(name, path=path) for name in ("gcc", "clang")):
        return "Triton needs a C compiler (CC, gcc or clang) on a GPU, found none"
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme for what pip installs names a folder without headers.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return (
        "" if header.is_file() else f"Triton needs the headers of this Python on a GPU, {header} is missing"
    )


HERE = _look()
"""What this machine has."""


def triton_description() -> str:
    """A line on Triton: its version, where it runs, and where its kernels' tiles come from."""
    if HERE.triton:
        return f"Triton: none ({HERE.triton})"
    where = "interpreted on the CPU (TRITON_INTERPRET=1)" if HERE.interpreted else "compiled for GPUs"
    stored = _tiles.path()
    tiles = (
        f"tiles of the fixed tables and {stored}" if os.path.isfile(stored) else "tiles of the fixed tables"
    )
    mode = os.environ.get("CISC_AUTOTUNE") or "0"
    return f"Triton: {importlib.metadata.version('triton')}, {where}; {tiles}, CISC_AUTOTUNE={mode}"


def implementations(
    name: str, cpp: Callable[..., Any], triton: Callable[..., Any], reference: Callable[..., Any]
) -> tuple[Implementation, ...]:
    """An operator's implementations, in the order in which "auto" tries them."""
    return (
        Implementation("cpp", cpp, cpp_obstacles(name), cpp_reservations(name)),
        Implementation("triton", triton, triton_obstacles, triton_reservations),
        Implementation("reference", reference, never),
    )


def cpp_obstacles(name: str) -> Reasons:
    """Why the compiled operator of that name cannot serve a call."""

    def obstacles(call: Call) -> list[str]:
        found = call.found or HERE
        reasons = [found.library] if found.library else []
        if call.device == "cuda" and name not in found.cuda_kernels:
            reasons.append(f"there is no CUDA kernel of {name} in this build")
        elif call.device == "cuda" and call.capability is not None and call.capability < OLDEST_CUDA:
            reasons.append(_too_old("the CUDA kernels need", OLDEST_CUDA, call.capability))
        elif call.device not in ("cpu", "cuda"):
            reasons.append(f"there is no C++ kernel of {name} for {call.device} tensors")
        return reasons + _not_float64(call)

    return obstacles


def cpp_reservations(name: str) -> Reasons:
    """Why "auto" passes over a CUDA kernel: Triton can serve the call and was not measured to be slower on
    such a GPU."""

    def reservations(call: Call) -> list[str]:
        found = call.found or HERE
        if call.device != "cuda" or (name, call.capability) in found.cuda_faster or triton_obstacles(call):
            return []
        return ["its CUDA kernel was not measured to be faster than Triton's on such a GPU"]

    return reservations


def triton_obstacles(call: Call) -> list[str]:
    """Why Triton's kernels cannot serve a call."""
    found = call.found or HERE
    reasons = [found.triton] if found.triton else []
    if call.device == "cpu" and not found.interpreted:
        reasons.append("Triton runs on the CPU in its interpreter only (TRITON_INTERPRET=1)")
    elif call.device == "cuda" and found.interpreted:
        reasons.append("TRITON_INTERPRET=1 has Triton run on the CPU")
    elif call.device == "cuda" and found.driver:
        reasons.append(found.driver)
    elif call.device == "cuda" and call.capability is not None and call.capability < OLDEST_CAPABILITY:
        reasons.append(_too_old("Triton needs", OLDEST_CAPABILITY, call.capability))
    elif call.device not in ("cpu", "cuda"):
        reasons.append(f"there is no Triton kernel for {call.device} tensors")
    return reasons + _not_float64(call)


def _too_old(who_needs: str, oldest: tuple[int, int], capability: tuple[int, int]) -> str:
    needed, got = (".".join(map(str, one)) for one in (oldest, capability))
    return f"{who_needs} compute capability {needed}, this GPU has {got}"


def triton_reservations(call: Call) -> list[str]:
    """Why "auto" passes over Triton on the CPU."""
    return ["its interpreter is there for tests"] if call.device == "cpu" else []


def _not_float64(call: Call) -> list[str]:
    return ["float64 is the reference's"] if torch.float64 in call.dtypes else []
