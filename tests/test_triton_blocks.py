"""Triton's kernels with tiles and limits so small that small inputs have many blocks, groups and passes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from opcases import DEVICES, skip_unless_able
from oprule import assert_meets_rule
from torch import Tensor

from cisc_ext.ops._tiles import Row, Tiles
from cisc_ext.ops.cross_similarity import REDUCTIONS
from cisc_ext.ops.registry import OPERATORS

pytest.importorskip("triton")


def _judge(name: str, inputs: dict[str, Any], device: str) -> None:
    placed = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    (triton,) = (one for one in OPERATORS[name].implementations if one.name == "triton")
    skip_unless_able(OPERATORS[name], triton, placed)
    assert_meets_rule(OPERATORS[name], "triton", placed)


def _module(name: str) -> Any:
    return importlib.import_module(f"cisc_ext.ops.{name}")


def _one(tile: dict[str, int]) -> Tiles:
    return Tiles("tiny", (Row(tile),))


@pytest.fixture
def tiny_cross(monkeypatch: pytest.MonkeyPatch) -> Any:
    """cross_similarity's host code: tiles of 16, an image and a slot at a time, two winners a pass."""
    host = _module("cross_similarity_triton")
    sweep = {"BLOCK_QUERY": 16, "BLOCK_GUIDE": 16, "num_warps": 4, "num_stages": 2}
    for name in ("_MAX", "_SOFTMAX", "_TOPK"):
        monkeypatch.setattr(host, name, _one(sweep))
    gradient = {"ROWS": 16, "COLUMNS": 16, "OUT": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(host, "_GRADIENT", _one(gradient))
    monkeypatch.setattr(host, "_IN_FLIGHT_BYTES", 1)
    monkeypatch.setattr(host, "_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(host, "_MOST_WINNERS", 2)
    monkeypatch.setattr(host, "_SUMMED_TILES", 2)
    monkeypatch.setattr(_module("_cross_sums_triton"), "ENTRIES", 16)
    monkeypatch.setattr(_module("_cross_means_triton"), "_TABLE_BYTES", 4096)
    return host


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("path", ["pointers", "descriptors", "chunks"])
def test_cross_similarity(
    path: str, reduction: str, own: bool, device: str, tiny_cross: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = _module("_cross_pack_triton")
    if path == "descriptors":
        if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("this GPU copies no tiles by descriptors")
        monkeypatch.setattr(_module("_triton"), "pretended", (9, 0))
    if path == "chunks":
        monkeypatch.setattr(packing, "_RESIDENT", 16)
        monkeypatch.setattr(packing, "_CHUNK", 16)
    dtype = torch.float32 if own else torch.bfloat16
    labels = torch.randint(0, 3, (2, 2, 7, 11))
    labels[:, :, 0, :4] = 255
    inputs: dict[str, Any] = {
        "query": torch.randn(2, 24, 5, 9).to(dtype),
        "guide": torch.randn(2, 24, 8, 10).to(dtype),
        "guide_labels": labels[0],
        "reduction": reduction,
        "k": 5,
        "return_index": True,
        "temperature": 0.02 if own else 0.1,
    }
    mode = {"query_labels": labels[1]} if own else {"classes": torch.tensor([[2, 0, 7], [1, -1, 1]])}
    _judge("cross_similarity", inputs | mode, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("reduction", ["max", "softmax"])
def test_parts_of_the_guide_without_a_tile(
    reduction: str, own: bool, device: str, tiny_cross: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few query pixels: the guide is split as if one class had all of it."""
    monkeypatch.setattr(_module("_triton"), "_INTERPRETED_MULTIPROCESSORS", 64)
    labels = torch.tensor([0] * 5 + [1] * 17 + [2] * 33 + [3] * 285)[torch.randperm(340)].view(1, 17, 20)
    inputs: dict[str, Any] = {
        "query": torch.randn(1, 8, 3, 4),
        "guide": torch.randn(1, 8, 17, 20),
        "guide_labels": labels,
        "reduction": reduction,
        "return_index": True,
    }
    mode = {"query_labels": labels[:, :3, :4]} if own else {"classes": torch.arange(4)[None]}
    _judge("cross_similarity", inputs | mode, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 2, 16])
def test_equal_pixels_tie_beside_others(seed: int, device: str) -> None:
    """Vector 0 differs from vector 1 by rounding only: what is found first of either is the first of it."""
    torch.manual_seed(seed)
    vectors = torch.randn(33, 4)
    vectors[:, 0] = vectors[:, 1] * 3
    which = torch.randint(0, 4, (5, 6))
    inputs: dict[str, Any] = {
        "query": torch.randn(1, 33, 3, 11, device=device),
        "guide": vectors[:, which][None].to(device),
        "guide_labels": torch.zeros(1, 5, 6, dtype=torch.uint8, device=device),
        "classes": torch.zeros(1, 1, dtype=torch.int64, device=device),
        "return_index": True,
    }
    operator = OPERATORS["cross_similarity"]
    (triton,) = (one for one in operator.implementations if one.name == "triton")
    skip_unless_able(operator, triton, inputs)
    _, index = operator.function(**inputs, impl="triton")
    first = {int((which.flatten() == number).to(torch.uint8).argmax()) for number in range(4)}
    assert set(index.unique().tolist()) <= first


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_sum(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal terms, whose rounding errors add up."""
    monkeypatch.setattr(_module("_triton"), "_INTERPRETED_MULTIPROCESSORS", 1)
    guide = torch.randn(1, 4, 1, 1).expand(-1, -1, 64, 512)
    inputs: dict[str, Any] = {
        "query": torch.randn(1, 4, 1, 3),
        "guide": guide,
        "guide_labels": torch.zeros(1, 64, 512, dtype=torch.uint8),
        "classes": torch.zeros(1, 1, dtype=torch.int64),
        "reduction": "softmax",
    }
    with torch.no_grad():
        operator = OPERATORS["cross_similarity"]
        placed = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()
        }
        (triton,) = (one for one in operator.implementations if one.name == "triton")
        skip_unless_able(operator, triton, placed)
        got = operator.function(**placed, impl="triton").cpu()
        exact = torch.cosine_similarity(inputs["query"].double(), guide[..., :1, :1].double())
    assert (got[:, 0] - exact).abs().max() < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["max", "topk"])
def test_a_guide_pixel_that_is_best_for_many(reduction: str, device: str, tiny_cross: Any) -> None:
    """Its gradient sums entries in front of, in and behind whole chunks."""
    guide = -torch.rand(1, 8, 2, 3)
    guide[..., 1] *= -1
    inputs = {
        "query": torch.rand(1, 8, 11, 13),
        "guide": guide,
        "guide_labels": torch.zeros(1, 2, 3, dtype=torch.int64),
        "classes": torch.zeros(1, 1, dtype=torch.int64),
        "reduction": reduction,
        "k": 3,
    }
    _judge("cross_similarity", inputs, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_less_precision_where_it_is_allowed(precision: str, device: str) -> None:
    """float32 in one product of float16: 2**-11 off at the most, and more than twice 2**-24."""
    inputs: dict[str, Any] = {
        "query": torch.randn(1, 64, 6, 7, device=device),
        "guide": torch.randn(1, 64, 8, 9, device=device),
        "guide_labels": torch.zeros(1, 8, 9, dtype=torch.uint8, device=device),
        "classes": torch.zeros(1, 1, dtype=torch.int64, device=device),
        "reduction": "softmax",
    }
    operator = OPERATORS["cross_similarity"]
    (triton,) = (one for one in operator.implementations if one.name == "triton")
    skip_unless_able(operator, triton, inputs)
    exact = operator.function(**{k: v.double() if k in operator.features else v for k, v in inputs.items()})
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        error = (operator.function(**inputs, impl="triton") - exact).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert 2**-23 < float(error) < 2**-11


TINY = {"CB": 16, "PB": 16, "num_warps": 4, "num_stages": 1}
LIMITS = {"one program": (1, 2**30, 2**30), "few bytes": (7, 2000, 1500), "a byte": (1, 1, 1)}
"""Programs that are wanted, bytes of class weights, and bytes of partial sums."""


@pytest.fixture(params=LIMITS)
def tiny_sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two operators that sum over pixels and channels."""
    pool, weights = _module("masked_average_pool_triton"), _module("_class_weights_triton")
    prototypes, gradient = _module("prototype_similarity_triton"), _module("_prototype_gradient_triton")
    programs, weight_bytes, partial_bytes = LIMITS[request.param]
    for name in ("POOL_PLANES", "POOL_PIXELS", "SCATTER"):
        monkeypatch.setattr(pool, name, _one(TINY))
    for name in ("FORWARD_PLANES", "FORWARD_PIXELS"):
        monkeypatch.setattr(prototypes, name, _one(TINY))
    for name in ("BACKWARD_ONE", "GRAD_QUERY", "GRAD_UNITS"):
        monkeypatch.setattr(gradient, name, _one(TINY))
    for module in (pool, gradient):
        monkeypatch.setattr(module, "_PROGRAMS", programs)
        monkeypatch.setattr(module, "_PARTIAL_BYTES", partial_bytes)
    monkeypatch.setattr(gradient, "_LEAST_PIXELS", 16)
    monkeypatch.setattr(prototypes, "_UNIT_BYTES", weight_bytes)
    monkeypatch.setattr(weights, "_WEIGHT_BYTES", weight_bytes)


@pytest.mark.usefixtures("tiny_sums")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 2, 70])
@pytest.mark.parametrize("spoilt", [False, True])
def test_masked_average_pool(slots: int, spoilt: bool, device: str) -> None:
    features = torch.randn(2, 20, 5, 9)
    if spoilt:
        features = features.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        features[0, 0, 0, 0], features[-1, -1, 3, 4] = torch.nan, torch.inf
    low = torch.randint(0, max(slots, 2) + 1, (2, 5, 6))
    labels = low.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :18].to(torch.uint8)
    classes = torch.arange(slots).repeat(2, 1)
    if slots > 2:
        classes[:, 1], classes[:, 0] = classes[:, 2], -1
    _judge("masked_average_pool", {"features": features, "labels": labels, "classes": classes}, device)


@pytest.mark.usefixtures("tiny_sums")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 2, 70])
@pytest.mark.parametrize("last", [False, True])
def test_prototype_similarity(slots: int, last: bool, device: str) -> None:
    query = torch.randn(2, 20, 5, 9)
    if last:
        query = query.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    prototypes = torch.randn(2, slots, 20).to(query.dtype)
    _judge("prototype_similarity", {"query": query, "prototypes": prototypes}, device)
