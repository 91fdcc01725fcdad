"""The benchmarks measure what they say: baseline against goldens, result files, tables, the gate."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gate, machine, measure, methods, published, step, tables

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
    assert set(rows) == {(name, variant) for name in step.VARIANTS for variant in step.VARIANTS[name]}
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
