"""Loads the compiled operators, once, and remembers why not where they cannot be loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .registry import OPERATORS

__all__ = ["LOADED", "PATH", "REASON", "compiled", "load", "register"]

PATH = Path(os.environ.get("CISC_OPS") or Path(__file__).resolve().parent.parent / "_ops.so")
"""The library; CISC_OPS names another one, such as one built with CISC_SIMT=1."""
OLDEST_TORCH = (2, 10)

LOADED: bool = False
"""Whether `torch.ops.cisc_ext` holds the compiled operators."""
REASON: str = "not loaded yet"
"""Why they are not there, in one line; empty where they are."""


def load() -> None:
    """Load the operators if they are not yet there; sets `LOADED` and `REASON`."""
    global LOADED, REASON
    if LOADED:
        return
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not PATH.is_file():
        REASON = (
            f"{PATH.name} was not built, for want of a C++ compiler or by CISC_CPP=0"
            " (pip install --no-build-isolation -e .)"
        )
    elif version < OLDEST_TORCH:
        REASON = f"torch must be 2.10 or newer, got {torch.__version__}"
    else:
        try:
            torch.ops.load_library(str(PATH))
        except OSError as error:
            # torch's own message names the path alone; the loader's is its cause.
            REASON = f"{PATH.name} cannot be loaded: {' '.join(str(error.__cause__ or error).split())}"
        else:
            LOADED, REASON = True, ""


load()


def register(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Teach torch the shapes and the gradient of a compiled operator, where it is there."""
    if not LOADED:
        return
    torch.library.register_fake(f"cisc_ext::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(f"cisc_ext::{name}", backward, setup_context=setup_context)


def refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
    """The gradient of a gradient that has none: an error, as torch gives it for the references."""
    raise RuntimeError("there is no autograd formula for second derivatives of this operator")


def compiled(name: str) -> Callable[..., Any]:
    """The compiled operator, looked up when it is called."""

    def run(*arguments: Any) -> Any:
        return getattr(torch.ops.cisc_ext, name)(*arguments)

    return run


def description() -> list[str]:
    """Lines on the compiled operators: where they are, what they were built with and for, and what was left
    out."""
    if not LOADED:
        return [f"compiled operators: none ({REASON})"]
    lines = [f"compiled operators: {PATH.name}"]
    try:
        from cisc_ext import _build  # only there once the extension is built
    except ImportError as error:
        return [*lines, f"build facts: none ({error})"]
    for name, value in _build.info().items():
        shown = " ".join(value) if isinstance(value, tuple) else value
        if shown:
            lines.append(f"  {name.replace('_', ' ')}: {shown}")
    return lines


def chips() -> tuple[str, ...]:
    """What the CUDA kernels were compiled for, such as "sm_90a"."""
    try:
        from cisc_ext import _build
    except ImportError:
        return ()
    return _build.CUDA_CHIPS if LOADED else ()


def plans(threads: int) -> list[str]:
    """A line per compiled operator: what its launcher makes of the first of its workloads, in float32."""
    if not LOADED:
        return []
    try:
        from cisc_ext import _build
    except ImportError:
        return []
    lines = []
    for name, operator in sorted(OPERATORS.items()):
        if all(one.name != "cpp" for one in operator.implementations):
            continue
        inputs = next(operator.workloads()).make()
        sized = {key: getattr(value, "shape", value) for key, value in inputs.items()}
        shapes = {key: tuple(value) for key, value in sized.items() if isinstance(value, tuple)}
        made = _build.plan(name, shapes, "float32", "cpu", bool(operator.differentiable), threads)
        first = operator.features[0]
        place = f"{'x'.join(map(str, shapes[first]))} {first}"
        tile = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in made["tile"].items())
        lines.append(
            f"{name} at {place}: {tile}; workspace {made['workspace_bytes'] / 2**20:.2f} MiB,"
            f" {made['flops'] / 1e9:.3f} GFLOP, {made['bytes'] / 1e6:.1f} MB moved"
        )
    return lines
