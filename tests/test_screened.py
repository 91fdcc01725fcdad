"""cross_similarity's "max" through products of int8 (CISC_CROSS_SCREEN=1, on sm_90a): the same results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opcases import SIMULATED
from programs import TESTS, compile_program, needs_gcc, run_program
from torch import Tensor

from cisc_ext import ops

NAN, INF = math.nan, math.inf
ORDERS = ("forward", "reverse", "shuffle")


def _device() -> str:
    """Where the kernels are."""
    return "cpu" if SIMULATED else "cuda"


needs_hopper = pytest.mark.skipif(
    not SIMULATED and not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)),
    reason="needs a GPU of compute capability 9.0, or the simulator",
)


@pytest.fixture(autouse=True)
def _chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CISC_SIMT_CHIP", "90")


def _vectors(kind: str, pixels: int, channels: int, middles: Tensor) -> Tensor:
    """Features [pixels,channels]; middles: [5,channels], of clusters on both sides."""
    if kind == "clustered":
        near = middles[torch.randint(5, (pixels,))]
        return near + 0.02 * torch.randn(pixels, channels)
    if kind == "tight":
        near = middles[torch.randint(2, (pixels,))]
        return near + 1e-3 * torch.randn(pixels, channels)
    if kind == "few":
        return torch.randn(7, channels)[torch.randint(7, (pixels,))]
    if kind == "rectified":
        return torch.randn(pixels, channels).relu()
    if kind == "spiky":
        return torch.randn(pixels, channels) ** 5
    if kind == "opposite":
        return -middles[:1] - 0.3 * torch.rand(pixels, channels)
    vectors = torch.randn(pixels, channels)
    if kind == "zeros":
        vectors[torch.rand(pixels) < 0.2] = 0.0
    if kind == "not finite":
        vectors[torch.rand(pixels) < 0.01, 0] = NAN
        vectors[torch.rand(pixels) < 0.01, -1] = INF
    if kind == "no number":
        vectors[:] = NAN
    return vectors


def _inputs(
    kind: str,
    channels: int,
    sizes: tuple[int, int] = (300, 2300),
    *,
    batch: int = 1,
    labels: int = 2,
    own: bool = False,
    dtype: torch.dtype = torch.float32,
    query_kind: str = "",
) -> dict[str, Any]:
    """Images of one row, with so many labels; one class that is asked for is not there."""
    middles = torch.randn(5, channels)

    def image(of: str, pixels: int) -> Tensor:
        images = [_vectors(of, pixels, channels, middles).t()[:, None] for _ in range(batch)]
        return torch.stack(images).to(dtype)

    query = image(query_kind or kind, sizes[0])
    if kind == "opposite":
        query = middles[0].expand(batch, sizes[0], channels).permute(0, 2, 1)[:, :, None].to(dtype)
        query = query + 0.1 * torch.rand(query.shape).to(dtype)
    inputs: dict[str, Any] = {
        "query": query,
        "guide": image(kind, sizes[1]),
        "guide_labels": torch.randint(labels, (batch, 1, sizes[1])).to(torch.uint8),
    }
    if own:
        inputs["query_labels"] = torch.randint(labels + 1, (batch, 1, sizes[0])).to(torch.uint8)
    else:
        inputs["classes"] = torch.tensor([[*range(labels), 9]]).expand(batch, -1)
    return inputs


def _run(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    placed = {
        name: value.to(_device()) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    similarity, index = ops.cross_similarity(**placed, reduction="max", return_index=True, impl="cpp")
    return similarity.cpu(), index.cpu()


def _check(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one is at least as good as what the usual sweep finds, by the very same float32 cosines, and
    of equal ones the first. What the sweep finds is the best but for the roundings of its products."""
    monkeypatch.delenv("CISC_CROSS_SCREEN", raising=False)
    want, want_index = _run(inputs)
    monkeypatch.setenv("CISC_CROSS_SCREEN", "1")
    got, got_index = _run(inputs)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got == -INF, want == -INF)
    assert torch.equal(got_index < 0, want_index < 0)
    number = ~want.isnan()
    assert torch.equal(got_index[~number], want_index[~number])
    assert (got >= want)[number].all()
    same = (got == want) & number
    assert (got_index <= want_index)[same].all()
    bound = 1e-6 if torch.get_float32_matmul_precision() == "highest" else 2e-3
    assert (got - want)[number].max(dim=-1).values.max() <= bound if number.any() else True
    # Labels are those that were asked for, and cosines those of the indices.
    query, guide = inputs["query"].double().flatten(2), inputs["guide"].double().flatten(2)
    flat, found = got.flatten(2), got_index.flatten(2)
    for b in range(query.shape[0]):
        for slot in range(flat.shape[1]):
            there = (found[b, slot] >= 0) & ~flat[b, slot].isnan()
            left, right = query[b][:, there], guide[b][:, found[b, slot][there]]
            cosines = (left * right).sum(0) / (left.norm(dim=0) * right.norm(dim=0)).clamp_min(1e-30)
            torch.testing.assert_close(flat[b, slot][there].double(), cosines, rtol=0, atol=2e-6)
            labels = inputs["guide_labels"][b].flatten()[found[b, slot][found[b, slot] >= 0]]
            if "classes" in inputs:
                assert (labels == inputs["classes"][b, slot]).all()


