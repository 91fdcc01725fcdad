"""Tiles of Triton's kernels: the row of a chip and shape, and the search that can replace it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cisc_ext.__main__ import main
from cisc_ext.ops import _implementations, _tiles
from cisc_ext.ops._tiles import Row, Tile, Tiles

CPU = torch.device("cpu")
AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
SMALL, LARGE = {"N": 64, "C": 256}, {"N": 65, "C": 256}
TABLE = Tiles(
    "made",
    (
        Row({"BLOCK": 256, "num_warps": 8}, capability=HOPPER),
        Row({"BLOCK": 64, "num_warps": 2}, at_most={"N": 64}),
        Row({"BLOCK": 128, "num_warps": 4}),
    ),
    candidates=({"BLOCK": 32, "num_warps": 1, "maxnreg": 255}, {"BLOCK": 128, "num_warps": 4}),
)
TIMES = {256: 5.0, 128: 3.0, 64: 4.0, 32: 1.0}
KEY = "made interpreter C256 N65"


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing found or read before, nothing left behind."""
    monkeypatch.setattr(_tiles, "_best", {})
    monkeypatch.delenv("CISC_AUTOTUNE", raising=False)
    _tiles._stored.cache_clear()
    yield
    _tiles._stored.cache_clear()


class Launches:
    """Stands for a kernel: keeps the tiles that it was called with, and fails for some."""

    def __init__(self, *failing: int) -> None:
        self.tiles: list[Tile] = []
        self.failing = failing

    def __call__(self, tile: Tile) -> int:
        if tile["BLOCK"] in self.failing:
            raise RuntimeError(f"out of resource: {tile['BLOCK']}\nneeds more")
        self.tiles.append(tile)
        return tile["BLOCK"]

    def last(self) -> int:
        return self.tiles[-1]["BLOCK"]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Every tile takes the time of `TIMES`."""
    launches = Launches()

    def time_ms(run: object, device: torch.device) -> float:
        return TIMES[launches.last()]

    monkeypatch.setattr(_tiles, "_time_ms", time_ms)
    return launches


@pytest.mark.parametrize(
    ("capability", "shape", "block"),
    [
        (AMPERE, SMALL, 64),
        (AMPERE, LARGE, 128),
        (ADA, SMALL, 64),
        (ADA, LARGE, 128),
        (HOPPER, SMALL, 256),
        (HOPPER, LARGE, 256),
        ((12, 0), LARGE, 256),
    ],
)
def test_the_first_row_that_fits(capability: tuple[int, int], shape: dict[str, int], block: int) -> None:
    launches = Launches()
    assert TABLE.run(launches, capability, CPU, shape) == block
    assert len(launches.tiles) == 1, "nothing is searched by itself"


def test_a_search_takes_the_fastest_once(
    timed: Launches, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CISC_AUTOTUNE", "1")
    assert TABLE.run(timed, AMPERE, CPU, LARGE) == 32
    assert capsys.readouterr().err.splitlines() == [
        f"{KEY}: BLOCK=128 num_warps=4: 3.0000 ms",
        f"{KEY}: BLOCK=32 num_warps=1 maxnreg=255: 1.0000 ms",
        f"{KEY}: best BLOCK=32 num_warps=1 maxnreg=255",
    ]
    before = len(timed.tiles)
    assert TABLE.run(timed, AMPERE, CPU, LARGE) == 32
    assert len(timed.tiles) == before + 1 and not capsys.readouterr().err
    assert TABLE.run(timed, AMPERE, CPU, SMALL) == 32
    assert "made interpreter C256 N64: best" in capsys.readouterr().err, "another shape is searched anew"
    assert not _tiles.path().exists()


def test_a_candidate_that_cannot_run_is_passed_over(
    timed: Launches, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CISC_AUTOTUNE", "1")
    timed.failing = (32,)
    assert TABLE.run(timed, AMPERE, CPU, LARGE) == 128
    assert (
        f"{KEY}: BLOCK=32 num_warps=1 maxnreg=255: RuntimeError: out of resource: 32"
        in capsys.readouterr().err
    )
    timed.failing = (64,)
    with pytest.raises(RuntimeError, match="out of resource: 64"):
        TABLE.run(timed, AMPERE, CPU, SMALL)


def test_what_is_stored_is_read_by_later_runs(timed: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CISC_AUTOTUNE", "store")
    TABLE.run(timed, AMPERE, CPU, LARGE)
    TABLE.run(timed, AMPERE, CPU, SMALL)
    stored = json.loads(_tiles.path().read_text())
    assert stored == {
        KEY: {"BLOCK": 32, "num_warps": 1, "maxnreg": 255},
        "made interpreter C256 N64": {"BLOCK": 32, "num_warps": 1, "maxnreg": 255},
    }
    assert [path.name for path in _tiles.path().parent.iterdir()] == ["tiles.json"], (
        "written beside, then moved"
    )
    monkeypatch.delenv("CISC_AUTOTUNE")
    _tiles._best.clear()
    launches = Launches()
    assert TABLE.run(launches, AMPERE, CPU, LARGE) == 32
    assert TABLE.run(launches, AMPERE, CPU, {"N": 66, "C": 256}) == 128, "the table's, where none is stored"
    assert len(launches.tiles) == 2
    _tiles.path().write_text(json.dumps({KEY: {"ROWS": 32, "num_warps": 1}}))
    _tiles._stored.cache_clear()
    assert TABLE.run(launches, AMPERE, CPU, LARGE) == 128, "that of an older kernel is no tile of this one"


@pytest.mark.parametrize("content", ["{", "[]", '{"made": 3}', '{"made": {"BLOCK": "32"}}', "\x00"])
def test_a_broken_file_is_an_error_of_one_line(content: str) -> None:
    _tiles.path().parent.mkdir(parents=True)
    _tiles.path().write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(_tiles.path()))}: expected ") as raised:
        TABLE.run(Launches(), AMPERE, CPU, LARGE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", ["2", "yes", "STORE"])
def test_modes_are_refused_by_name(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CISC_AUTOTUNE", mode)
    with pytest.raises(ValueError, match=f"^CISC_AUTOTUNE must be 0, 1 or store, got {mode!r}$"):
        TABLE.run(Launches(), AMPERE, CPU, LARGE)


def test_the_file_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _tiles.path() == tmp_path / "cisc_ext" / "tiles.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _tiles.path() == tmp_path / ".cache" / "cisc_ext" / "tiles.json"


def test_info_says_where_tiles_come_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if _implementations.HERE.triton:
        assert _implementations.triton_description() == f"Triton: none ({_implementations.HERE.triton})"
        return
    assert _implementations.triton_description().endswith("; tiles of the fixed tables, CISC_AUTOTUNE=0")
    _tiles.path().parent.mkdir(parents=True)
    _tiles.path().write_text("{}")
    monkeypatch.setenv("CISC_AUTOTUNE", "store")
    assert _implementations.triton_description().endswith(f" and {_tiles.path()}, CISC_AUTOTUNE=store")
    assert main(["info"]) == 0
    assert _implementations.triton_description() in capsys.readouterr().out.splitlines()
    assert ("interpreted" in _implementations.triton_description()) == _implementations.HERE.interpreted


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not _implementations.HERE.interpreted,
    reason="needs Triton's interpreter",
)
def test_a_search_over_a_real_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from made_kernels import double

    from cisc_ext.ops import _triton

    monkeypatch.setenv("CISC_AUTOTUNE", "1")
    source, target = torch.arange(100.0), torch.empty(100)

    def launch(tile: Tile) -> torch.Tensor:
        _triton.launch(double, -(-100 // tile["BLOCK"]), source, target, 100, **tile)
        return target

    assert torch.equal(TABLE.run(launch, AMPERE, CPU, {"N": 100, "C": 1}), 2 * source)
    error = capsys.readouterr().err
    assert len(re.findall(r": \d+\.\d{4} ms$", error, re.MULTILINE)) == 2 and ": best BLOCK=" in error
