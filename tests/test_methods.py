"""The benchmark of whole methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import methods, tables


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
