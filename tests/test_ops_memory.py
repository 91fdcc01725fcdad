"""What an operator allocates beyond inputs, outputs, gradients and saved winners is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from memory_probe import CPU, MANY, MIB, SIZES

from benchmarks.measure import EXACT, can_measure
from cisc_ext.ops.registry import EXTRA_BYTES_CPU, OPERATORS

ROOT = Path(__file__).parent.parent
UNCERTAIN_MIB = 2.0
"""Pages are counted in batches per thread, and libraries keep a little."""

CASES = [f"{key}-{one.name}" for key, (name, _) in SIZES.items() for one in OPERATORS[name].implementations]
CASES += [f"{key}-cpp" for key in MANY]

pytestmark = pytest.mark.skipif(not can_measure(), reason="needs Linux, which resets the resident peak")


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    environment = {**os.environ, **EXACT, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "memory_probe.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, float] = json.loads(run.stdout)
    return result


def test_every_operator_is_measured() -> None:
    assert {name for name, _ in SIZES.values()} == set(OPERATORS)


def test_measure_sees_what_is_held_and_not_what_is_returned(measured: dict[str, float]) -> None:
    assert measured["held"] == pytest.approx(40, abs=UNCERTAIN_MIB)
    assert measured["returned"] == pytest.approx(0, abs=UNCERTAIN_MIB)


@pytest.mark.parametrize("case", CASES)
def test_extra_memory(case: str, measured: dict[str, float]) -> None:
    operator = OPERATORS[case.partition("-")[0]]
    (implementation,) = (one for one in operator.implementations if one.name == case.rpartition("-")[2])
    if reasons := implementation.obstacles(CPU) + implementation.reservations(CPU):
        pytest.skip("; ".join(reasons))
    assert operator.extra_bytes_cpu <= EXTRA_BYTES_CPU
    assert measured[case] <= operator.extra_bytes_cpu / MIB + UNCERTAIN_MIB


@pytest.mark.parametrize("key", MANY)
def test_plans_cover_what_is_measured(key: str, measured: dict[str, float]) -> None:
    if f"{key}-planned" not in measured:
        pytest.skip("no compiled operators")
    assert measured[f"{key}-cpp"] <= measured[f"{key}-planned"] + UNCERTAIN_MIB
