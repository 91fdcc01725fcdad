"""The training step's benchmark: the published arithmetic against goldens, variants, result files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cases, full_step, machine, measure, published, step, variants

Golden = Callable[[str], dict[str, Tensor]]


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
        assert variants.disagreement(step.VARIANTS[name][variant](x), expected) < 1e-9


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
    with pytest.raises(cases.DisagreementError, match=r"rectify at 33: auto is .* off"):
        step.measure_step("rectify", 33, "cpu", 1)


def test_step_writes_its_result(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    command = [sys.executable, "-m", "benchmarks.step", "--crop", "129", "--repeats", "1", "--threads", "1"]
    done = subprocess.run([*command, "--json", str(path)], cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert set(result["machine"]) == {"cpu", "isa", "cores", "memory_gib", "gpu"}
    assert set(result["versions"]) == {"torch", "python", "numpy", "compiler", "cuda", "triton", "driver"}
    assert result["threads"] == 1 and result["device"] == "cpu"
    assert result["command"].startswith("python -m benchmarks.step --crop 129")
    rows = {(row["step"], row["variant"]): row for row in result["rows"]}
    measured: dict[str, Iterable[str]] = {**step.VARIANTS, "network": full_step.RETRAINING}
    assert set(rows) == {(name, variant) for name, of_step in measured.items() for variant in of_step}
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

    def measured(size: full_step.Size, device: str, repeats: int) -> Iterator[dict[str, Any]]:
        asked.append(size.batch)
        yield {"batch": size.batch}
        if size.batch > 2:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(full_step, "measured", measured)
    monkeypatch.setattr(full_step, "judged", lambda rows: [])
    found = full_step.run(full_step.FULL, "cpu", 1, lambda _: None)
    assert asked == [8, 4, 2] and found["too_large_batches"] == [8, 4]
    assert found["rows"] == [{"batch": 2}], "those of a batch that did not fit are gone"


def test_rows_of_the_full_step_outlive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"step": "first"}
        yield {"step": "second"}
        raise KeyboardInterrupt

    monkeypatch.setattr(full_step, "measured", measured)
    monkeypatch.setattr(step, "VARIANTS", {})
    monkeypatch.setattr(step, "measure_network", lambda *_: [])
    path = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        step.main(["--full", "tiny", "--json", str(path)])
    full = json.loads(path.read_text())["full"]
    assert full["rows"] == [{"step": "first"}, {"step": "second"}] and full["wanted_batch"] == 2


def test_no_extra_memory_is_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"published": 4.0, "none": 0.0, "some": 1.0}
    monkeypatch.setattr(measure, "can_measure", lambda: True)
    monkeypatch.setattr(measure, "peak_extra_mib", lambda call, **_: held[call()])
    monkeypatch.setattr(measure, "time_ms", lambda call, **_: 2.0)
    found = variants.timed({name: lambda name=name: name for name in held}, "cpu", 1)  # type: ignore[misc]
    ratios = {name: (row["extra_mib"], row["memory_ratio"]) for name, row in found.items()}
    assert ratios == {"published": (4.0, 1.0), "none": (0.0, 0.0), "some": (1.0, 0.25)}
    monkeypatch.setattr(measure, "can_measure", lambda: False)
    uncounted = variants.timed({"published": lambda: ()}, "cpu", 1, images=3)
    assert uncounted == {
        "published": {
            **{"time_ms": 2.0, "time_min_ms": 2.0, "images_per_s": 1500.0},
            **{"extra_mib": None, "speedup": 1.0, "memory_ratio": None},
        }
    }


def test_losses_of_the_full_step_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*words: Any) -> Any:
        return 1.001 * full_step.similarity_and_losses(*words)

    monkeypatch.setitem(full_step.RETRAINING, "auto", wrong)
    with pytest.raises(cases.DisagreementError, match=r"^similarity and losses: auto is .* off"):
        next(full_step.measured(full_step.TINY, "cpu", 1))
    with pytest.raises(cases.DisagreementError, match=r"^network at 65: auto is .* off"):
        step.measure_network(65, "cpu", 1)
