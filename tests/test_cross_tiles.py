"""Which tiles of a guide a group of query pixels meets on tensor cores: cross_similarity_tiles.h, by brute
force."""

from __future__ import annotations

import re
from pathlib import Path

from programs import TESTS, compile_program, needs_gcc, run_program


@needs_gcc
def test_every_pair_is_met_once_and_every_product_made(tmp_path: Path) -> None:
    program = compile_program(tmp_path / "cross_tiles", TESTS / "cross_tiles.cpp")
    done = run_program(program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{7,} pairs, \d{4,} walks, \d{3,} steps\n", done.stdout), done.stdout
