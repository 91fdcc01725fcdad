"""The gate around compute-sanitizer and ncu: each end that a tool can come to, played by a shell script."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, nvidia_tools, profile, sanitize, targets
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS

RAN = 'SANITIZED {"calls": 12, "samples_not_reached": 0, "left_out": {}}'
NONE = 'SANITIZED {"calls": 0, "samples_not_reached": 0, "left_out": {"predict": "there is no CUDA kernel"}}'
CLEAN = f"========= COMPUTE-SANITIZER\n{RAN}\n========= ERROR SUMMARY: 0 errors"
WRONG = f"========= Invalid __global__ read of size 4 bytes\n{RAN}\n========= ERROR SUMMARY: 3 errors"
RACE = f"{RAN}\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
NO_RACE = f"{RAN}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
FORBIDDEN = "========= Error: Device not supported\n========= ERROR SUMMARY: 2 errors"


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which tools are found; there is a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda *_: {})
    return folder


def tool(folder: Path, name: str, said: str, code: int = 0, seconds: float = 0) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nsleep {seconds}\nexit {code}\n")
    path.chmod(0o755)


def sanitized(tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    path = tmp_path / "sanitizer.json"
    code = sanitize.main(["--json", str(path), *words])
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return code, rows


@pytest.mark.parametrize(
    ("said", "code", "outcome", "errors", "exit_code"),
    [
        (CLEAN, 0, "clean", 0, 0),
        (NO_RACE, 0, "clean", 0, 0),
        (WRONG, 86, "errors", 3, 1),
        (RACE, 86, "errors", 1, 1),
        (FORBIDDEN, 1, "skipped", None, 0),
        ("==ERROR== ERR_NVGPUCTRPERM - the user may not", 1, "skipped", None, 0),
        (f"{NONE}\n========= ERROR SUMMARY: 0 errors", 0, "skipped", 0, 0),
        ("Traceback: it broke\n========= ERROR SUMMARY: 0 errors", 1, "errors", 0, 1),
        (RAN, 0, "errors", None, 1),
    ],
)
def test_ends_of_the_sanitizer(
    said: str, code: int, outcome: str, errors: int | None, exit_code: int, bin_folder: Path, tmp_path: Path
) -> None:
    tool(bin_folder, "compute-sanitizer", said, code)
    ended, rows = sanitized(tmp_path)
    assert ended == exit_code
    assert [(row["tool"], row["impl"]) for row in rows] == list(sanitize.RUNS)
    for row in rows:
        assert (row["outcome"], row["errors"], row["returncode"]) == (outcome, errors, code)
        assert row["seconds"] >= 0 and row["tail"].strip() == said
        assert (row["reason"] is None) == (outcome == "clean")


def test_a_tool_without_end_is_stopped(bin_folder: Path, tmp_path: Path) -> None:
    """Also what it has started; the last run, for which time may not do, is no failure then."""
    tool(bin_folder, "compute-sanitizer", RAN, 0, seconds=60)
    begin = time.monotonic()
    code, rows = sanitized(tmp_path, "--limit", "0.3")
    assert code == 1 and time.monotonic() - begin < 20
    assert [row["outcome"] for row in rows] == ["stopped", "stopped", "stopped", "skipped"]
    assert all(row["returncode"] is None and row["calls"] == 12 for row in rows)


@pytest.mark.parametrize("module", [sanitize, profile])
def test_no_tool_is_no_failure(
    module: Any, tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia_tools, "find", lambda name: None)
    path = tmp_path / "none.json"
    assert module.main(["--json", str(path)]) == 0
    result = json.loads(path.read_text())
    for one in result["rows"] or [result]:
        assert one["outcome"] == "skipped" and "neither on PATH nor under CUDA_HOME" in one["reason"]


def test_where_tools_are_found(tmp_path: Path) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    tool(home / "bin", "ncu", "")
    assert nvidia_tools.find("ncu", {"PATH": "/nowhere", "CUDA_HOME": str(home)}) == str(home / "bin" / "ncu")
    assert nvidia_tools.find("no-such-tool", {"PATH": "/nowhere", "CUDA_HOME": str(home)}) is None


def test_the_samples_run_as_under_a_tool() -> None:
    """Here on the CPU: every operator, forward and backward."""
    impl = "cpp" if _library.LOADED else "reference"
    found = sanitize.here(sorted(OPERATORS), impl, "cpu")
    able = [name for name in OPERATORS if name not in found["left_out"]]
    count = sum(len(list(OPERATORS[name].samples())) for name in able)
    assert found["calls"] == len(sanitize.DTYPES) * count and found["samples_not_reached"] == 0
    late = sanitize.here(sorted(OPERATORS), impl, "cpu", until=0.0)
    assert late["calls"] == 0 and late["samples_not_reached"] == count
    first = [operator.name for operator, _ in sanitize.samples(sorted(OPERATORS))][: len(OPERATORS)]
    assert first == sorted(OPERATORS)


NCU_HEAD = (
    '"ID","Process ID","Process Name","Host Name","thread Domain:Push/Pop_Range:PL_Type:PL_Value:Msg",'
    '"Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
)
NCU = "\n".join(
    [
        "==PROF== Connected to process 7",
        '==PROF== Profiling "predict_kernel": 0%....100% - 1 pass',
        NCU_HEAD + ",".join(f'"{metric}"' for metric in profile.METRICS.values()),
        '"","","","","","","","","","","","","ns","%","%","register/thread","%"',
        '"0","7","python","host","<default domain>:predict forward cpp:none",'
        '"void cisc::predict_kernel<T1>(int, T2)",'
        '"1","7","(128, 1, 1)","(2112, 1, 1)","0","9.0","51,200","41.25","83.5","64","55.1"',
        '"1","7","python","host","","spoil","1","7","(128, 1, 1)","(2, 1, 1)","0","9.0",'
        '"2100","n/a","1","16","9"',
    ]
)


def test_launches_that_ncu_prints() -> None:
    first, second = profile.rows_of(NCU)
    assert first == {
        "case": "predict forward cpp",
        "kernel": "void cisc::predict_kernel<T1>(int, T2)",
        **{"time_us": 51.2, "dram_percent": 41.25, "sm_percent": 83.5},
        **{"registers": 64.0, "occupancy_percent": 55.1},
    }
    assert (second["case"], second["time_us"], second["dram_percent"]) == (None, 2.1, None)
    assert profile.rows_of("==PROF== nothing") == []


@pytest.mark.parametrize(
    ("said", "code", "outcome", "exit_code"),
    [
        (NCU, 0, "measured", 0),
        (f"{NCU_HEAD}\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, "skipped", 0),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", 1, "skipped", 0),
        ("Traceback: it broke", 1, "failed", 1),
    ],
)
def test_ends_of_the_profiler(
    said: str, code: int, outcome: str, exit_code: int, bin_folder: Path, tmp_path: Path
) -> None:
    tool(bin_folder, "ncu", said, code)
    path = tmp_path / "profile.json"
    assert profile.main(["--json", str(path)]) == exit_code
    result = json.loads(path.read_text())
    assert (result["outcome"], len(result["rows"])) == (outcome, 2 if outcome == "measured" else 0)
    assert (result["reason"] is None) == (outcome == "measured")


def test_a_profiler_without_end_is_stopped(bin_folder: Path, tmp_path: Path) -> None:
    tool(bin_folder, "ncu", "", 0, seconds=60)
    path = tmp_path / "profile.json"
    assert profile.main(["--json", str(path), "--limit", "0.3"]) == 1
    assert json.loads(path.read_text())["outcome"] == "stopped"


def test_what_is_profiled() -> None:
    found = profile.chosen(sorted(OPERATORS), "cpu", quick=True)
    assert found[0].operator.name == "cross_similarity" and {case.dtype for case in found} == {torch.bfloat16}
    assert {case.operator.name for case in found} == set(OPERATORS)
    assert {"cpp", "triton"} == set(targets.IMPLEMENTATIONS)
