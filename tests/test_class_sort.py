"""Pixels sorted by class for GPU kernels, and who meets whom: class_sort.h and .cuh against brute force."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from programs import CSRC, SIMT, TESTS, compile_program, needs_gcc, run_program


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


@pytest.fixture(scope="module")
def sort_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    include = Path(torch.__file__).parent / "include"
    stable = ("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include))
    flags = ("-DCISC_SIMT", *stable, "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
    to = tmp_path_factory.mktemp("sort_items") / "main"
    return compile_program(to, TESTS / "sort_items.cpp", *sorted(SIMT.glob("*.cpp")), flags=flags)


@needs_gcc
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle", "warps_reverse"])
def test_sort_is_stable(sort_items: Path, order: str) -> None:
    """By one block and by chunks, of up to 70 chunks, in simulated kernels."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    done = run_program(sort_items, env=kept | {"CISC_SIMT_ORDER": order})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{6,} items\n", done.stdout), done.stdout
