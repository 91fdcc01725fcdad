"""Loads the compiled operators, once, and remembers why not where they cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["LOADED", "PATH", "REASON", "load"]

PATH = Path(__file__).resolve().parent.parent / "_ops.so"
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
        REASON = f"{PATH.name} was not built (pip install --no-build-isolation -e .)"
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
