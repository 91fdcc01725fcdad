"""How the GPU's losses share out cells and pixels: cells.h and walk.h against brute force."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_every_pixel_and_every_point_has_one_thread(tmp_path: Path) -> None:
    """Axes up to 131072, for losses with and without a gradient, on small and large GPUs."""
    program = tmp_path / "walk"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-I", str(TESTS.parent / "csrc")]
    subprocess.run(["g++", *flags, str(TESTS / "walk.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{3,} axes, \d{4,} walks\n", done.stdout), done.stdout
