"""C++ programs of the tests: compiled by g++, and run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
SIMT = TESTS / "simt"

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compile_program(to: Path, *sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """The program `to`; sources may include what lies in csrc and tests/simt."""
    words = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-I", str(CSRC), "-I", str(SIMT)]
    done = subprocess.run([*words, *flags, *map(str, sources), "-o", str(to)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to


def run_program(
    program: Path, *words: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], env=env, capture_output=True, text=True, timeout=120)
