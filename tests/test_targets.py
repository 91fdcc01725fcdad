"""What is asked of the kernels on a GPU: the arithmetic behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, first_call, machine, measure, profile, sanitize, targets
from cisc_ext.ops._workloads import Size
from cisc_ext.ops.registry import OPERATORS

RATES = targets.Rates(copy_gbps=4000.0, multiprocessors=132, ghz=1.75)
TRITON, CPP = targets.TARGETS["triton"], targets.TARGETS["cpp"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def case_of(op: str, passes: str, size: Size = targets.SMALL) -> cases.Case:
    return next(
        case
        for case in targets.cases(size, "cpu")
        if (case.operator.name, case.passes, case.dtype) == (op, passes, torch.float32)
    )


def test_the_floor_is_what_is_counted() -> None:
    case = case_of("rectified_cross_entropy", "both")
    pixels = 2 * 97 * 97 * 19
    found = targets.floor(case, RATES)
    work = targets.WORK["rectified_cross_entropy", "both"]
    assert (found["special"], found["instructions"]) == (pixels, pixels * work.instructions)
    assert found["bytes"] == case.operator.cost(case.inputs, "both").bytes
    assert found["special_us"] == pytest.approx(pixels / (16 * 132 * 1.75e9) * 1e6)
    assert found["instructions_us"] == pytest.approx(pixels * work.instructions / (128 * 132 * 1.75e9) * 1e6)
    assert found["bytes_us"] == pytest.approx(found["bytes"] / 4e12 * 1e6)
    maps = targets.floor(case_of("map_consistency", "forward"), RATES)
    assert maps["special"] == 2 * 97 * 97


@pytest.mark.parametrize(("of", "times"), [(TRITON, 1.8), (CPP, 1.5)])
def test_a_loss_is_held_against_its_floor(of: targets.Targets, times: float) -> None:
    case = case_of("predict", "forward")
    parts = targets.floor(case, RATES)
    least_ms = 1e-3 * max(parts["bytes_us"], parts["special_us"], parts["instructions_us"])
    limit_ms = times * least_ms + 0.01
    assert targets.against_floor(case, RATES, 0.999 * limit_ms, of)["met"]
    row = targets.against_floor(case, RATES, 1.001 * limit_ms, of)
    assert not row["met"] and row["target"] == f"{limit_ms:.4f} ms" and row["special"] == 0


def test_a_loss_in_cuda_is_held_against_plain_pytorch() -> None:
    case = case_of("rectified_cross_entropy", "both")
    ms = 1e-6
    for plain, met in (
        (targets.Plain(5.01 * ms, 100.0, 4.99), True),
        (targets.Plain(4.99 * ms, 100.0, 4.99), False),
        (targets.Plain(5.01 * ms, 100.0, 5.01), False),
        (targets.Plain(5.01 * ms, 100.0, 0.0), True),
    ):
        row = targets.against_floor(case, RATES, ms, CPP, plain)
        assert row["met"] is met and "5 x plain, 1/20 of its memory" in row["target"]
        assert targets.against_floor(case, RATES, ms, TRITON, plain)["met"]


@pytest.mark.parametrize(("of", "share"), [(TRITON, 0.75), (CPP, 0.8)])
def test_what_is_bound_by_bytes_is_held_against_a_copy(of: targets.Targets, share: float) -> None:
    for op, passes in (("masked_average_pool", "forward"), ("prototype_similarity", "backward")):
        case = case_of(op, passes)
        moved = case.operator.cost(case.inputs, passes).bytes
        assert targets.against_copy(case, RATES, moved / (1e6 * 4000 * (share + 0.001)), of)["met"]
        row = targets.against_copy(case, RATES, moved / (1e6 * 4000 * (share - 0.001)), of)
        assert not row["met"] and row["reached"] == f"{share - 0.001:.3f} of copy"


def test_the_row_maximum_is_held_against_a_rate_and_chunks() -> None:
    case = targets.dense_case((32, 32), torch.bfloat16, "cpu")
    flops = 2 * 256 * 1024 * 1024
    fast = flops / 401e9  # milliseconds
    assert targets.against_chunked(case, fast, 1.21 * fast, TRITON)["met"]
    assert not targets.against_chunked(case, fast, 1.19 * fast, TRITON)["met"]
    assert not targets.against_chunked(case, flops / 399e9, 1.0, TRITON)["met"]
    assert "1.00 x chunked" in targets.against_chunked(case, 1.0, 1.0, TRITON)["reached"]


def test_pytorch_in_chunks_gives_the_row_maximum() -> None:
    case = targets.dense_case((20, 20), torch.float32, "cpu")
    wanted = cases.implementation_call(case, "reference")()
    for chunk in (7, 128, 1024):
        assert cases.disagreement(targets.chunked(case, chunk)(), wanted) < 1e-5


def test_every_operator_has_a_target() -> None:
    measured = list(targets.cases(targets.SMALL, "cpu"))
    names = {case.operator.name for case in measured}
    assert names | {targets.dense_case((4, 4), torch.float16, "cpu").operator.name} == set(OPERATORS)
    assert {(case.operator.name, case.passes) for case in measured} >= set(targets.WORK)
    assert targets.FULL.low == (181, 181)
    assert targets.PIXELS[0] * targets.PIXELS[1] == 131072


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A GPU on which the kernels take that long, plain PyTorch a hundred times, and all are right."""
    of_own: set[int] = set()

    def all_take(ms: float) -> None:
        def graph_ms(make: Callable[[], cases.Call]) -> float:
            call = make()
            call()
            return ms if id(call) in of_own else 100 * ms

        monkeypatch.setattr(targets, "graph_ms", graph_ms)
        monkeypatch.setattr(targets, "called_ms", lambda call: 100 * ms)
        monkeypatch.setattr(measure, "peak_extra_mib", lambda call, **_: 1 if id(call) in of_own else 100)

    kept = []

    def reference(case: cases.Case, name: str, **more: Any) -> cases.Call:
        call = cases.implementation_call(case, "reference", **more)
        kept.append(call)  # its id stays its own
        of_own.add(id(call))
        return call

    monkeypatch.setattr(targets, "implementation_call", reference)
    monkeypatch.setattr(targets, "obstacles", lambda case, impl: [])
    monkeypatch.setattr(targets, "SMALL", Size("small", 1, 3, 17, 17))
    monkeypatch.setattr(targets, "FEW_PIXELS", (4, 4))
    return all_take


