"""benchmarks.similarity: what is asked of cross_similarity alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import (
    cases,
    ceilings,
    kernels,
    measure,
    similarity,
    tables,
)
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS


@pytest.mark.usefixtures("green")
def test_similarity_writes_its_result(tmp_path: Path) -> None:
    masks, path = tmp_path / "masks", tmp_path / "similarity.json"
    (masks / "more").mkdir(parents=True)
    for number in range(5):
        mask = torch.arange(60 * 80).view(60, 80) // (700 + 90 * number)
        folder = masks / "more" if number > 2 else masks
        Image.fromarray(mask.to(torch.uint8).numpy()).save(folder / f"{number}.png")
    command = ["--quick", "--labels", str(masks), "--json", str(path)]
    assert similarity.main(command) == 0
    result = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "threads", "ceilings", "cisc_isa", "minutes"} <= set(result)
    assert (
        result["quick"] and result["labels"] == "masks of street scenes" and str(tmp_path) not in str(result)
    )
    left_out = {one["section"] for one in result["left_out"]}
    assert left_out <= ({"avx2"} if _library.LOADED else {"peak"}), result["left_out"]
    shown = [(row["what"], row["dtype"]) for row in result["rows"]]
    both = (
        "n4096, row maximum",
        "n4096, own labels of street scenes",
        "image_256x512, row maximum",
    )
    assert {(what, dtype) for what in both for dtype in similarity.DTYPES} <= set(shown)
    assert [what.split()[-1] for what, _ in shown][-2:] == ["map", "whole"]
    assert ("n4096, row maximum, AVX2", "float32") in shown or "avx2" in left_out
    for row in result["rows"]:
        assert 0 < row["time_min_ms"] <= row["time_ms"] and row["runs"] == 2
        assert min(row["tflops"], row["against_ms"], row["ratio"]) > 0
        if "extra_mib" in row and measure.can_measure():
            assert row["extra_mib"] <= OPERATORS["cross_similarity"].extra_bytes_cpu / 2**20 + 2
        if row["against"] == "FMA peak":  # which is no peak if its operations are miscounted
            assert row["ratio"] < 1.3
        if "share_of_pairs" in row:
            assert row["images"] == 4 and 0 < row["share_of_pairs"] < 0.5
    table = tables.table("similarity", path)
    assert " ratio |" in table and ("FMA peak" in table or not _library.LOADED)
    assert "--labels DATA" in table and "masks --json" not in table


def test_similarity_reads_masks_from_all_over(tmp_path: Path) -> None:
    for number in range(17):
        Image.fromarray(torch.full((2, 3), number, dtype=torch.uint8).numpy()).save(
            tmp_path / f"{number:02}.png"
        )
    pairs = similarity.read_pairs(tmp_path)
    assert [(int(query[0, 0, 0]), int(guide[0, 0, 0])) for query, guide in pairs] == [
        (0, 8),
        (2, 10),
        (4, 12),
        (6, 14),
    ]
    assert all(one.shape == (1, 2, 3) and one.dtype == torch.uint8 for pair in pairs for one in pair)


@pytest.mark.usefixtures("green")
def test_similarity_refuses_what_it_cannot_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--quick", "--json", str(tmp_path / "none.json")]
    assert similarity.main([*command, "--labels", str(tmp_path)]) == 1
    assert "two PNG masks at least, got" in capsys.readouterr().err
    for number in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    assert similarity.main([*command, "--labels", str(tmp_path)]) == 1
    assert "0.png: expected a mask of mode L or P, got RGB" in capsys.readouterr().err

    def zeros(case: cases.Case, name: str) -> cases.Call:
        return lambda: (torch.zeros(1, 1, *case.inputs["query"].shape[2:]),)

    monkeypatch.setattr(similarity, "implementation_call", zeros)
    monkeypatch.setattr(measure, "time_ms", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(ceilings, "measured", lambda *_, **__: {})
    assert similarity.main(command) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and "n4096_dense_max float32" in error and "off the float32 reference" in error
    )
    monkeypatch.setattr(kernels, "red", lambda ops: f"FAILED {ops}")
    assert similarity.main(command) == 1
    assert "FAILED ['cross_similarity']" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


@pytest.mark.skipif(not _library.LOADED, reason="no compiled operators")
def test_an_instruction_set_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_ISA", "avx1024")
    with pytest.raises(similarity.LeftOutError, match="avx1024"):
        next(similarity.avx2_lines(similarity.Settings(True, 1, {}, [])))
