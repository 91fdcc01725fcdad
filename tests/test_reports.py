"""Facts of a result, tables, pictures, and README's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, plots, tables
from cisc_ext.ops.registry import OPERATORS


def test_facts_tell_no_folder_and_the_commit_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CISC_COMMIT", "0123abc")
    facts = machine.facts("benchmarks.step", ["--json", str(Path("/somewhere/step.json")), "--crop", "33"])
    assert facts["commit"] == "0123abc"
    assert facts["command"] == "python -m benchmarks.step --json step.json --crop 33"


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


def test_the_sweeps_table_shows_what_was_reached(tmp_path: Path) -> None:
    row = {
        **{"part": "dense", "what": "max", "dtype": "float16", "time_ms": 12.3, "tflops": 715.0},
        **{"extra_mib": 158.2, "reached": "715 TFLOP/s", "target": ">= 700 TFLOP/s", "met": True},
    }
    path = tmp_path / "sweeps.json"
    gpu = {"device": "cuda", "machine": {"gpu": "a GPU"}, "rows": [row]}
    path.write_text(json.dumps({**kernels_result(), **gpu}))
    lines = tables.table("sweeps_cuda", path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], lines[2])]
    assert cells[0] == list(tables.COLUMNS["sweeps_cuda"].values())
    assert cells[1] == ["dense", "max", "float16", "12.3", "715", "", "158", "715 TFLOP/s", ">= 700 TFLOP/s"]
    assert "<!-- sweeps_cuda:begin -->" in (machine.ROOT / "README.md").read_text()


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
