"""The gate of a GPU: parts, limits, what it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gate, machine, step


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
