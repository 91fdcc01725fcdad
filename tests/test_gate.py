"""The gate of a GPU: parts, limits, what it keeps."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gate, gpu_tests, limited, machine, step, sweeps
from cisc_ext.ops.registry import OPERATORS


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which all kernels run, it is said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda *_: {})
    monkeypatch.setattr(gate, "lacking", dict)


def parts(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "gate.json").read_text())["parts"]
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gate_and_step_refuse_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main(["--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "NVIDIA GPU" in captured.err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda"])


def test_gate_refuses_without_cuda_kernels(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or it would be green without one of them having run; asked for Triton alone, it wants none."""
    monkeypatch.delenv("CISC_CUDA", raising=False)
    show = ("timeit", "-n1", "-r1", "import os; print(os.environ.get('CISC_CUDA'))")
    made = {
        "targets": gate.Part(("this", "{impl}"), 60, 1),
        "tests": gate.Part(show, 60, 1),
        "sweeps": gate.Part(("this",), 60, 1, cuda_only=True),
    }
    monkeypatch.setattr(gate, "PARTS", made)
    out = tmp_path / "out"
    monkeypatch.setattr(gate, "lacking", lambda: {"predict": "none built", "map_consistency": "none built"})
    assert gate.main(["--out", str(out)]) == 1
    error = "error: no CUDA kernel of predict, map_consistency (none built); see --triton-only\n"
    assert capsys.readouterr().err == error and not out.exists()
    assert gate.main(["--out", str(out), "--triton-only"]) == 0
    assert parts(out)[0]["command"] == "python -m this --impl=triton"
    assert parts(out)[1]["tail"].startswith("0\n") and len(parts(out)) == 2
    monkeypatch.setattr(gate, "lacking", dict)
    assert gate.main(["--out", str(out)]) == 0
    assert parts(out)[0]["command"] == "python -m this"
    assert parts(out)[1]["tail"].startswith("None\n") and len(parts(out)) == 3


def test_cuda_kernels_are_asked_for_of_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 0))
    assert set(gate.lacking()) == set(OPERATORS) and all(gate.lacking().values())


def test_gate_keeps_what_each_part_left(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files: the logs are in one, which is there as each part ends."""
    made = {
        "good": gate.Part(("this",), 60, 1),
        "list": gate.Part(("tarfile", "-l", f"{{out}}/{gate.LOGS}"), 60, 1),
        "bad": gate.Part(("json.tool", "{logs}/none"), 60, 1),
    }
    monkeypatch.setattr(gate, "PARTS", made)
    assert gate.main(["--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "gate.json").read_text())
    ended = [(part["name"], part["returncode"] == 0) for part in result["parts"]]
    assert ended == [("good", True), ("list", True), ("bad", False)] and not result["passed"]
    assert "Zen of Python" in result["parts"][0]["tail"]
    assert result["parts"][1]["tail"].split() == ["good.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.json", gate.LOGS]
    with tarfile.open(tmp_path / gate.LOGS) as tar:
        assert sorted(tar.getnames()) == ["bad.log", "good.log", "list.log"]
        log = tar.extractfile("good.log")
        assert log is not None and b"Zen of Python" in log.read()
    assert gate.main(["--out", str(tmp_path), "--only", "good"]) == 0
    assert json.loads((tmp_path / "gate.json").read_text())["passed"]
    with pytest.raises(SystemExit):
        gate.main(["--out", str(tmp_path), "--only", "good,none"])


def test_the_results_are_eight_files() -> None:
    """More do not come back from a borrowed machine."""
    words = [word for part in gate.PARTS.values() for word in part.words]
    files = [word for word in words if word.startswith("{out}/")]
    assert len({*files, "gate.json", gate.LOGS}) == len(files) + 2 == 8
    assert all("{out}" not in word for word in words if word not in files)


def test_kernels_are_tested_once(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the part before; where that failed or did not run, by themselves."""
    commands = []
    show = gate.Part(("json.tool", "{tested}", "{out}/none"), 60, 1)
    for tests in (("this",), ("json.tool", "{out}/none")):
        monkeypatch.setattr(gate, "PARTS", {"tests": gate.Part(tests, 60, 1), "kernels": show})
        assert gate.main(["--out", str(tmp_path)]) == 1
        commands.append(parts(tmp_path)[1]["command"])
    assert ["--tested" in command for command in commands] == [True, False]


def test_the_gates_commands_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the parts name exists, though no GPU is here to run them."""
    filling = {"out": "o", "logs": "l", "tested": "--tested", "limit": "9", "impl": "--impl=triton"}
    filled = {name: [word.format(**filling) for word in part.words[1:]] for name, part in gate.PARTS.items()}
    code = (
        "import sys, torch; torch.cuda.is_available = lambda: True;"
        "from benchmarks import kernels; print(len(kernels.chosen_cases(kernels.parse(sys.argv[1:]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *filled["kernels"]],
        cwd=machine.ROOT,
        env={**os.environ, "PYTHONPATH": str(machine.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sweeps.parse(filled["sweeps"]).stop_after == 9
    asked = [step.parse(filled[name]) for name in ("full_step", "step")]
    assert [(one.full, one.full_alone) for one in asked] == [("full", True), ("none", False)]
    for part in gate.PARTS.values():
        assert importlib.util.find_spec(part.words[0]) is not None
        assert ("{limit}" in part.words) == (part.start_s > 0)
        for limit_s in (part.least_s, part.most_s):
            assert part.runs * part.limit_of_run(limit_s) + part.start_s <= limit_s


@pytest.mark.parametrize("within_s", [gate.WITHIN_S, 200.0])
def test_the_gate_ends_in_time(
    within_s: float, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though no part ends before its limit; and each has what it needs, or its share of that."""
    now_s = 0.0

    def run(words: Any, limit_s: float, *_: Any) -> limited.Ran:
        nonlocal now_s
        now_s += limit_s + limited.GRACE_S
        return limited.Ran(None, "", limit_s)

    monkeypatch.setattr(limited, "run", run)
    monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=lambda: now_s))
    assert gate.main(["--out", str(tmp_path), "--within", str(within_s)]) == 1
    assert gate.WITHIN_S == 480 and within_s - 10 < now_s <= within_s
    needed_s = sum(part.least_s for part in gate.PARTS.values())
    assert needed_s <= gate.WITHIN_S
    for part in parts(tmp_path):
        share_s = gate.PARTS[part["name"]].least_s * min(1, within_s / needed_s)
        assert part["limit_s"] > share_s - limited.GRACE_S - 1


