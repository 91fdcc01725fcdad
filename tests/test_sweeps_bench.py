"""benchmarks.sweeps: what is asked of pixel-level similarity on a GPU, and how it is judged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import cases, measure, pixel_cases, sweep_parts, sweeps
from benchmarks.cases import Case, implementation_call
from benchmarks.sweep_parts import PARTS, QUICK, Bench
from cisc_ext.ops.registry import Operator

BENCH = Bench("cpu", False, QUICK)
FLOP = 2 * 256 * (8 * 16) ** 2
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def ms(tflops: float, flop: int = FLOP) -> float:
    return flop / (1e9 * tflops)


@pytest.fixture(autouse=True)
def reference_as_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are the reference, on any machine."""
    gradients = pixel_cases.with_gradients
    monkeypatch.setattr(
        sweep_parts, "implementation_call", lambda case, name: implementation_call(case, "reference")
    )
    monkeypatch.setattr(pixel_cases, "with_gradients", lambda case, impl: gradients(case, "reference"))
    monkeypatch.setattr(Operator, "obstacles", lambda *_: [])


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[sweep_parts.Row]]:
    """The rows of a part whose calls take these milliseconds, in their order."""

    def of(part: str, *times: float, bench: Bench = BENCH) -> list[sweep_parts.Row]:
        left = list(times)

        def times_in_turn(calls: Sequence[Any], **_: Any) -> list[list[float]]:
            return [[left.pop(0)] for _ in calls]

        monkeypatch.setattr(measure, "times_in_turn", times_in_turn)
        found = list(PARTS[part](bench))
        assert not left
        return found

    return of


Rows = Callable[..., list[sweep_parts.Row]]


def met(found: Sequence[sweep_parts.Row]) -> list[bool | None]:
    return [row["met"] for row in found]


def test_dense_is_held_against_rates_and_products(rows: Rows) -> None:
    products = ms(800.0, 2 * QUICK.products**3)
    fast = [ms(tflops) for tflops in (704.5, 621.0, 501.0)]
    of_products = [products, ms(780.0, 2 * QUICK.products**3)]
    found = rows("dense", *of_products, *fast, *fast)
    assert [(row["reduction"], row["dtype"]) for row in found[2:4]] == [
        ("topk", "float16"),
        ("max", "bfloat16"),
    ]
    assert met(found) == [True] * 6
    assert found[0]["target"] == ">= 700 TFLOP/s; >= 0.88 of products"
    assert found[0]["tflops"] == 704.5 and found[0]["products_tflops"] == 800
    assert found[0]["reached"] == "704.5 TFLOP/s; 0.8806 of products"
    assert found[3]["reached"] == "704.5 TFLOP/s; 0.9032 of products"
    slow = [ms(tflops) for tflops in (703.5, 619.0, 499.0)]
    found = rows("dense", *of_products, *slow, *fast)
    assert met(found) == [False] * 3 + [True] * 3
    of_products = [ms(700.0, 2 * QUICK.products**3)] * 2
    assert met(rows("dense", *of_products, *fast, *[ms(699.0), *fast[1:]]))[::3] == [True, False]


