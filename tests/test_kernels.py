"""The kernels' benchmark: result files, what is refused or left out."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, kernels, machine, measure, naive, rivals, tables
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS, Call, Implementation, never

CPU = Call("cpu", (torch.float32,))


ROW = {
    *("op", "impl", "reduction", "mode", "dtype", "shape", "workload", "ladder", "pass", "time_ms"),
    *("time_min_ms", "runs", "tflops", "gbps", "share_of_ceiling", "extra_mib", "extra_limit_mib"),
    *("naive_mib", "speedup", "rival_ms", "rival_runs", "rival_extra_mib", "rival_chunk", "rivals_left_out"),
}


class Failing:
    """Stands for a pool whose process raises."""

    _processes: dict[int, Any] | None = None

    def submit(self, *_: Any) -> Future[Any]:
        result: Future[Any] = Future()
        result.set_exception(RuntimeError("CUDA error: an illegal memory access\nmore"))
        return result

    def shutdown(self, **_: Any) -> None:
        pass


def measured_kernels(path: Path, *arguments: str) -> dict[str, Any]:
    assert kernels.main(["--quick", "--json", str(path), *arguments]) == 0
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.mark.usefixtures("green")
def test_kernels_writes_its_result(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    result = measured_kernels(path, "--op", "map_consistency", "predict", "--workload", "image_128x256")
    assert {"machine", "versions", "commit", "command", "threads", "ceilings", "cisc_isa"} <= set(result)
    assert {one["impl"]: one["reason"] for one in result["left_out"]}["triton"]
    cases_of = {(row["op"], row["dtype"], row["pass"]) for row in result["rows"]}
    assert {(one["op"], one["dtype"], one["pass"]) for one in result["winners"]} == cases_of
    for one in result["winners"]:
        of_case = [row for row in result["rows"] if (row["op"], row["pass"]) == (one["op"], one["pass"])]
        assert one["time_ms"] == min(row["time_ms"] for row in of_case)
        assert {one["impl"], *one["others"]} == {row["impl"] for row in of_case}
        assert all(ratio >= 1 for ratio in one["others"].values())
    assert result["quick"] and result["device"] == "cpu"
    if _library.LOADED:
        assert result["cisc_isa"] in ("portable", "avx2", "avx512", "avx512_bf16")
    assert all(one["reason"] and one["impl"] != "reference" for one in result["left_out"])
    assert set(result["ceilings"]) == {"gemm_size", "gemm_tflops", "fma_tflops", "copy_gbps", "flops"}
    assert result["ceilings"]["copy_gbps"] > 0 and result["ceilings"]["flops"]["float32"] > 0
    for name, rate in result["ceilings"]["fma_tflops"].items():
        assert rate is None or result["ceilings"]["flops"][name] >= rate > 0
    for row in result["rows"]:
        assert set(row) == ROW
        assert row["shape"] == {"B": 1, "K": 19, "h": 32, "w": 64, "H": 128, "W": 256} | (
            {"S": 1} if row["op"] == "map_consistency" else {}
        )
        assert 0 < row["time_min_ms"] <= row["time_ms"] and row["share_of_ceiling"] > 0
        assert row["runs"] == 2 and row["dtype"] == "float32" and row["ladder"]
        known = {rival.name for rival in rivals.RIVALS[row["op"]]}
        assert set(row["speedup"]) | set(row["rivals_left_out"]) == known
        assert {"naive", "chunked"} <= set(row["speedup"]) == set(row["rival_ms"])
        assert "compile" in row["rivals_left_out"]
        if measure.can_measure():
            assert row["extra_mib"] <= row["extra_limit_mib"] + 2
    expected = {
        (name, one.name, passes)
        for name, all_passes in (("map_consistency", ("both",)), ("predict", ("forward",)))
        for one in OPERATORS[name].implementations
        if not one.obstacles(CPU) + one.reservations(CPU)
        for passes in all_passes
    }
    assert {(row["op"], row["impl"], row["pass"]) for row in result["rows"]} == expected
    assert "of ceiling" in tables.table("kernels", path)


def test_kernels_refuses_while_tests_are_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_golden.py").write_text("")
    (tests / "test_ops.py").write_text("def test_predict():\n    assert 1 == 2\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(kernels, "measure_case", lambda *_: pytest.fail("measured"))
    assert kernels.main(["--op", "predict", "--json", str(tmp_path / "none.json")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "FAILED tests/test_ops.py::test_predict" in captured.err
    assert not (tmp_path / "none.json").exists()
    (tests / "test_ops.py").write_text("")
    assert kernels.red(["predict"]) == "pytest ends with 5", "no test is no green test"
    (tests / "test_ops.py").write_text("def test_predict():\n    pass\n")
    assert kernels.red(["predict"]) is None


def test_what_is_asked_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU without Triton's interpreter; on a GPU its tests alone."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_golden.py").write_text("")
    (tests / "test_ops.py").write_text(
        "import pytest\n"
        "def test_predict():\n    pass\n"
        "@pytest.mark.cuda\ndef test_predict_cuda():\n    pass\n"
        "def test_predict_triton():\n    assert 1 == 2\n"
    )
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert kernels.red(["predict"]) is None
    assert kernels.red(["predict"], "cuda") is None
    (tests / "test_ops.py").write_text("def test_predict():\n    pass\n")
    assert kernels.red(["predict"], "cuda") == "pytest ends with 5"


@pytest.mark.usefixtures("green")
def test_what_is_not_begun_in_time_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And an operator of which nothing was begun is an error."""
    monkeypatch.setattr(kernels, "measure_case", lambda *_: pytest.fail("measured"))
    path = tmp_path / "k.json"
    words = ["--op", "predict", "--workload", "pascal", "--stop-after", "0.001"]
    assert kernels.main(["--quick", "--json", str(path), *words]) == 1
    assert capsys.readouterr().err == "error: nothing was measured of predict\n"
    result = json.loads(path.read_text())
    assert result["rows"] == result["winners"] == []
    assert {one["reason"] for one in result["left_out"]} == {"not begun within 0.001 s"}
    assert [one["dtype"] for one in result["left_out"]] == ["float32", "bfloat16"]


