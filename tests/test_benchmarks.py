"""The benchmarks measure what they say: baseline against goldens, result files, tables, the gate."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import (
    cases,
    full_step,
    gate,
    gpu_rivals,
    kernels,
    machine,
    measure,
    methods,
    naive,
    plots,
    published,
    rivals,
    step,
    tables,
)
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS, PASSES, Call, Cost, Implementation, never

Golden = Callable[[str], dict[str, Tensor]]
CPU = Call("cpu", (torch.float32,))
LOSSES = ["square", "wide", "unaligned", "heavy_ignore", "no_shared_class"]


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).detach().abs().max() / expected.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("name", LOSSES)
def test_published_arithmetic_gives_the_goldens(name: str, golden: Golden) -> None:
    d = golden(name)
    query, guide = d["feat_unlabeled"].requires_grad_(), d["feat_labeled"].requires_grad_()
    logits, classes = d["logits_low"].requires_grad_(), d["classes"]
    proto = published.prototype(guide, d["mask_labeled"], classes)
    assert relative(proto, d["prototype_labeled"]) < 1e-9
    similarity = published.cisc_map(query, proto, d["mask_unlabeled"].shape[-2:])
    assert relative(similarity[:, 0], d["cisc_map"]) < 1e-9
    loss = published.consistency(query, guide, d["mask_unlabeled"], d["mask_labeled"], classes)
    assert relative(loss, d["consistency_loss"]) < 1e-9
    grad_query, grad_guide = torch.autograd.grad(loss, [query, guide])
    assert relative(grad_query, d["grad_feat_unlabeled"]) < 1e-9
    assert relative(grad_guide, d["grad_feat_labeled"]) < 1e-9
    rectified = published.rectified(logits, d["mask_unlabeled"], similarity.detach(), classes)
    assert relative(rectified, d["rectified_loss"]) < 1e-9
    assert relative(torch.autograd.grad(rectified, logits)[0], d["grad_logits_low"]) < 1e-9


@pytest.mark.parametrize("name", step.VARIANTS)
def test_variants_agree_in_float64(name: str) -> None:
    x = step.make_inputs(49, dtype=torch.float64)
    expected = step.VARIANTS[name]["published"](x)
    for variant in ("reference", "auto"):
        assert step.disagreement(step.VARIANTS[name][variant](x), expected) < 1e-9


def test_inputs_are_what_the_step_needs() -> None:
    x = step.make_inputs(97)
    for labels in (x.query_labels, x.guide_labels):
        assert labels.shape == (2, 97, 97) and labels.dtype == torch.uint8
        shared = (labels == x.classes[:, :, None]).float().mean((1, 2))
        assert bool((shared > 0.03).all()) and bool((labels == 255).any())


def test_disagreeing_variants_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: step.Inputs) -> step.Result:
        loss, grad = step.rectify(x)
        return loss, grad * 1.001

    monkeypatch.setitem(step.VARIANTS["rectify"], "auto", wrong)
    monkeypatch.setattr(measure, "time_ms", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(step.DisagreementError, match=r"rectify at 33: auto is .* off"):
        step.measure_step("rectify", 33, "cpu", 1)


def test_step_writes_its_result(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    command = [sys.executable, "-m", "benchmarks.step", "--crop", "129", "--repeats", "1", "--threads", "1"]
    done = subprocess.run([*command, "--json", str(path)], cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert set(result["machine"]) == {"cpu", "isa", "cores", "memory_gib", "gpu"}
    assert set(result["versions"]) == {"torch", "python", "numpy", "compiler", "cuda"}
    assert result["threads"] == 1 and result["device"] == "cpu"
    assert result["command"].startswith("python -m benchmarks.step --crop 129")
    rows = {(row["step"], row["variant"]): row for row in result["rows"]}
    variants = {name: list(step.VARIANTS[name]) for name in step.VARIANTS}
    variants["network"] = list(step.NETWORK_VARIANTS)
    assert set(rows) == {(name, variant) for name in variants for variant in variants[name]}
    for (_, variant), row in rows.items():
        assert (row["crop"], row["features"], row["classes"]) == (129, 33, 19)
        assert 0 < row["time_min_ms"] <= row["time_ms"]
        assert row["speedup"] > 0 and (variant != "published" or row["speedup"] == row["memory_ratio"] == 1)
        assert set(row["implementations"]) == (
            set() if variant == "published" else set(step.OPERATORS[row["step"]])
        )
        if variant != "published" and measure.can_measure():
            assert row["memory_ratio"] == pytest.approx(
                row["extra_mib"] / rows[row["step"], "published"]["extra_mib"], abs=1e-3
            )
    assert len(done.stdout.splitlines()) == 1 + len(rows)


def test_the_full_step_in_small(tmp_path: Path) -> None:
    """Both stages, ours and the published, at a size for a CPU; nothing is judged there."""
    path = tmp_path / "step.json"
    words = ["--crop", "33", "--repeats", "1", "--full", "tiny", "--json", str(path)]
    assert step.main(words) == 0
    full = json.loads(path.read_text())["full"]
    stages = ("re-training", "supervised")
    expected = {("similarity and losses", "same", variant) for variant in ("published", "auto")}
    expected |= {(stage, "same", variant) for stage in stages for variant in ("published", "auto")}
    expected |= {(stage, "own", variant) for stage in stages for variant in ("published", "recipe")}
    assert {(row["step"], row["settings"], row["variant"]) for row in full["rows"]} == expected
    assert all(row["images_per_s"] > 0 and row["batch"] == 2 for row in full["rows"])
    assert full["too_large_batches"] == [] and set(full["tf32"]) == {"convolutions", "products"}
    assert len(full["targets"]) == 7 and sum(one["target"] == "" for one in full["targets"]) == 2


def test_the_full_step_is_judged() -> None:
    def row(name: str, settings: str, variant: str, **more: float | None) -> dict[str, Any]:
        return {"step": name, "settings": settings, "variant": variant, **more}

    def rows(ms: float, speedup: float, memory: float, recipe: float) -> list[dict[str, Any]]:
        part = row("similarity and losses", "same", "auto", time_ms=ms, speedup=speedup, memory_ratio=memory)
        same = [
            row(stage, "same", "auto", time_ms=100, speedup=1.1) for stage in ("re-training", "supervised")
        ]
        own = [row(stage, "own", "recipe", speedup=recipe) for stage in ("re-training", "supervised")]
        return [part, *same, *own]

    def met(*values: float) -> list[bool | None]:
        return [one["met"] for one in full_step.judged(rows(*values)) if one["target"]]

    assert met(4.9, 10.1, 0.049, 3.1) == [True] * 5
    assert met(5.1, 9.9, 0.051, 2.9) == [False] * 5


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(size: full_step.Size, device: str, repeats: int) -> list[dict[str, Any]]:
        asked.append(size.batch)
        if size.batch > 2:
            raise torch.OutOfMemoryError("full")
        return []

    monkeypatch.setattr(full_step, "measured", measured)
    monkeypatch.setattr(full_step, "judged", lambda rows: [])
    found = full_step.run(full_step.FULL, "cpu", 1)
    assert asked == [8, 4, 2] and found["too_large_batches"] == [8, 4]


def test_losses_of_the_full_step_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*words: Any) -> Any:
        return 1.001 * full_step.similarity_and_losses(*words)

    monkeypatch.setitem(full_step.RETRAINING, "auto", wrong)
    with pytest.raises(full_step.DisagreementError, match=r"^similarity and losses: auto is .* off"):
        full_step.measured(full_step.TINY, "cpu", 1)


def measured_kernels(path: Path, *arguments: str) -> dict[str, Any]:
    assert kernels.main(["--quick", "--json", str(path), *arguments]) == 0
    result: dict[str, Any] = json.loads(path.read_text())
    return result


ROW = {
    *("op", "impl", "reduction", "mode", "dtype", "shape", "workload", "ladder", "pass", "time_ms"),
    *("time_min_ms", "runs", "tflops", "gbps", "share_of_ceiling", "extra_mib", "extra_limit_mib"),
    *("naive_mib", "speedup", "rival_ms", "rival_runs", "rival_extra_mib", "rival_chunk", "rivals_left_out"),
}


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


class Failing:
    """Stands for a pool whose process raises."""

    _processes: dict[int, Any] | None = None

    def submit(self, *_: Any) -> Future[Any]:
        result: Future[Any] = Future()
        result.set_exception(RuntimeError("CUDA error: an illegal memory access\nmore"))
        return result

    def shutdown(self, **_: Any) -> None:
        pass


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


SMALL = {
    **{(op, "image_128x256"): OPERATORS[op] for op in OPERATORS if op != "cross_similarity"},
    ("cross_similarity", "n1024_dense_max"): OPERATORS["cross_similarity"],
}


@pytest.mark.parametrize(("op", "workload"), SMALL)
def test_rivals_give_the_operators_result(op: str, workload: str) -> None:
    for passes in next(one.passes for one in OPERATORS[op].workloads() if one.name == workload):
        case = cases.make_case(op, workload, "float32", passes, "cpu")
        expected = cases.implementation_call(case, "reference")()
        for rival in rivals.RIVALS[op]:
            if rival.name not in ("compile", "keops", "faiss"):
                try:
                    result = rival.make(case, False, rival.chunks[0])()
                except cases.CannotRunError:
                    continue
                assert cases.disagreement(result, expected) < cases.TOLERANCE[torch.float32], rival.name


@pytest.mark.parametrize("mode", ["dense", "labels", "own"])
@pytest.mark.parametrize("reduction", ["max", "topk", "softmax", "mean"])
def test_rivals_of_cross_similarity(mode: str, reduction: str) -> None:
    low = {"query": torch.randn(2, 16, 8, 8), "guide": torch.randn(2, 16, 9, 7)}
    labels = torch.randint(0, 1 if mode == "dense" else 3, (2, 36, 28), dtype=torch.uint8)
    own = {"query_labels": torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)}
    of_mode = own if mode == "own" else {"classes": torch.zeros(2, 1, dtype=torch.int64)}
    inputs = {**low, "guide_labels": labels, "reduction": reduction, "k": 3, **of_mode}
    one = next(w for w in OPERATORS["cross_similarity"].workloads() if w.mode == mode)
    ran = set()
    for passes in ("forward", "backward"):
        case = cases.Case(OPERATORS["cross_similarity"], one, torch.float32, passes, inputs)
        expected = cases.implementation_call(case, "reference")()
        for rival in rivals.RIVALS["cross_similarity"]:
            if rival.name not in ("compile", "keops", "faiss"):
                try:
                    call = rival.make(case, False, 16)
                    result, whole = call(), rival.make(case, True, 16)()
                except cases.CannotRunError:
                    continue
                ran.add((rival.name, passes))
                assert cases.disagreement(result, expected) < 1e-5, (rival.name, passes)
                if passes == "backward":
                    assert cases.disagreement(whole[-2:], expected) < 1e-5, (rival.name, passes)
    assert {("naive", "forward"), ("naive", "backward"), ("chunked", "forward")} <= ran
    assert (("softmax", "forward") in ran) == (reduction == "softmax")


FAKES = {
    "flashlib": SimpleNamespace(
        flash_knn=lambda x, c, k: torch.cdist(x, c).square().topk(k, largest=False),
    ),
    "torch.nn.attention.flex_attention": SimpleNamespace(flex_attention=F.scaled_dot_product_attention),
    "liger_kernel.transformers.functional": SimpleNamespace(liger_cross_entropy=F.cross_entropy),
    "cut_cross_entropy": SimpleNamespace(
        linear_cross_entropy=lambda e, c, targets, reduction: F.cross_entropy(
            e @ c.t(), targets, reduction=reduction
        ),
    ),
}


@pytest.mark.parametrize(
    ("op", "name", "reduction"),
    [
        ("cross_similarity", "flashlib", "max"),
        ("cross_similarity", "flashlib", "topk"),
        ("cross_similarity", "flex_attention", "softmax"),
        ("rectified_cross_entropy", "liger", "mean"),
        ("rectified_cross_entropy", "cut_cross_entropy", "mean"),
    ],
)
def test_rivals_on_a_gpu_ask_for_the_right_thing(
    op: str, name: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their packages replaced by plain expressions of the same meaning."""
    workload = f"n4096_labels_{reduction}" if op == "cross_similarity" else "image_128x256"
    dtype = "bfloat16" if name == "cut_cross_entropy" else "float32"
    case = cases.make_case(op, workload, dtype, "forward", "cpu")
    rival = rivals.named(case, name)
    with pytest.raises(cases.CannotRunError, match="runs on a GPU only"):
        rival.make(case, False, 0)
    monkeypatch.setattr(gpu_rivals, "_on_a_gpu", lambda case, who: None)
    monkeypatch.setattr(gpu_rivals, "module", lambda name, package: FAKES[name])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    result = rival.make(case, False, 0)()
    expected = cases.implementation_call(case, "reference")()
    assert cases.disagreement(result, expected) < cases.TOLERANCE[case.dtype]