def test_dense_keeps_to_its_memory(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BENCH.dense()
    limit = sweep_parts.memory_limit_mib(case)
    assert limit == 2 * 2 * 256 * 128 / 2**20 + 64
    fast = [ms(9e3)] * 8
    for extra, within in ((limit - 0.01, True), (limit + 0.01, False)):
        monkeypatch.setattr(sweep_parts, "extra_mib", lambda bench, case, extra=extra: extra)
        found = rows("dense", *fast)
        assert met(found)[1] is within and "MiB" in found[1]["target"] and found[1]["extra_mib"] == extra


def test_what_has_no_target(rows: Rows) -> None:
    found = [*rows("products", 1.0, 1.0), *rows("highest", 1.0, 2.0), *rows("backward", *[1.0] * 6)]
    assert met(found) == [None] * 10
    assert {row["target"] for row in found} == {""}
    assert found[2]["error"] < 1e-6 and '"highest"' in found[2]["what"]
    softmax, of_max, _ = found[4:7]
    assert softmax["tflops"] == pytest.approx(5 * of_max["tflops"], rel=1e-3)


def library_with(names: Sequence[str], wrong: Sequence[str] = ()) -> Callable[[Case, str], cases.Call]:
    """An implementation that reads the environment as the library does."""

    def made(case: Case, name: str) -> cases.Call:
        call = implementation_call(case, "reference")

        def within() -> cases.Result:
            asked = os.environ.get("CISC_CROSS_VARIANT", "")
            if asked and asked not in names:
                listed = ", ".join(names)
                raise RuntimeError(
                    f"cross_similarity: CISC_CROSS_VARIANT must be one of {listed}, got {asked}"
                )
            value, *rest = call()
            off = asked in wrong or (os.environ.get("CISC_CROSS_SCREEN") == "1" and "screen" in wrong)
            return value + off * 1e-2, *rest

        return within

    return made


def test_variants_stand_beside_the_usual_form(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["max_a", "topk_b", "max_c", "max_d"]
    monkeypatch.setattr(sweep_parts, "implementation_call", library_with(names, ["max_c"]))
    found = rows("variants", 2.0, 1.0, 0.5, 4.0, 3.0, 5.0, 6.0)
    shown = [(row["what"], row["ratio"], row["met"]) for row in found]
    assert shown == [
        ("max, usual", 1.0, None),
        ("max_a", 0.5, None),
        ("max_c", 0.25, False),
        ("max_d", 2.0, None),
        ("softmax, usual", 1.0, None),
        ("topk, usual", 1.0, None),
        ("topk_b", 1.2, None),
    ]
    assert sweeps.fastest(found) == {"max": "max_a", "softmax": "softmax, usual", "topk": "topk, usual"}
    assert "CISC_CROSS_VARIANT" not in os.environ


def test_without_variants_the_part_is_left_out() -> None:
    with pytest.raises(sweep_parts.LeftOutError):
        next(PARTS["variants"](BENCH))


def test_another_error_is_not_taken_for_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, name: str) -> cases.Call:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(sweep_parts, "implementation_call", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        sweep_parts.variant_names(BENCH.dense())


def test_screened_is_faster_and_the_same(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    assert met(rows("screened", ms(800), ms(1101))) == [True]
    assert met(rows("screened", ms(800), ms(1099))) == [False]
    (row,) = rows("screened", ms(1300), ms(1200))
    assert row["met"] is False and row["reached"] == "1200 TFLOP/s in effect; 0.9231 x dense"
    monkeypatch.setattr(sweep_parts, "_ERROR", 1.0)
    monkeypatch.setattr(sweep_parts, "implementation_call", library_with([], ["screen"]))
    (row,) = rows("screened", ms(800), ms(1200))
    assert row["met"] is False and "not the result" in row["reached"]


def test_own_labels_take_a_third_of_dense(rows: Rows) -> None:
    assert met(rows("own", 3.1, 1.0)) + met(rows("own", 2.9, 1.0)) == [True, False]
    guide = torch.tensor([[[3, 5]]], dtype=torch.uint8)
    pairs = [(torch.full((1, 5, 7), 3, dtype=torch.uint8), guide)] * 2
    (row,) = rows("own", 3.0, 1.9, bench=Bench("cpu", False, QUICK, pairs))
    assert row["ratio"] == 3.158 and row["pairs_of_maps"] == 2 and row["met"]
    assert row["share_of_pairs"] == pytest.approx(0.5, abs=0.02) and "street scenes" in row["what"]


def test_labels_are_as_frequent_as_in_the_streets() -> None:
    query, guide = (pixel_cases.street_labels(1024, 2048, seed) for seed in (43, 47))
    assert query.shape == (1, 1024, 2048) and query.dtype == torch.uint8
    shares = [labels.flatten().bincount(minlength=19) / labels.numel() for labels in (query, guide)]
    assert 0.2 < float(shares[0] @ shares[1]) < 0.25
    assert float((shares[0] - torch.tensor(list(pixel_cases.STREETS.values())) / 100).abs().max()) < 0.05


def test_time_is_linear_in_pairs(rows: Rows) -> None:
    per_pair = 1 / (8 * 16) ** 2
    found = rows("linear", 1.09 * per_pair * 16**2, 1.11 * per_pair * 64**2, 1.0)
    assert met(found) == [True, False, None] and [row["ratio"] for row in found] == [1.09, 1.11, 1]


def test_crops_keep_the_rate(rows: Rows) -> None:
    crop = FLOP * QUICK.batch * 25**2 // (8 * 16) ** 2
    assert met(rows("small", ms(800), ms(481, crop))) == [True]
    (row,) = rows("small", ms(800), ms(479, crop))
    assert row["met"] is False and row["shape"]["B"] == QUICK.batch and row["ratio"] == 0.5988


def test_rivals_are_named_with_times_and_reasons(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(case: Case) -> tuple[cases.Call, int]:
        return implementation_call(case, "reference"), 0

    monkeypatch.setattr(sweep_parts, "_triton", made)
    monkeypatch.setattr(sweep_parts, "TIMES_RIVAL", {"max": 1.15})
    (row,) = rows("rivals", 1.0, 1.16, 1.2)
    assert row["met"] and row["rival"] == "triton" and list(row["rival_ms"]) == ["triton", "chunked"]
    assert row["target"] == ">= 1.15 x the best rival"
    assert row["reached"] == "1.16 x the best rival; best triton; 1.2 x chunked, best of the others"
    reasons = row["rivals_left_out"]
    assert "all pairs" in reasons["naive"] and "all pairs" in reasons["compile"]
    assert "does not do" in reasons["softmax"] and reasons["flashlib"] and reasons["flex_attention"]
    assert row["rival_chunk"]["chunked"] in (128, 256, 512, 1024, 2048)
    (row,) = rows("rivals", 1.0, 1.16, 1.14)
    assert row["met"] is False and row["rival"] == "chunked"
    (row,) = rows("rivals", 1.0, 1.2, bench=Bench("cpu", False, QUICK, until=0.0))
    assert list(row["rival_ms"]) == ["chunked"]
    assert row["rivals_left_out"]["triton"] == "no time left to try it"


def test_a_rival_that_breaks_or_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BENCH.dense(reduction="max")

    def breaks() -> tuple[cases.Call, int]:
        raise ZeroDivisionError("in its own code")

    right = implementation_call(case, "reference")
    with pytest.raises(cases.CannotRunError, match="ZeroDivisionError: in its own code"):
        sweep_parts._admitted(BENCH, case, breaks, "one")
    with pytest.raises(cases.CannotRunError, match="off float64"):
        sweep_parts._admitted(BENCH, case, lambda: (lambda: (right()[0] + 0.1,), 0), "one")
    plain = sweep_parts._admitted(BENCH, case, lambda: (lambda: (right()[0] + 0.1,), 7), "chunked")
    assert plain.error == pytest.approx(0.1, rel=1e-3) and plain.chunk == 7
    monkeypatch.setattr(sweep_parts, "_RIVAL_LIMIT_S", -1.0)
    with pytest.raises(cases.CannotRunError, match="the limit is"):
        sweep_parts._admitted(BENCH, case, lambda: (right, 0), "one")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("reduction", ["max", "softmax", "topk"])
def test_results_are_held_against_float64(reduction: str, own: bool) -> None:
    case = BENCH.dense((6, 5), reduction=reduction, batch=1).with_inputs(return_index=True)
    if own:
        labels = torch.arange(2 * 12 * 10).remainder(3).view(2, 1, 12, 10).to(torch.uint8)
        labels[0, 0, 0] = 7  # which no guide pixel has
        case = pixel_cases.own_case(case, labels[0], labels[1])
    value, index = implementation_call(case, "reference")()
    assert pixel_cases.error(case, (value, index)) < 1e-5
    assert pixel_cases.error(case, (value + 1e-3, index)) == pytest.approx(1e-3, rel=1e-2)
    broken = value.clone()
    broken[0, 0, 3, 2] = torch.nan  # of the row in the middle
    assert pixel_cases.error(case, (broken, index)) == float("inf")
    assert pixel_cases.error(case, (value, (index + 1).remainder(30))) > 1e-2


def test_quick_runs_every_part_and_judges_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "time_ms", lambda call, device: (call(), 2.5)[1])
    monkeypatch.setattr(sweep_parts, "_triton", lambda case: (implementation_call(case, "reference"), 0))
    monkeypatch.setattr(sweep_parts, "implementation_call", library_with(["max_a", "softmax_b"]))
    masks, path = tmp_path / "masks", tmp_path / "sweeps.json"
    masks.mkdir()
    for number in range(2):
        mask = torch.arange(32 * 64).view(32, 64) // (300 + 90 * number)
        Image.fromarray(mask.to(torch.uint8).numpy()).save(masks / f"{number}.png")
    assert sweeps.main(["--quick", "--labels", str(masks), "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "command", "float32_matmul_precision"} <= set(result)
    assert result["quick"] and result["labels"] == "masks of street scenes"
    assert not result["left_out"] and not result["failed"]
    assert (
        list(dict.fromkeys(row["part"] for row in result["rows"])) == list(PARTS) == list(result["seconds"])
    )
    assert {row["met"] for row in result["rows"]} == {None}
    assert all(row["error"] < 1e-5 for row in result["rows"] if row["part"] != "products")
    printed = capsys.readouterr().out
    assert "FASTEST max: max, usual" in printed and "MISSED" not in printed

    monkeypatch.setattr(sweep_parts, "implementation_call", library_with(["max_a"], ["max_a"]))
    assert sweeps.main(["--quick", "--only", "variants", "--json", str(path)]) == 1
    assert "MISSED variants max_a, float16: wrong: " in capsys.readouterr().out


def test_a_part_that_breaks_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Bench) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    def nothing(bench: Bench) -> Any:
        raise sweep_parts.LeftOutError("none here")

    def row(bench: Bench) -> Any:
        one = sweep_parts.Ready("float16", "max", {}, 10**9, lambda: None)
        yield sweep_parts.row(bench, "good", "max", one, [2.0], [sweep_parts.at_least(1.0, 2.0, "x")])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = {"broken": broken, "nothing": nothing, "good": row}
    monkeypatch.setattr(sweeps, "PARTS", parts)
    path = tmp_path / "sweeps.json"
    result: dict[str, Any] = {"left_out": [], "failed": [], "seconds": {}, "rows": []}
    sweeps.run(BENCH, list(parts), result, path)
    assert result["left_out"] == [{"part": "nothing", "reason": "none here"}]
    assert result["failed"] == [{"part": "broken", "reason": "OutOfMemoryError: CUDA out of memory"}]

    def dead() -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "empty_cache", dead)
    sweeps.run(replace(BENCH, device="cuda"), ["broken"], {**result, "failed": []}, path)
    assert json.loads(path.read_text())["failed"] == result["failed"]
    assert sweeps.missed(result["rows"]) == ["good max, float16: 1 x, target >= 2 x"]
    assert sweeps.main(["--quick", "--only", "good,nothing", "--json", str(path)]) == 0
    assert sweeps.main(["--quick", "--only", "broken", "--json", str(path)]) == 1
    capsys.readouterr()
    assert sweeps.main(["--quick", "--stop-after", "-1", "--json", str(path)]) == 1
    assert capsys.readouterr().out.count("the time was over") == 3
    for refused in (["--only", "good,none"], ["--quick"]):
        with pytest.raises(SystemExit):
            sweeps.parse(refused)


def test_help_explains_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweeps.parse(["--help"])
    explained = capsys.readouterr().out
    for part in PARTS:
        assert f"\n{part}: " in explained


@NO_GPU
def test_refused_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.json"
    assert sweeps.main(["--json", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "NVIDIA GPU" in error and not path.exists()


def test_the_sizes_are_those_of_the_targets() -> None:
    sizes = sweep_parts.FULL
    assert sizes.full[0] * sizes.full[1] == 131072 and sizes.products == 8192
    assert [h * w for h, w in sizes.linear] == [4096, 16384, 65536]