def test_a_row_of_every_case(pretended: Callable[[float], None]) -> None:
    pretended(1e9)
    rows = list(targets.measured("cpu", RATES, quick=True))
    both = {(op, i) for op in OPERATORS for i in ("cpp", "triton")}
    assert {(row["op"], row["impl"]) for row in rows} == both - {("cross_similarity", "cpp")}
    assert len(rows) == 38 and len(targets.missed(rows)) == len(rows)
    pretended(1e-9)
    assert not targets.missed(list(targets.measured("cpu", RATES, quick=True)))
    plain = [row for row in rows if "plain_ms" in row]
    assert {row["impl"] for row in plain} == {"cpp"}
    assert {row["op"] for row in plain} == {"predict", "map_consistency", "rectified_cross_entropy"}


def test_a_call_is_warmed_up_and_timed_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(measure, "time_ms", lambda call, **_: float(len(call())))

    def call() -> tuple[torch.Tensor, ...]:
        done.append(1)
        return ()

    targets.called_ms(call)
    assert len(done) == 1 + targets._RUNS


def _no_chip_for_triton(case: cases.Case, impl: str) -> list[str]:
    return ["no chip"] if impl == "triton" else []


def test_what_cannot_run_is_left_out_with_its_reason(
    pretended: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended(1e-9)
    monkeypatch.setattr(targets, "obstacles", _no_chip_for_triton)
    left_out: list[dict[str, str]] = []
    rows = list(targets.measured("cpu", RATES, True, left_out=left_out))
    assert {row["impl"] for row in rows} == {"cpp"}
    assert sorted((one["op"], one["impl"], one["reason"]) for one in left_out) == [
        (op, "triton", "no chip") for op in sorted(OPERATORS)
    ]


@pytest.mark.parametrize(("words", "code"), [([], 1), (["--impl", "cpp"], 0)])
def test_what_cannot_run_is_a_failure_unless_left_out_by_name(
    words: list[str],
    code: int,
    pretended: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretended(1e-9)
    monkeypatch.setattr(targets, "obstacles", _no_chip_for_triton)
    of_device = targets.measured
    monkeypatch.setattr(targets, "measured", lambda device, *rest: of_device("cpu", *rest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )
    monkeypatch.setattr(targets.ceilings, "copy_gbps", lambda *_: 4000.0)
    monkeypatch.setattr(machine, "facts", lambda *_: {})
    path = tmp_path / "targets.json"
    assert targets.main(["--quick", "--json", str(path), *words]) == code
    result = json.loads(path.read_text())
    assert {row["impl"] for row in result["rows"]} == {"cpp"}
    assert len(result["left_out"]) == code * len(OPERATORS)
    assert ("LEFT OUT predict triton: no chip" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    ("prints", "ghz"),
    [("echo 1980; echo 1755", 1.98), ("echo '[N/A]'", 1.75), ("exit 9", 1.75), ("", 1.75)],
    ids=["two", "unknown", "fails", "empty"],
)
def test_the_clock_is_the_gpus(
    prints: str, ghz: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert targets.clock_ghz() == targets.GHZ == 1.75
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{prints}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert targets.clock_ghz() == ghz


def test_a_wrong_result_meets_no_target(
    pretended: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended(1e-9)

    def wrong(case: cases.Case, name: str, **more: Any) -> cases.Call:
        call = cases.implementation_call(case, "reference", **more)
        return lambda: tuple(2 * value for value in call())

    monkeypatch.setattr(targets, "implementation_call", wrong)
    rows = list(targets.measured("cpu", RATES, quick=True))
    assert all("off the float32 reference" in row["reached"] and not row["met"] for row in rows)


@NO_GPU
@pytest.mark.parametrize("module", [targets, first_call, sanitize, profile])
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