def test_cost_counts_what_labels_leave() -> None:
    operator = OPERATORS["cross_similarity"]
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[:, 2:] = 1
    inputs = {"query": torch.ones(1, 8, 4, 4), "guide": torch.ones(1, 8, 4, 4), "guide_labels": labels}
    norms = 2 * 2 * 8 * 16
    half = operator.cost({**inputs, "classes": torch.zeros(1, 1, dtype=torch.int64)}, "forward")
    assert half.flops == 2 * 8 * 16 * 8 + norms
    own = operator.cost({**inputs, "query_labels": labels}, "forward")
    assert own.flops == 2 * 8 * (8 * 8 + 8 * 8) + norms
    none = operator.cost({**inputs, "classes": torch.full((1, 1), -1)}, "forward")
    assert none.flops == norms
    assert set(PASSES) == {"forward", "backward", "both"}
    assert isinstance(half, Cost)


def kernels_result() -> dict[str, Any]:
    def row(op: str, size: int, impl: str, **more: Any) -> dict[str, Any]:
        pixels = size * size // 8
        shape = {"N": pixels, "M": pixels} if op == "cross_similarity" else {}
        searches = {"faiss": 1.0 * size, "keops": 9.0 * size} if op == "cross_similarity" else {}
        return {
            **{"op": op, "impl": impl, "dtype": "float32", "pass": "forward", "ladder": True},
            **{"workload": f"image_{size}x{2 * size}", "shape": shape or {"H": size, "W": 2 * size}},
            **{"time_ms": size / 10, "extra_mib": 1.5, "share_of_ceiling": 0.5, "naive_mib": size**2 / 16},
            **{"speedup": {"naive": 3.0, "chunked": 2.0}, "rival_ms": {"naive": size / 3.0, **searches}},
            **{"rival_extra_mib": {"naive": size / 2.0}, **more},
        }

    rows = [
        row(op, size, impl) for op in OPERATORS for size in (128, 256, 512) for impl in ("cpp", "reference")
    ]
    return {
        "machine": {"cpu": "a chip", "gpu": None, "memory_gib": 8.0},
        **{"versions": {"torch": "2"}, "threads": 2, "command": "python -m this", "device": "cpu"},
        "rows": [
            *rows,
            row("predict", 321, "cpp", ladder=False),
            row("predict", 321, "reference", ladder=False),
        ],
    }


