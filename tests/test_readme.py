"""README's commands, run as they stand but for folders and sizes; its Python block; its picture."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import methods
from cisc_ext.data import synthetic

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BY_CI = ("make demo", "make test")
BY_BUILD = ("pip install --no-build-isolation -e .",)
SMALL = ["--steps", "2", "--intervals", "1", "--batch-size", "2", "--crop-size", "33", "--workers", "0"]
SCENES = {"labeled": 4, "unlabeled": 4, "val": 2, "size": (48, 48)}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Every line of the shell blocks, in their order."""
    return [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder in which the commands run one after another, with a small demo data set in place."""
    folder = tmp_path_factory.mktemp("readme")
    synthetic.generate(folder / "small", **SCENES)  # type: ignore[arg-type]  # sizes of a test
    return folder


def run(line: str, folder: Path, scenes: tuple[Path, Path] | None = None) -> None:
    """Run a command in `folder` with the data it names, shortened."""
    words = shlex.split(line.replace("DATA", str(scenes[0])) if scenes else line)
    words = [str(ROOT / word) if word in ("train.py", "eval.py") else word for word in words]
    if "train.py" in line:
        words += SMALL
        if words[2] == "demo":
            words += ["--data-root", "small", "--split", "small/splits"]
    if "eval.py" in line:
        words = ["small" if word == "runs/demo_data" else word for word in words]
    if scenes and "--split" in words:
        words[words.index("--split") + 1] = str(scenes[1])
    if scenes and "benchmarks.methods" in line:
        words += ["--steps", "2", "--split", str(scenes[1])]
    if "benchmarks.step" in line:
        words[words.index("--crop") + 1] = "33"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def test_every_command_is_run_here_or_by_ci() -> None:
    for line in commands():
        if line.startswith("pip install '"):
            install = next(
                line for line in (ROOT / "Makefile").read_text().splitlines() if "$(TORCH)" in line
            )
            assert line.removeprefix("pip install ") in install
        else:
            assert line in (*BY_CI, *BY_BUILD) or line.startswith("python "), line
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make demo" in (ROOT / ".ci" / "run").read_text()


def test_commands_on_generated_data_work_in_their_order(workplace: Path) -> None:
    for line in commands():
        if line.startswith("python ") and "DATA" not in line:
            run(line, workplace)
    assert (workplace / "scores.json").is_file() and list((workplace / "masks").rglob("*.png"))
    assert len(json.loads((workplace / "step.json").read_text())["rows"]) == 8


def test_commands_on_camvid_work(workplace: Path, few_scenes: tuple[Path, Path]) -> None:
    for line in commands():
        if "DATA" in line:
            run(line, workplace, few_scenes)
    assert len((workplace / "lists" / "labeled.txt").read_text().splitlines()) == 46


def test_the_camvid_command_is_the_one_that_was_measured() -> None:
    (line,) = (line for line in commands() if line.startswith("python train.py camvid"))
    words = shlex.split(line)
    pairs = list(itertools.pairwise(words))
    for flag, value in itertools.pairwise([*methods.SETTINGS, *methods.RUNS["cisc-r"][2:]]):
        if flag.startswith("--"):
            assert (flag, value) in pairs
    assert words[words.index("--load-size") :][:3] == ["--load-size", "240", "180"]
    assert words[words.index("--tta-scales") :][:4] == ["--tta-scales", "0.75", "1", "1.5"]


def test_the_python_block_runs() -> None:
    (block,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_files_that_it_names_exist() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        ElementTree.parse(ROOT / path)
    for path in re.findall(r"`((?:cisc_ext|benchmarks)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
