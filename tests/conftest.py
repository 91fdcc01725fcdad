"""Fixtures of the whole suite; without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Before Triton is imported, which reads it then.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared"


INTERPRETED = {
    "test_compile",
    "test_feature_that_is_not_finite_in_pooling",
    "test_float32",
    "test_gradient_of_very_short_and_long_vectors",
    "test_gradient_that_is_not_finite_in_pooling",
    "test_gradients_below_the_normal_range",
    "test_implementation",
    "test_more_winners_than_pixels",
    "test_no_channels",
    "test_no_pixel_of_the_class",
    "test_one_query_pixel_that_is_not_finite",
    "test_opcheck",
    "test_temperatures",
    "test_tiny_eps",
    "test_topk_takes_the_first_of_equal_pixels",
    "test_zero_vectors",
}
"""Tests of any implementation that Triton's interpreter ends in seconds; the others run it on a GPU."""
LONG_GOLDENS = ("square", "wide", "unaligned", "ohem")
"""Goldens of `test_float32` that it takes half a minute and more for; test_ops has samples of their kinds."""
LONGEST = ("test_triton_compile.py", "test_cuda_build.py", "test_ops.py", "test_golden.py")
"""Files that come first, so that processes side by side end at about the same time."""
TOO_LONG = "long in Triton's interpreter: a GPU runs it, or CISC_INTERPRET_ALL=1"


def _given(item: pytest.Item) -> dict[str, Any]:
    """A test's parameters."""
    given: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return given


def _interprets(item: pytest.Item) -> bool:
    """Whether a test runs a Triton kernel on the CPU."""
    given = _given(item)
    implementation = getattr(given.get("implementation"), "name", given.get("impl"))
    return implementation == "triton" and given.get("device", "cpu") == "cpu"


def _takes_minutes(item: pytest.Item) -> bool:
    """Whether it is left to a GPU."""
    name = getattr(item, "originalname", item.name)
    return name not in INTERPRETED or (name == "test_float32" and _given(item).get("name") in LONG_GOLDENS)


def pytest_configure() -> None:
    """A library that CISC_OPS names has to be there: without it its tests would all be skipped."""
    if os.environ.get("CISC_OPS"):
        from cisc_ext.ops import _library

        if not _library.LOADED:
            raise pytest.UsageError(f"CISC_OPS: {_library.REASON}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the interpreter takes minutes for, and have the longest files first; with
    CISC_TESTS_SHARD=I/N, all but the I-th of N parts, in which tests of the same case stay together."""
    if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("CISC_INTERPRET_ALL") != "1":
        for item in items:
            if _interprets(item) and _takes_minutes(item):
                item.add_marker(pytest.mark.skip(reason=TOO_LONG))
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not os.environ.get("CISC_TESTS_SHARD"):
        return
    shard, count = map(int, os.environ["CISC_TESTS_SHARD"].split("/"))

    def mine(item: pytest.Item) -> bool:
        name, _, case = item.nodeid.partition("[")
        return zlib.crc32((case or name).encode()) % count == shard

    config.hook.pytest_deselected(items=[item for item in items if not mine(item)])
    items[:] = [item for item in items if mine(item)]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real street scenes, beside the repository; absent on a user's machine."""
    if not SHARED.is_dir():
        pytest.skip("no folder 'shared' beside the repository: the CamVid tests need its data")
    return SHARED


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Load one of tests/golden/*.npz as tensors."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key].copy()) for key in arrays.files}

    return load


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class indices are cached in a folder of the test, never in the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def few_scenes(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of the street scenes, and a folder of lists that name four of each kind."""
    camvid, lists = shared / "data" / "camvid", tmp_path_factory.mktemp("few")
    sources = {"labeled": "1_8/split_0/labeled", "unlabeled": "1_8/split_0/unlabeled", "val": "val"}
    for name, source in sources.items():
        lines = (camvid / "splits" / f"{source}.txt").read_text().splitlines()
        (lists / f"{name}.txt").write_text("\n".join(lines[:4]) + "\n")
    return camvid, lists


@pytest.fixture
def green(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' tests are taken to pass: they run elsewhere."""
    monkeypatch.setattr("benchmarks.kernels.red", lambda *_: None)
