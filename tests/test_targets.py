"""What is asked of Triton's kernels on a GPU: the arithmetic behind it, and the gate's parts around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, first_call, gate, gpu_tests, machine, measure, triton_targets
from cisc_ext.ops._workloads import Size
from cisc_ext.ops.registry import OPERATORS

RATES = triton_targets.Rates(copy_gbps=4000.0, multiprocessors=132, ghz=1.75)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def case_of(op: str, passes: str, size: Size = triton_targets.SMALL) -> cases.Case:
    return next(
        case
        for case in triton_targets.cases(size, "cpu")
        if (case.operator.name, case.passes, case.dtype) == (op, passes, torch.float32)
    )


def test_the_floor_is_what_is_counted() -> None:
    case = case_of("rectified_cross_entropy", "both")
    pixels = 2 * 97 * 97 * 19
    found = triton_targets.floor(case, RATES)
    work = triton_targets.WORK["rectified_cross_entropy", "both"]
    assert (found["special"], found["instructions"]) == (pixels, pixels * work.instructions)
    assert found["bytes"] == case.operator.cost(case.inputs, "both").bytes
    assert found["special_us"] == pytest.approx(pixels / (16 * 132 * 1.75e9) * 1e6)
    assert found["instructions_us"] == pytest.approx(pixels * work.instructions / (128 * 132 * 1.75e9) * 1e6)
    assert found["bytes_us"] == pytest.approx(found["bytes"] / 4e12 * 1e6)
    maps = triton_targets.floor(case_of("map_consistency", "forward"), RATES)
    assert maps["special"] == 2 * 97 * 97


def test_a_loss_is_held_against_its_floor() -> None:
    case = case_of("predict", "forward")
    parts = triton_targets.floor(case, RATES)
    least_ms = 1e-3 * max(parts["bytes_us"], parts["special_us"], parts["instructions_us"])
    limit_ms = 1.8 * least_ms + 0.01
    assert triton_targets.against_floor(case, RATES, 0.999 * limit_ms)["met"]
    row = triton_targets.against_floor(case, RATES, 1.001 * limit_ms)
    assert not row["met"] and row["target"] == f"{limit_ms:.4f} ms" and row["special"] == 0


def test_what_is_bound_by_bytes_is_held_against_a_copy() -> None:
    for op, passes in (("masked_average_pool", "forward"), ("prototype_similarity", "backward")):
        case = case_of(op, passes)
        moved = case.operator.cost(case.inputs, passes).bytes
        assert triton_targets.against_copy(case, RATES, moved / (1e6 * 4000 * 0.751))["met"]
        row = triton_targets.against_copy(case, RATES, moved / (1e6 * 4000 * 0.749))
        assert not row["met"] and row["reached"] == "0.749 of copy"


def test_the_row_maximum_is_held_against_a_rate_and_chunks() -> None:
    case = triton_targets.dense_case((32, 32), torch.bfloat16, "cpu")
    flops = 2 * 256 * 1024 * 1024
    fast = flops / 401e9  # milliseconds
    assert triton_targets.against_chunked(case, fast, 1.21 * fast)["met"]
    assert not triton_targets.against_chunked(case, fast, 1.19 * fast)["met"]
    assert not triton_targets.against_chunked(case, flops / 399e9, 1.0)["met"]


def test_pytorch_in_chunks_gives_the_row_maximum() -> None:
    case = triton_targets.dense_case((20, 20), torch.float32, "cpu")
    wanted = cases.implementation_call(case, "reference")()
    for chunk in (7, 128, 1024):
        assert cases.disagreement(triton_targets.chunked(case, chunk)(), wanted) < 1e-5


def test_every_operator_has_a_target() -> None:
    measured = list(triton_targets.cases(triton_targets.SMALL, "cpu"))
    names = {case.operator.name for case in measured}
    assert names | {triton_targets.dense_case((4, 4), torch.float16, "cpu").operator.name} == set(OPERATORS)
    assert {(case.operator.name, case.passes) for case in measured} >= set(triton_targets.WORK)
    assert triton_targets.FULL.low == (181, 181)
    assert triton_targets.PIXELS[0] * triton_targets.PIXELS[1] == 131072


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A GPU on which all takes as long, and Triton computes what the reference does."""

    def all_take(ms: float) -> None:
        monkeypatch.setattr(triton_targets, "graph_ms", lambda make: (make(), ms)[1])
        monkeypatch.setattr(measure, "time_ms", lambda *_, **__: ms)

    def reference(case: cases.Case, name: str, **more: Any) -> cases.Call:
        return cases.implementation_call(case, "reference", **more)

    monkeypatch.setattr(triton_targets, "implementation_call", reference)
    monkeypatch.setattr(triton_targets, "SMALL", Size("small", 1, 3, 17, 17))
    monkeypatch.setattr(triton_targets, "FEW_PIXELS", (4, 4))
    return all_take