def test_kernels_table_shows_the_nearest_rival(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(kernels_result()))
    lines = tables.table("kernels", path).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == list(tables.COLUMNS["kernels"].values())
    assert len(lines) == 5, "the ladder is for pictures, the reference where there is no kernel"
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:4] == ["predict", "image_321x642", "forward", "cpp"]
    assert cells[-3:] == ["3", "2", "chunked"]


def test_a_gpus_table_names_the_winner(tmp_path: Path) -> None:
    def row(impl: str, dtype: str, time_ms: float, **more: Any) -> dict[str, Any]:
        return {
            **kernels_result()["rows"][-1],
            **{"impl": impl, "dtype": dtype, "time_ms": time_ms, "mode": None, **more},
        }

    rows = [
        row("cpp", "float32", 3.0),
        row("triton", "float32", 2.0),
        row("reference", "float32", 9.0),
        row("triton", "bfloat16", 1.0),
        row("reference", "bfloat16", 0.5),
        row("reference", "float16", 0.5),
        row("triton", "float32", 0.1, ladder=True),
    ]
    path = tmp_path / "kernels.json"
    gpu = {"device": "cuda", "machine": {"gpu": "a GPU"}}
    path.write_text(json.dumps({**kernels_result(), **gpu, "rows": rows}))
    lines = tables.table("kernels_cuda", path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0] == list(tables.COLUMNS["kernels_cuda"].values())
    shown = [{heading: cell for heading, cell in zip(cells[0], line, strict=True)} for line in cells[2:]]
    assert [(one["by"], one["dtype"], one["wins"]) for one in shown] == [
        ("cpp", "float32", "triton"),
        ("triton", "float32", "triton"),
        ("triton", "bfloat16", "reference"),
        ("reference", "float16", "reference"),
    ]
    assert lines[-1].startswith("a GPU, torch 2")


