"""Which tile a Triton kernel takes: a fixed table by chip and shape, and a search that can replace its rows.

Nothing is searched by itself, so that a first call is fast and runs are alike. `CISC_AUTOTUNE=1` has each
kernel try its candidates the first time that it meets a shape, and prints their times; `CISC_AUTOTUNE=store`
also keeps the best ones in `$XDG_CACHE_HOME/cisc_ext/tiles.json`, which later runs read. Another tile may sum
in another order: results then differ in the last bits.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Tile = Mapping[str, int]
"""Sizes of a kernel's blocks by the names of its constants, with num_warps and num_stages."""
T = TypeVar("T")

_RUNS = 5


@dataclass(frozen=True)
class Row:
    """A tile for chips of a compute capability or newer, and shapes of at most these sizes."""

    tile: Tile
    capability: tuple[int, int] = (8, 0)
    at_most: Mapping[str, int] | None = None

    def fits(self, capability: tuple[int, int], shape: Mapping[str, int]) -> bool:
        """Whether it is for such a chip and shape."""
        limits = (self.at_most or {}).items()
        return capability >= self.capability and all(shape[key] <= limit for key, limit in limits)


@dataclass(frozen=True)
class Tiles:
    """The table of a kernel; the first row that fits is taken, and the last must fit everything."""

    name: str
    rows: tuple[Row, ...]
    candidates: tuple[Tile, ...] = ()
    """Further tiles that a search tries beside those of the rows that fit."""

    def fitting(self, capability: tuple[int, int], shape: Mapping[str, int]) -> list[Tile]:
        """The tiles of the rows that fit, the best first."""
        return [row.tile for row in self.rows if row.fits(capability, shape)]

    def run(
        self,
        launch: Callable[[Tile], T],
        capability: tuple[int, int],
        device: torch.device,
        shape: Mapping[str, int],
    ) -> T:
        """`launch` with the tile for this chip and shape; it must be one that can be called repeatedly."""
        mode = os.environ.get("CISC_AUTOTUNE", "0")
        if mode not in ("0", "", "1", "store"):
            raise ValueError(f"CISC_AUTOTUNE must be 0, 1 or store, got {mode!r}")
        chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        key = f"{self.name} {chip} " + " ".join(f"{name}{size}" for name, size in sorted(shape.items()))
        fitting = self.fitting(capability, shape)
        # A search waits for the device, which the capture of a graph forbids.
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if mode in ("1", "store") and (key in _best or not captured):
            if key not in _best:
                _best[key] = _search(key, launch, [*fitting, *self.candidates], device)
                if mode == "store":
                    _store(key, _best[key])
            return launch(_best[key])
        stored = _stored().get(key, fitting[0])
        # Another version of the kernel may have had other constants.
        known = any(stored.keys() == tile.keys() for tile in [*fitting, *self.candidates])
        return launch(stored if known else fitting[0])


_best: dict[str, Tile] = {}


def path() -> Path:
    """Where tiles are stored."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "cisc_ext" / "tiles.json"


@functools.lru_cache(maxsize=1)
def _stored() -> dict[str, Tile]:
    try:
        read = json.loads(path().read_text())
    except OSError:  # not there, or not for this user
        return {}
    except ValueError as error:
        raise ValueError(f"{path()}: expected the JSON of stored tiles, got {error}") from error
    if not isinstance(read, dict) or not all(_is_tile(tile) for tile in read.values()):
        raise ValueError(f"{path()}: expected tiles by kernel, chip and shape; delete it to go without")
    return read


def _is_tile(value: Any) -> bool:
    return isinstance(value, dict) and all(type(size) is int and size > 0 for size in value.values())


def _store(key: str, tile: Tile) -> None:
    _stored.cache_clear()  # what another process has stored meanwhile is kept
    tiles = {**_stored(), key: dict(tile)}
    path().parent.mkdir(parents=True, exist_ok=True)
    partial = path().with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(tiles, indent=1, sort_keys=True) + "\n")
    partial.replace(path())
    _stored.cache_clear()


def _search(key: str, launch: Callable[[Tile], Any], candidates: list[Tile], device: torch.device) -> Tile:
    """The candidate with the least time; prints the time of each, or why it does not run."""
    times: list[tuple[float, Tile]] = []
    for tile in candidates:
        if any(tile == other for _, other in times):
            continue
        shown = " ".join(f"{name}={size}" for name, size in tile.items())
        try:
            launch(tile)
            ms = min(_time_ms(lambda tile=tile: launch(tile), device) for _ in range(_RUNS))  # type: ignore[misc]
        except Exception as error:  # a tile may need more than the chip has, and Triton says so in many ways
            if tile is candidates[0]:
                raise
            print(f"{key}: {shown}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            continue
        print(f"{key}: {shown}: {ms:.4f} ms", file=sys.stderr)
        times.append((ms, tile))
    best = min(times, key=lambda one: one[0])[1]
    print(f"{key}: best {' '.join(f'{name}={size}' for name, size in best.items())}", file=sys.stderr)
    return best


def _time_ms(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