@pytest.mark.usefixtures("green")
def test_each_operator_has_its_turn_where_time_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def measured(key: kernels.Key, *_: Any) -> list[dict[str, Any]]:
        seen.append(key[0])
        return []

    monkeypatch.setattr(kernels, "measure_case", measured)
    words = ["--op", "map_consistency", "predict", "--workload", "pascal", "--stop-after", "60"]
    kernels.main(["--quick", "--json", str(tmp_path / "k.json"), *words])
    assert seen[:4] == ["map_consistency", "predict"] * 2


@pytest.mark.usefixtures("green")
def test_a_kernel_that_raises_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process is not used again: after an error of a GPU nothing works in it. A rival is left out."""
    with kernels.Trials() as trials:
        trials.pool = Failing()  # type: ignore[assignment]
        key = ("predict", "image_128x256", "float32", "forward", "cpu")
        with pytest.raises(kernels.FailedError, match=r"^CUDA error: an illegal memory access$"):
            trials.run(key, kernels.Contender("reference", False), 1, 1.0)
        assert trials.pool is None

    def run(self: kernels.Trials, key: kernels.Key, contender: kernels.Contender, *_: Any) -> Any:
        raise kernels.FailedError(f"{contender.name} fails")

    monkeypatch.setattr(kernels.Trials, "run", run)
    first = OPERATORS["predict"].implementations[-1]
    broken = dataclasses.replace(first, name="triton")
    made = dataclasses.replace(OPERATORS["predict"], implementations=(first, broken))
    monkeypatch.setitem(OPERATORS, "predict", made)
    command = ["--quick", "--op", "predict", "--workload", "image_128x256", "--json", str(tmp_path / "j")]
    assert kernels.main([*command, "--impl", "reference"]) == 0
    assert kernels.main(command) == 1
    assert capsys.readouterr().err == "error: predict image_128x256 float32 forward: triton: triton fails\n"


@pytest.mark.usefixtures("green")
def test_an_implementation_that_is_off_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = OPERATORS["predict"]

    def function(*, impl: str | None = None, **inputs: Any) -> Any:
        if impl == "cpp":
            inputs["logits"] = inputs["logits"].flip(1)
        return operator.function(impl="reference", **inputs)

    reference = operator.implementations[-1]
    implementations = (Implementation("cpp", reference.function, never), reference)
    made = dataclasses.replace(operator, function=function, implementations=implementations)
    monkeypatch.setitem(OPERATORS, "predict", made)
    monkeypatch.setattr(kernels.Trials, "run", lambda *_: {"seconds": 0.0, "extra_mib": None})
    monkeypatch.setattr(measure, "time_ms", lambda *_, **__: 1.0)
    command = ["--quick", "--op", "predict", "--workload", "image_128x256", "--json", str(tmp_path / "j")]
    assert kernels.main(command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "predict image_128x256 float32 forward: cpp is" in error
    assert "off the float32 reference" in error


@pytest.mark.usefixtures("green")
def test_a_rival_that_cannot_run_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: cases.Case, whole: bool, chunk: int) -> cases.Call:
        raise cases.CannotRunError("not today")

    def off(case: cases.Case, whole: bool, chunk: int) -> cases.Call:
        return lambda: tuple(value.flip(-1) for value in naive_call(case))

    def naive_call(case: cases.Case) -> cases.Result:
        return cases.call_of(naive.predict, case)()

    def tried(
        self: kernels.Trials, key: kernels.Key, contender: kernels.Contender, threads: int, limit_s: float
    ) -> dict[str, Any]:
        contender.call(cases.make_case(*key), whole=True)()
        return {"seconds": 10.0 if contender.name == "slow" else 0.0, "extra_mib": None}

    unit = 2**60
    monkeypatch.setitem(
        rivals.RIVALS,
        "predict",
        (
            rivals.Rival("naive", lambda case, whole, chunk: cases.call_of(naive.predict, case)),
            rivals.Rival("missing", fails),
            rivals.Rival("off", off),
            rivals.Rival("large", fails, bytes=lambda case: unit),
            rivals.Rival("long", fails, flops=lambda case: unit),
        ),
    )
    monkeypatch.setattr(kernels.Trials, "run", tried)
    result = measured_kernels(tmp_path / "k.json", "--op", "predict", "--workload", "image_128x256")
    for row in result["rows"]:
        assert set(row["speedup"]) == {"naive"}
        reasons = row["rivals_left_out"]
        assert reasons["missing"] == "not today"
        assert "off the float32 reference" in reasons["off"]
        assert "GiB at least" in reasons["large"]
        assert "at the machine's rate" in reasons["long"]


@pytest.mark.usefixtures("green")
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--quick"], "slow to start: left out by --quick"),
        (["--stop-after", "600"], "slow to start: left out by --stop-after"),
        ([], "tried"),
    ],
)
def test_rivals_that_are_slow_to_start(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where time is short, it goes to what is measured."""

    def fails(case: cases.Case, whole: bool, chunk: int) -> cases.Call:
        raise cases.CannotRunError("tried")

    rates = {"flops": {"float32": 1.0}, "copy_gbps": 1.0}
    monkeypatch.setattr(kernels.ceilings, "measured", lambda *_, **__: rates)
    monkeypatch.setitem(rivals.RIVALS, "predict", (rivals.Rival("keops", fails),))
    monkeypatch.setattr(kernels.Trials, "run", lambda *_: {"seconds": 0.0, "extra_mib": None})
    monkeypatch.setattr(measure, "time_ms", lambda *_, **__: 1.0)
    path = tmp_path / "k.json"
    chosen = ["--op", "predict", "--workload", "image_128x256", "--impl", "reference"]
    assert kernels.main([*chosen, *words, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["rivals_left_out"] == {"keops": reason}


def test_the_winner_of_a_case() -> None:
    head = {"op": "predict", "workload": "pascal", "dtype": "float32", "pass": "forward"}
    rows = [{**head, "impl": impl, "time_ms": ms} for impl, ms in (("cpp", 3.0), ("triton", 2.0))]
    assert kernels.winner(rows) == {**head, "impl": "triton", "time_ms": 2.0, "others": {"cpp": 1.5}}


def test_trials_end_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_START_S", 0.0)
    key = ("predict", "image_128x256", "float32", "forward", "cpu")
    with kernels.Trials() as trials:
        with pytest.raises(cases.CannotRunError, match="did not end within"):
            trials.run(key, kernels.Contender("reference", False), 1, 1e-4)
        monkeypatch.setattr(kernels, "_START_S", 60.0)
        assert trials.run(key, kernels.Contender("reference", False), 1, 60.0)["seconds"] > 0
        with pytest.raises(cases.CannotRunError, match="a run takes"):
            trials.run(key, kernels.Contender("reference", False), 1, 1e-6)


def test_a_slow_run_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def counted(case: cases.Case, name: str, *, whole: bool = False) -> cases.Call:
        def run() -> cases.Result:
            ran.append(case.inputs["query"].shape[2])
            return (torch.zeros(1),)

        return run

    monkeypatch.setattr(kernels, "implementation_call", counted)
    key, own = (
        ("cross_similarity", "n1024_dense_max", "float32", "forward", "cpu"),
        kernels.Contender("cpp", False),
    )
    tried = kernels.trial(key, own, torch.get_num_threads(), 60.0)
    assert ran == [8, 32, 32] and tried["seconds"] < 1
    assert (tried["extra_mib"] is not None) == measure.can_measure()
    monkeypatch.setattr(measure, "SLOW_S", 0.0)
    kernels.trial(key, own, torch.get_num_threads(), 60.0)
    assert ran[3:] == [8, 32]