def test_time_that_a_part_leaves_goes_to_the_next(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "run", lambda *_, **__: limited.Ran(0, "", 0.0))
    assert gate.main(["--out", str(tmp_path)]) == 0
    limits = {part["name"]: part["limit_s"] for part in parts(tmp_path)}
    assert limits.pop("tests") >= 165
    assert limits == {name: gate.PARTS[name].most_s for name in limits}


def test_a_part_without_end_leaves_the_next_its_time(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without time is there as failed."""
    monkeypatch.setattr(gate, "_LEAST_S", 1.0)
    slow = gate.Part(("timeit", "-n1", "-r1", "import time; time.sleep(60)"), 60, 1)
    made = {"slow": slow, "late": gate.Part(("this",), 60, 20)}
    monkeypatch.setattr(gate, "PARTS", made)
    begin = time.monotonic()
    assert gate.main(["--out", str(tmp_path), "--within", "25"]) == 1
    assert time.monotonic() - begin < 25
    stopped, late = parts(tmp_path)
    assert stopped["returncode"] is None and stopped["limit_s"] <= 2 and late["returncode"] == 0
    assert gate.main(["--out", str(tmp_path), "--within", "3"]) == 1
    assert [part["returncode"] for part in parts(tmp_path)] == [None, None]
    assert all(part["tail"].startswith("not begun") for part in parts(tmp_path))


TESTS = """
import os
import pytest

@pytest.mark.parametrize("case", range(20))
def test_one(case):
    assert case != int(os.environ.get("BAD", "-1"))

@pytest.mark.parametrize("case", range(20))
def test_two(case):
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == os.environ["OMP_NUM_THREADS"] == "1"
"""


def test_gpu_tests_are_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_made.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text((machine.ROOT / "tests" / "conftest.py").read_text())
    out = tmp_path / "out"
    options = ["-v", "-rf", "-p", "no:cacheprovider", str(tmp_path)]
    words = ["--out", str(out), "--jobs", "3", "--", *options]
    assert gpu_tests.main(words) == 0
    logs = [(out / f"tests_{shard}.log").read_text() for shard in range(3)]
    ran = [{line.split()[0].split("::")[1] for line in log.splitlines() if "PASSED" in line} for log in logs]
    assert sum(map(len, ran)) == 40 and len(set.union(*ran)) == 40 and all(ran)
    for of_shard in ran:
        of = [
            {name.partition("[")[2] for name in of_shard if name.startswith(test)}
            for test in ("test_one", "test_two")
        ]
        assert of[0] == of[1], "the tests of a case are in the same process"
    monkeypatch.setenv("BAD", "7")
    capsys.readouterr()
    assert gpu_tests.main(words) == 1
    assert "test_one[7]" in capsys.readouterr().out
    assert gpu_tests.main([*words[:4], "--", "-m", "cuda", str(tmp_path)]) == 1, "no test is no green test"


WITHOUT_END = """
import pathlib
import time

def test_good(): pass
def test_bad(): assert False
def test_slow():
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pathlib.Path(__file__).with_name(f"interrupted_{time.time_ns()}").touch()
        time.sleep(4)
        raise
"""


def test_gpu_tests_that_do_not_end_are_interrupted(tmp_path: Path) -> None:
    """All at once, with their results until then; what goes on is killed."""
    (tmp_path / "test_made.py").write_text(WITHOUT_END)
    options = ["-p", "no:cacheprovider", "-rf", str(tmp_path)]
    out = tmp_path / "out"
    words = ["--out", str(out), "--jobs", "3", "--limit", "12", "--", *options]
    begin = time.monotonic()
    assert gpu_tests.main(words) == 1
    assert time.monotonic() - begin < 40
    for shard in range(3):
        assert "FAILED" in (out / f"tests_{shard}.log").read_text()
        assert (out / f"tests_{shard}.xml").is_file()
    first, *_, last = sorted(int(path.name.split("_")[1]) for path in tmp_path.glob("interrupted_*"))
    assert last - first < 3e9