def test_a_result_of_a_gpu_may_be_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.SOURCES, "kernels_cuda", tmp_path / "none.json")
    text = "<!-- kernels_cuda:begin -->\n<!-- kernels_cuda:end -->"
    assert tables.AWAITED in tables.refreshed(text, {"kernels_cuda": tmp_path / "none.json"})
    with pytest.raises(FileNotFoundError):
        tables.refreshed(text, {"kernels_cuda": tmp_path / "another.json"})
    with pytest.raises(FileNotFoundError):
        tables.refreshed(text.replace("_cuda", ""), {"kernels": tmp_path / "none.json"})


def test_plots_are_drawn_the_same_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(kernels_result()))
    first: list[bytes] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        assert plots.main(["--json", str(path), "--out", str(folder)]) == 0
        pictures = sorted(folder.iterdir())
        names = ["kernels_memory_cpu.svg", "kernels_time_cpu.svg", "similarity_cpu.svg"]
        assert [picture.name for picture in pictures] == names
        first = first or [picture.read_bytes() for picture in pictures]
        assert first == [picture.read_bytes() for picture in pictures]
    assert b"naive needs more than 8 GiB" in first[0] and b"cross_similarity" in first[1]
    assert all(name in first[2] for name in (b"faiss", b"KeOps", b"torch, naive", b"time in ms", b"in MiB"))
    assert b"faiss" in first[1] and b"predict" not in first[2]
    path.write_text(json.dumps({**kernels_result(), "rows": []}))
    assert plots.main(["--json", str(path), "--out", str(tmp_path)]) == 1
    assert "found none" in capsys.readouterr().err


