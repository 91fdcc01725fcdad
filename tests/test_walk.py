"""How the GPU's losses share out cells and pixels: cells.h and walk.h against brute force."""

from __future__ import annotations

import re
from pathlib import Path

from programs import TESTS, compile_program, needs_gcc, run_program


@needs_gcc
def test_every_pixel_and_every_point_has_one_thread(tmp_path: Path) -> None:
    """Axes up to 131072, for losses with and without a gradient, on small and large GPUs."""
    done = run_program(compile_program(tmp_path / "walk", TESTS / "walk.cpp"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{3,} axes, \d{4,} walks\n", done.stdout), done.stdout
