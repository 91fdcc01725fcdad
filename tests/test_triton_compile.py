"""Triton's kernels compile for GPUs that are not here, without spills, and use their matrix units.

CISC_COMPILE_ALL=1 takes every dtype, layout, label type, size and tile instead of the usual ones, which takes
many times as long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cisc_ext.ops import _implementations
from cisc_ext.ops.registry import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
CHIPS = (80, 89, 90)
LIMIT_S = 1800

pytestmark = pytest.mark.skipif(
    bool(_implementations.HERE.triton) or sys.platform != "linux",
    reason=_implementations.HERE.triton or "Triton's compiler is on Linux only",
)


def start(chip: int, cache: Path, *more: str) -> subprocess.Popen[str]:
    """The probe in a process of its own, with nothing compiled before."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "CISC_"))}
    before = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([*([before] if before else []), str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "triton_probe.py"), "--chip", str(chip), *more],
        env={**kept, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the probe found for each chip; all run side by side."""
    folder = tmp_path_factory.mktemp("compiled")
    every = ["--all"] if os.environ.get("CISC_COMPILE_ALL") == "1" else []
    started = {
        chip: start(chip, folder / "cache", "--json", str(folder / f"{chip}.json"), *every) for chip in CHIPS
    }
    found = {}
    for chip, process in started.items():
        output, _ = process.communicate(timeout=LIMIT_S)
        path = folder / f"{chip}.json"
        assert path.is_file(), f"sm_{chip}: the probe ended with {process.returncode}:\n{output[-3000:]}"
        found[chip] = {**json.loads(path.read_text()), "output": output}
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_compile_without_spills(chip: int, compiled: dict[int, dict[str, Any]]) -> None:
    print(compiled[chip]["output"])
    wrong = [line for line in compiled[chip]["output"].splitlines() if line.startswith("FAILED")]
    assert not wrong, "\n".join(wrong)
    assert all(
        code["registers"] and code["warps"] for code in compiled[chip]["codes"] if not code["problems"]
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_launches_kernels(operator: str, compiled: dict[int, dict[str, Any]]) -> None:
    for chip in CHIPS:
        cases = {code["case"].partition(" ")[0] for code in compiled[chip]["codes"]}
        assert operator in cases, f"sm_{chip}"


def test_every_row_of_every_table_is_taken(compiled: dict[int, dict[str, Any]]) -> None:
    """A row that no chip and no size takes was not compiled, and is of no use."""
    taken: dict[str, set[str]] = {}
    rows: dict[str, set[str]] = {}
    for found in compiled.values():
        for name, used in found["rows"].items():
            rows.setdefault(name, set()).update(used)
            taken.setdefault(name, set()).update(row for row, is_used in used.items() if is_used)
    assert {name: sorted(rows[name] - taken[name]) for name in rows if rows[name] - taken[name]} == {}


@pytest.mark.parametrize("chip", CHIPS)
def test_what_is_wrong_is_found(chip: int, tmp_path: Path) -> None:
    process = start(chip, tmp_path, "--made")
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, output
    failed = [line.removeprefix("FAILED: ") for line in output.splitlines() if line.startswith("FAILED")]
    assert {line.split()[0] for line in failed} == {"spilling", "sweep_without_products"}, output
    (spilling,) = (line for line in failed if line.startswith("spilling"))
    for problem in ("LDL in its code: registers spill", "STL in its code: registers spill", "bytes of stack"):
        assert problem in spilling
    units = ["HGMMA", "UTMALDG"] if chip >= 90 else ["HMMA"]
    (sweep,) = (line for line in failed if line.startswith("sweep"))
    assert sweep.endswith(f": {'; '.join(f'no {unit} in its code' for unit in units)}")


def test_the_probe_refuses_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "triton_probe.py"), "--chip", "90"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "TRITON_INTERPRET=1 has nothing compiled" in done.stderr