KINDS = (
    "random",
    "clustered",
    "tight",
    "few",
    "rectified",
    "spiky",
    "opposite",
    "zeros",
    "not finite",
    "no number",
)


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("own", [False, True], ids=["classes", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_cpp(kind: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all candidates find room or not, with ties, and where a cosine is NaN."""
    _check(_inputs(kind, 64, own=own), monkeypatch)


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("channels", [1, 3, 127, 129, 300, 700])
def test_channels_cpp(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fill their chunks; few channels, of which many pixels tie; rows that stay in shared
    memory, and longer ones."""
    _check(_inputs("random", channels, (260, 1100)), monkeypatch)


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "tight", "not finite"])
def test_dtypes_cpp(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(_inputs(kind, 96, dtype=dtype), monkeypatch)


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("own", [False, True], ids=["classes", "own"])
def test_images_and_splits_cpp(own: bool, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several images, whose guide is met in several parts."""
    monkeypatch.setenv("CISC_SIMT_ORDER", order)
    inputs = _inputs("random", 40, (257, 4100), batch=2, labels=1, own=own)
    tight = _inputs("tight", 40, (257, 4100), batch=2, labels=1, own=own)
    inputs["guide"] = torch.cat([inputs["guide"][:1], tight["guide"][1:]])
    inputs["query"] = torch.cat([inputs["query"][:1], tight["query"][1:]])
    _check(inputs, monkeypatch)


@pytest.mark.cuda
@needs_hopper
def test_more_images_than_results_fit_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units in two launches: the second one's flags are its own."""
    images = 640
    inputs = _inputs("random", 8, (2, 3), batch=images, labels=1)
    inputs["guide"][:, :, 0] *= torch.rand(images, 8, 1) + 0.5
    _check(inputs, monkeypatch)


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("query_kind", ["zeros", "no number", "not finite"])
def test_query_cpp(query_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of the query that have no direction, before a guide whose all have."""
    _check(_inputs("random", 48, query_kind=query_kind), monkeypatch)


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("side", ["query", "guide"])
def test_worst_rounding_cpp(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One component beside which all others are rounded to 0, and a vector along those: their cosine, 0.031,
    is lost in products, and the best, beside a few pixels with one of 0.02."""
    channels = 64
    signs = torch.randint(2, (channels,)) * 2.0 - 1.0
    signs[0] = 0.0
    spiky, along = 0.49 * signs, signs / signs.norm()
    spiky[0] = 127.0
    stays, best = (spiky, along) if side == "query" else (along, spiky)
    unit = stays / stays.norm()
    others = torch.randn(1000, channels)
    others[:, 0] = 0.0
    others -= (others @ along)[:, None] * along
    near = torch.full((1000, 1), -0.5)
    near[::50] = 0.02  # few, so that all candidates find room
    others = others / others.norm(dim=1, keepdim=True) + (near * along if side == "guide" else 0.0)
    if side == "query":
        others[:, :1] = near
    others[777] = best
    assert 0.028 < unit @ best / best.norm() < 0.032
    inputs = {
        "query": stays.expand(1, 300, -1).transpose(1, 2)[:, :, None],
        "guide": others.t()[None, :, None],
        "guide_labels": torch.zeros(1, 1, 1000, dtype=torch.uint8),
        "classes": torch.zeros(1, 1, dtype=torch.int64),
    }
    _check(inputs, monkeypatch)
    assert (_run(inputs)[1] == 777).all()


@pytest.mark.cuda
@needs_hopper
@pytest.mark.parametrize("channels", [133144, 133145, 134000])
def test_most_channels_cpp(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sums of products of int8, beside those that are no int32 any more."""
    monkeypatch.setenv("CISC_CROSS_SCREEN", "1")
    guide = torch.randint(2, (channels, 5)) * 2.0 - 1.0
    guide[:, 3] = 1.0
    inputs = {
        "query": torch.ones(1, channels, 1, 1).half(),
        "guide": guide[None, :, None].half(),
        "guide_labels": torch.zeros(1, 1, 5, dtype=torch.uint8),
        "classes": torch.zeros(1, 1, dtype=torch.int64),
    }
    similarity, index = _run(inputs)
    assert index.item() == 3
    assert abs(similarity.item() - 1) < 1e-6


@pytest.mark.cuda
@needs_hopper
def test_rounded_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows rounded to float16 are off from what cosines are computed from."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for kind in ("random", "tight"):
            _check(_inputs(kind, 64), monkeypatch)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def bounds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The program that holds bounds against float64, with a factor of the errors."""
    program = compile_program(tmp_path_factory.mktemp("screen") / "main", TESTS / "screen.cpp")
    return lambda factor: run_program(program, factor)


@needs_gcc
def test_bounds_hold(bounds: Callable[[str], Any]) -> None:
    """For random, clustered and the worst vectors; and they are not wider than they have to be."""
    done = bounds("1")
    assert done.returncode == 0, done.stdout
    assert float(done.stdout.split(" of the width")[0].rsplit(" ", 1)[1]) > 0.95


@needs_gcc
@pytest.mark.parametrize("factor", ["0.5", "0.9"])
def test_smaller_bounds_do_not(bounds: Callable[[str], Any], factor: str) -> None:
    done = bounds(factor)
    assert done.returncode == 1
    assert "is not between" in done.stdout
