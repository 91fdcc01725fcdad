"""Pixels sorted by class for GPU kernels, and who meets whom: class_sort.h against brute force."""

from __future__ import annotations

import re
from pathlib import Path

from programs import CSRC, TESTS, compile_program, needs_gcc, run_program


def _constant(source: str, name: str) -> int:
    """Value of a C++ constant that is written as number or number << number."""
    text = (CSRC / source).read_text()
    found = re.search(rf"\b{name} = (\d+)(?: << (\d+))?[,;]", text)
    assert found is not None, name
    return int(found[1]) << int(found[2] or 0)


@needs_gcc
def test_every_pair_of_equal_labels_is_met_once(tmp_path: Path) -> None:
    """Up to 131072 pixels against as many; and what schedules leave fits their workspace."""
    program = compile_program(tmp_path / "class_sort", TESTS / "class_sort.cpp")
    workspace = _constant("cross_similarity_plan.h", "kResultBytes")
    images = _constant("cross_similarity_plan.h", "kImageBytes")
    assert workspace + images <= 64 << 20
    state_bytes, winner_bytes = 32, 8
    winners = _constant("cross_similarity_plan.h", "kSharedWinners")
    for pixel_bytes in (state_bytes, state_bytes + winner_bytes * winners):
        done = run_program(program, str(workspace), str(pixel_bytes))
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.fullmatch(r"\d{7,} pairs, \d+ tiles, \d+ units\n", done.stdout), done.stdout