def test_the_wall_is_where_naive_memory_meets_the_machines() -> None:
    rows = [{"shape": {"H": side, "W": side}, "naive_mib": float(side**2)} for side in (8, 16, 32)]
    assert plots.wall(rows, 512.0) == pytest.approx(512)
    assert plots.wall(rows, 2048.0) is None


def test_what_is_slow_is_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time_ms", lambda call, device: call())
    calls = [lambda ms=ms: ms for ms in (1.0, 600.0, 6000.0)]
    assert [len(times) for times in measure.times_in_turn(calls, budget_s=0)] == [5, 3, 2]
    assert [len(times) for times in measure.times_in_turn(calls, quick=True)] == [2, 2, 2]
    assert len(measure.times_in_turn(calls[:1], budget_s=60)[0]) == 30


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


def test_time_is_that_of_the_call() -> None:
    assert 20 <= measure.time_ms(lambda: time.sleep(0.02)) < 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gate_and_step_refuse_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main(["--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "NVIDIA GPU" in captured.err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda"])


def test_gate_keeps_what_each_part_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda *_: {})
    monkeypatch.setattr(gate, "PARTS", {"good": (("this",), 60), "bad": (("json.tool", "{out}/none"), 60)})
    assert gate.main(["--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "gate.json").read_text())
    assert [(part["name"], part["returncode"] == 0) for part in result["parts"]] == [
        ("good", True),
        ("bad", False),
    ]
    assert "Zen of Python" in result["parts"][0]["tail"] and not result["passed"]
    assert gate.main(["--out", str(tmp_path), "--only", "good"]) == 0
    assert json.loads((tmp_path / "gate.json").read_text())["passed"]
    with pytest.raises(SystemExit):
        gate.main(["--out", str(tmp_path), "--only", "good,none"])


def test_gate_stops_a_part_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gate, "PARTS", {"slow": (("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"), 1)}
    )
    part = gate.run_part("slow", tmp_path)
    assert part["returncode"] is None and part["seconds"] < 30


def test_facts_tell_no_folder_and_the_commit_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CISC_COMMIT", "0123abc")
    facts = machine.facts("benchmarks.step", ["--json", str(Path("/somewhere/step.json")), "--crop", "33"])
    assert facts["commit"] == "0123abc"
    assert facts["command"] == "python -m benchmarks.step --json step.json --crop 33"


def test_methods_refuses_what_a_device_lacks(
    few_scenes: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for there, more, message in (
        (False, ["--device", "cuda"], "torch sees no NVIDIA GPU"),
        (True, ["--device", "cuda", "--only", "stpp"], "--only: on cuda must be of sup, cisc-r, got stpp"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(SystemExit):
            methods.main(["--data-root", str(few_scenes[0]), *more])
        assert message in capsys.readouterr().err


def test_methods_runs_and_goes_on(few_scenes: tuple[Path, Path], tmp_path: Path) -> None:
    scenes, lists = map(str, few_scenes)
    result = tmp_path / "methods.json"
    where = ["--data-root", scenes, "--split", lists, "--runs", str(tmp_path / "runs"), "--json", str(result)]
    short = ["--only", "sup", "--steps", "1"]
    assert methods.main([*where, *short]) == 0
    first = json.loads(result.read_text())
    assert first["shortened"] and first["rows"][0]["steps"] == 1 and first["rows"][0]["reliable_miou"] is None
    assert methods.main([*where, *short]) == 0
    assert json.loads(result.read_text())["rows"] == first["rows"]
    assert "supervised mIoU" in tables.table("methods", result)


def test_replace_between() -> None:
    text = "a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n"
    new = tables.replace_between(text, "t", "new")
    assert new == "a\n<!-- t:begin -->\nnew\n<!-- t:end -->\nb\n"
    assert tables.replace_between(new, "t", "new") == new
    for broken in ("", text + text, "<!-- t:end -->\n<!-- t:begin -->"):
        with pytest.raises(ValueError, match="expected one"):
            tables.replace_between(broken, "t", "new")


def test_tables_refresh_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "machine": {"cpu": "a chip", "gpu": None},
        "versions": {"torch": "2"},
        "threads": 2,
        "command": "python -m this",
        "rows": [{"crop": 721, "time_ms": 1234.5}, {"crop": 321, "time_ms": None}],
    }
    source, readme = tmp_path / "r.json", tmp_path / "README.md"
    source.write_text(json.dumps(result))
    readme.write_text("<!-- own:begin -->\n<!-- own:end -->\n")
    arguments = ["--readme", str(readme), f"own={source}"]
    assert tables.main(["--check", *arguments]) == 1
    assert "stale" in capsys.readouterr().err
    assert tables.main(arguments) == 0
    lines = readme.read_text().splitlines()
    assert lines[1:5] == [
        "| crop | time ms |",
        "| ---: | ------: |",
        "|  721 |    1234 |",
        "|  321 |         |",
    ]
    assert lines[6] == "a chip, 2 threads, torch 2: `python -m this`"
    assert tables.main(["--check", *arguments]) == 0


def test_readme_shows_the_results() -> None:
    readme = machine.ROOT / "README.md"
    if not readme.is_file() or "<!-- step:begin -->" not in readme.read_text():
        pytest.skip("README.md has no table of results")
    assert tables.main(["--check"]) == 0