def test_a_row_of_every_case(pretended: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(1e9)
    rows = list(triton_targets.measured("cpu", RATES, quick=True))
    assert {row["op"] for row in rows} == set(OPERATORS)
    assert len(triton_targets.missed(rows)) == len(rows) == 20
    pretended(1e-9)
    rows = list(triton_targets.measured("cpu", RATES, quick=True))
    # Nothing is faster than itself.
    assert [line.split()[0] for line in triton_targets.missed(rows)] == ["cross_similarity"] * 2
    monkeypatch.setattr(triton_targets, "TIMES_CHUNKED", 1.0)
    assert not triton_targets.missed(list(triton_targets.measured("cpu", RATES, quick=True)))


def test_a_wrong_result_meets_no_target(
    pretended: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended(1e-9)

    def wrong(case: cases.Case, name: str, **more: Any) -> cases.Call:
        call = cases.implementation_call(case, "reference", **more)
        return lambda: tuple(2 * value for value in call())

    monkeypatch.setattr(triton_targets, "implementation_call", wrong)
    rows = list(triton_targets.measured("cpu", RATES, quick=True))
    assert all("off the float32 reference" in row["reached"] and not row["met"] for row in rows)


@NO_GPU
@pytest.mark.parametrize("module", [triton_targets, first_call])
def test_refused_without_a_gpu(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.json"
    assert module.main(["--json", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "NVIDIA GPU" in error and not path.exists()


def test_first_calls_are_of_every_mode() -> None:
    found = {(one.mode, one.reduction) for one in first_call.modes("cross_similarity")}
    assert {("dense", "max"), ("labels", "topk"), ("own", "softmax"), ("dense", "mean")} <= found
    rows = list(first_call.first_calls("predict", "cpu", "reference"))
    assert [row["workload"] for row in rows] == ["pascal"]
    assert rows[0]["forward_s"] > 0 and rows[0]["backward_s"] is None
    (row,) = first_call.first_calls("map_consistency", "cpu", "reference")
    assert row["backward_s"] is not None
    assert first_call.too_long([{**row, "forward_s": 2.1, "backward_s": 1.9}], 2.0) == [
        f"map_consistency {row['workload']} forward: 2.1 s, the limit is 2 s"
    ]


TESTS = """
import os
import pytest

@pytest.mark.parametrize("case", range(20))
def test_one(case):
    assert case != int(os.environ.get("BAD", "-1"))

@pytest.mark.parametrize("case", range(20))
def test_two(case):
    pass
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


def test_kernels_are_tested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the part before; where that failed or did not run, by themselves."""
    commands = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda *_: {})
    show = ("json.tool", "{tested}", "{out}/none")
    for tests in (("this",), ("json.tool", "{out}/none")):
        monkeypatch.setattr(gate, "PARTS", {"tests": (tests, 60), "kernels": (show, 60)})
        assert gate.main(["--out", str(tmp_path)]) == 1
        commands.append(json.loads((tmp_path / "gate.json").read_text())["parts"][1]["command"])
    assert ["--tested" in command for command in commands] == [True, False]


def test_the_gates_commands_are_right() -> None:
    """All that the parts name exists, though no GPU is here to run them."""
    code = (
        "import sys, torch; torch.cuda.is_available = lambda: True;"
        "from benchmarks import kernels; print(len(kernels.chosen_cases(kernels.parse(sys.argv[1:]))))"
    )
    words = [word.format(out="o", tested="--tested") for word in gate.PARTS["kernels"][0][1:]]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=machine.ROOT,
        env={**os.environ, "PYTHONPATH": str(machine.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
    assert sum(limit_s for _, limit_s in gate.PARTS.values()) < 2400
