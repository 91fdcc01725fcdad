"""The gate around compute-sanitizer and ncu: each end that a tool can come to, played by a shell script."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import limited, machine, nvidia_tools, profile, sanitize, targets
from benchmarks.aligned_samples import aligned_samples
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS

RAN = 'SANITIZED {"calls": 12, "samples_not_reached": 0, "left_out": {}}'
NONE = 'SANITIZED {"calls": 0, "samples_not_reached": 0, "left_out": {"predict": "there is no CUDA kernel"}}'
LATE = 'SANITIZED {"calls": 0, "samples_not_reached": 42, "left_out": {}}'
SOME = 'SANITIZED {"calls": 2, "samples_not_reached": 40, "left_out": {}}'
NOTHING = 'SANITIZED {"calls": 0, "samples_not_reached": 0, "left_out": {}}'
NO_ERRORS = "========= ERROR SUMMARY: 0 errors"
CLEAN = f"========= COMPUTE-SANITIZER\n{RAN}\n========= ERROR SUMMARY: 0 errors"
WRONG = f"========= Invalid __global__ read of size 4 bytes\n{RAN}\n========= ERROR SUMMARY: 3 errors"
RACE = f"{RAN}\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
NO_RACE = f"{RAN}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
OF_API = (
    "========= Program hit cudaErrorStreamCaptureUnsupported (error 900) due to "
    '"operation not permitted when stream is capturing" on CUDA API call to cudaMalloc.'
)
BOTH = (
    f"========= Invalid __global__ read of size 4 bytes\n{OF_API}\n{RAN}\n========= ERROR SUMMARY: 2 errors"
)
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
        (BOTH, 86, "errors", 2, 1),
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


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (BOTH, "2 reported: Invalid, Program hit"),
        (f"{OF_API}\n{OF_API}\n{RAN}\n========= ERROR SUMMARY: 2 errors", "2 reported: Program hit"),
        (RACE, "1 reported: of no known kind"),
    ],
)
def test_kinds_of_errors_are_named(said: str, reason: str) -> None:
    """What a call of CUDA gave back is counted with what a kernel did."""
    row = sanitize.judged("memcheck", "cpp", limited.Ran(86, said, 1.0), 30.0)
    assert row["reason"] == reason


def test_an_error_of_a_call_alone_is_no_error_of_what_was_stopped() -> None:
    for said, outcome in ((f"{OF_API}\n{SOME}", "stopped"), (f"{WRONG.splitlines()[0]}\n{SOME}", "errors")):
        row = sanitize.judged("memcheck", "cpp", limited.Ran(None, said, 1.0), 30.0)
        assert row["outcome"] == outcome


@pytest.mark.parametrize(
    ("said", "outcome", "of_triton", "number"),
    [
        (LATE, "stopped", "stopped", "42"),
        (SOME, "stopped", "partial", "40"),
        (NOTHING, "stopped", "stopped", "no sample"),
        (f"{LATE}\n{SOME}", "stopped", "partial", "40"),
    ],
)
def test_samples_that_were_not_reached_are_not_clean(
    said: str, outcome: str, of_triton: str, number: str, bin_folder: Path, tmp_path: Path
) -> None:
    """A tool in which torch takes all the time to start has tested nothing."""
    tool(bin_folder, "compute-sanitizer", f"{said}\n{NO_ERRORS}")
    code, rows = sanitized(tmp_path)
    assert code == 1
    assert [row["outcome"] for row in rows] == [outcome] * 3 + [of_triton]
    assert all(number in row["reason"] for row in rows)


def test_triton_may_come_to_some_samples_only(bin_folder: Path, tmp_path: Path) -> None:
    """What was found until then counts."""
    path = bin_folder / "compute-sanitizer"
    wrong = "========= Invalid __global__ read of size 4 bytes"
    for more, ended, outcome in (("", 0, "partial"), (wrong, 1, "errors")):
        path.write_text(
            f"#!/bin/sh\ncase \"$*\" in *'--here triton'*) echo '{SOME}'; echo '{more}'; sleep 60;; esac\n"
            f"echo '{RAN}'; echo '{NO_ERRORS}'\n"
        )
        path.chmod(0o755)
        code, rows = sanitized(tmp_path, "--limit", "0.5")
        assert [row["outcome"] for row in rows] == ["clean"] * 3 + [outcome] and code == ended
        assert rows[3]["seconds"] > 0.9, "what the tools before it left is there, too"


def test_slow_tools_have_fewer_samples(bin_folder: Path, tmp_path: Path) -> None:
    path = bin_folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\necho \"$@\"; echo '{RAN}'; echo '{NO_ERRORS}'\n")
    path.chmod(0o755)
    _, rows = sanitized(tmp_path)
    assert [row["tool"] for row in rows if "--few" in row["tail"]] == list(sanitize.SLOW)


def test_a_tool_without_end_is_stopped(bin_folder: Path, tmp_path: Path) -> None:
    """The last run, for which time may not do, is no failure then."""
    tool(bin_folder, "compute-sanitizer", RAN, 0, seconds=60)
    begin = time.monotonic()
    code, rows = sanitized(tmp_path, "--limit", "0.3")
    assert code == 1 and time.monotonic() - begin < 20
    assert [row["outcome"] for row in rows] == ["stopped", "stopped", "stopped", "partial"]
    assert all(row["returncode"] is None and row["calls"] == 12 for row in rows)


STARTS = """trap '' TERM
sh -c 'echo $$ > PATH; exec sleep 60' &
"""
"""A shell that does not end at SIGTERM, and what it has started; the words that wait for it follow."""
NESTED = """import sys, types
sys.modules["benchmarks.machine"] = types.SimpleNamespace(ROOT=".")
from benchmarks import limited
limited.run(["sh", "-c", sys.argv[1]], 60)
"""
"""Without torch, whose import takes seconds."""


def ended(path: Path) -> bool:
    """Whether the process of that id ends soon; it may still wait for its parent."""
    pid = int(path.read_text())
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("then", ["wait", "sleep 0.5"])
def test_what_a_command_has_started_ends_with_it(then: str, tmp_path: Path) -> None:
    """At the limit, and where the command itself has ended before."""
    path = tmp_path / "pid"
    ran = limited.run(["sh", "-c", STARTS.replace("PATH", str(path)) + then], 2.0)
    assert ran.returncode == (None if then == "wait" else 0)
    assert ended(path)


def test_a_command_within_a_command_ends_with_it(tmp_path: Path) -> None:
    """Though it has a group of its own."""
    path = tmp_path / "pid"
    words = [sys.executable, "-c", NESTED, STARTS.replace("PATH", str(path)) + "wait"]
    ran = limited.run(words, 6.0)
    assert ran.returncode is None and ran.seconds < 6 + limited.GRACE_S
    assert ended(path)


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
    *_, found = sanitize.here(sorted(OPERATORS), impl, "cpu", few=True)
    able = [name for name in OPERATORS if name not in found["left_out"]]
    count = len(list(sanitize.samples(able, few=True)))
    assert found["calls"] == len(sanitize.DTYPES) * count and found["samples_not_reached"] == 0
    every = sum(len(list(aligned_samples(o))) + len(list(o.samples())) for o in OPERATORS.values())
    late = list(sanitize.here(sorted(OPERATORS), impl, "cpu", until=0.0))
    assert [one["calls"] for one in late] == [0] and late[0]["samples_not_reached"] == every > count
    reports = sanitize.here(["predict"], impl, "cpu")
    assert [next(reports)["calls"] for _ in range(3)] == [0, 2, 4], "said as it goes"
    first = [operator.name for operator, _ in sanitize.samples(sorted(OPERATORS))][: len(OPERATORS)]
    assert first == sorted(OPERATORS)


RANGE = "PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
NCU_HEAD = (
    f'"ID","Process ID","Process Name","Host Name","thread Domain:Push/Pop_Range:{RANGE}",'
    f'"Id:Domain:Start/Stop_Range:{RANGE}",'
    '"Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
)
NCU = "\n".join(
    [
        "==PROF== Connected to process 7",
        '==PROF== Profiling "predict_kernel": 0%....100% - 1 pass',
        NCU_HEAD + ",".join(f'"{metric}"' for metric in profile.METRICS.values()),
        '"","","","","","","","","","","","","","ns","%","%","register/thread","%"',
        '"0","7","python","host","","1:<default domain>:predict forward cpp:none:none:none:none:none",'
        '"void cisc::predict_kernel<T1>(int, T2)",'
        '"1","7","(128, 1, 1)","(2112, 1, 1)","0","9.0","51,200","41.25","83.5","64","55.1"',
        '"1","7","python","host","","","spoil","1","7","(128, 1, 1)","(2, 1, 1)","0","9.0",'
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


def test_backward_is_in_the_range_of_its_call() -> None:
    """Which is of the process, and so in a column of its own; threads' ranges are read, too."""
    backward = NCU.replace("predict forward cpp", "masked_average_pool backward triton")
    assert profile.rows_of(backward)[0]["case"] == "masked_average_pool backward triton"
    of_process = '"","1:<default domain>:predict forward cpp:none:none:none:none:none"'
    of_thread = '"<default domain>:predict forward cpp:none:none:none:none:none",""'
    assert of_process in NCU
    assert profile.rows_of(NCU.replace(of_process, of_thread))[0]["case"] == "predict forward cpp"


def test_ranges_are_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def range_start(name: str) -> int:
        said.append(name)
        return 7

    monkeypatch.setattr(profile, "chosen", lambda *_: [targets.dense_case((2, 2), torch.bfloat16, "cpu")])
    monkeypatch.setattr(targets, "obstacles", lambda case, impl: ["none"] if impl == "triton" else [])
    monkeypatch.setattr(profile, "implementation_call", lambda case, impl: lambda: said.append("call"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: said.append("on"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: said.append("off"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", range_start)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda number: said.append(f"end {number}"))
    profile.here(["cross_similarity"], time.time() + 60)
    assert said == ["call", "cross_similarity forward cpp", "on", "call", "off", "end 7"]


@pytest.mark.parametrize(
    ("said", "code", "outcome", "exit_code"),
    [
        (NCU, 0, "measured", 0),
        (f'==ERROR== "operation not permitted when stream is capturing"\n{NCU}', 1, "measured", 0),
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
