"""Tensor cores in the simulator: where elements lie, and that a kernel which lacks a wait is found out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from programs import SIMT, TESTS, compile_program, needs_gcc, run_program

pytestmark = needs_gcc

ORDERS = ("forward", "reverse", "shuffle")
TIMES = ("late", "early", "mixed")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    include = Path(torch.__file__).parent / "include"
    stable = ("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include))
    flags = ("-DCISC_SIMT", *stable, "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-Wno-psabi")
    to = tmp_path_factory.mktemp("tensor_cores") / "main"
    return compile_program(to, TESTS / "tensor_cores.cpp", *sorted(SIMT.glob("*.cpp")), flags=flags)


def run(program: Path, *words: str, order: str, time: str, chip: str = "90") -> str:
    """How many numbers are wrong, or the message that the process has ended with."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    env = {"CISC_SIMT_ORDER": order, "CISC_SIMT_ASYNC": time, "CISC_SIMT_CHIP": chip}
    done = run_program(program, *words, env=kept | env)
    assert done.returncode == 0 or done.stderr.startswith("simt: block ")
    return done.stdout if done.returncode == 0 else done.stderr


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "what", ["tiles", "warps", "copies", "pipeline", "registers", "handed", "more_registers"]
)
def test_right_kernels(program: Path, what: str, order: str, time: str) -> None:
    """Of tiles, each number is where fragments of tensor_cores.cuh say, which the simulator does not use."""
    assert run(program, what, order=order, time=time) == "0"


STUCK = "its block cannot go on"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("what", "broken", "message"),
    [
        ("copies", "no_copies_wait", "ends while its copies"),
        ("copies", "too_few_copies_waited", "ends while its copies"),
        ("copies", "waits_after_reading", ""),
        ("registers", "factor_changed", ""),
        ("registers", "written_behind", "a product reads where threads have written"),
        ("handed", "no_meeting", "arrives twice at barrier 2"),
        ("handed", "no_meeting_back", "arrives twice at barrier 1"),
        ("handed", "never_back", "threads 64 to 95: barrier 2, where 32 of 96 threads are"),
        ("handed", "another_count", "a barrier of"),
        ("more_registers", "part_of_a_group", "which 64 of a warp group's 128 threads have asked for"),
        ("more_registers", "none_given", "the block has 0 to spare"),
        ("pipeline", "no_barriers", "this barrier has not been set"),
        ("pipeline", "no_barriers_set", "barriers_set is missing"),
        ("pipeline", "no_first_cluster_sync", "before the cluster has met"),
        ("pipeline", "no_last_cluster_sync", "but that block has ended"),
        ("pipeline", "misaligned", "does not start at a multiple of 1024 bytes"),
        ("pipeline", "no_wait_for_full", "on their way read|a copy on its way brings"),
        ("pipeline", "no_wait_for_empty", "more arrivals than the barrier takes"),
        ("pipeline", "too_many_bytes", "which lacks 0 arrivals and 16 bytes"),
        ("pipeline", "part_of_a_copy", "more bytes than the barrier has been told to expect"),
        ("pipeline", "all_but_one_copy", "more bytes than|on their way read|a copy on its way brings"),
        ("pipeline", "arrives_twice", "more arrivals than the barrier takes"),
        ("pipeline", "never_released", STUCK),
        ("pipeline", "no_products_begin", "products_begin is missing"),
        ("pipeline", "different_products", "ask for different products"),
        ("pipeline", "released_early", "a copy to what products on their way read"),
        ("pipeline", "sums_changed", "sums were changed while products"),
        ("pipeline", "sums_read_early", ""),
        ("pipeline", "no_products_wait", "ends while its products"),
    ],
)
def test_broken_kernels(program: Path, what: str, broken: str, message: str, order: str) -> None:
    """In any order they end with that message, or without one give wrong numbers."""
    found = run(program, what, broken, order=order, time="late")
    if message:
        assert any(part in found for part in message.split("|")), found
    else:
        assert int(found) > 0


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "broken",
    [
        "written",
        "copied_by_threads",
        "written_by_all",
        "written_by_one",
        "written_before",
        "written_on_its_way",
    ],
)
def test_nothing_that_threads_write_is_multiplied(program: Path, broken: str, order: str, time: str) -> None:
    """Products and copies know of it after a fence only, which no kernel has."""
    found = run(program, "registers", broken, order=order, time=time)
    assert "a product reads where threads" in found or "a copy goes to where threads" in found, found


@pytest.mark.parametrize(
    ("what", "chip"), [("tiles", "80"), ("copies", "75"), ("warps", "75"), ("pipeline", "80")]
)
def test_an_older_chip_has_less(program: Path, what: str, chip: str) -> None:
    found = run(program, what, order="forward", time="late", chip=chip)
    assert "does not have this instruction" in found or "no clusters" in found
