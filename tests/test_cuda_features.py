"""Pooling and prototypes where GPU kernels take another path: planes that start anywhere, cropped rows,
more channels or classes than a block holds, many labels for a pixel, weights that do not fit at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close
from opcases import DEVICES, SIMULATED, run, skip_unless_able
from oprule import assert_meets_rule
from torch import Tensor

from benchmarks import naive
from cisc_ext import ops
from cisc_ext.ops.registry import OPERATORS


def _judge(name: str, inputs: dict[str, Any], device: str) -> None:
    placed = {key: value.to(device) for key, value in inputs.items()}
    for key in OPERATORS[name].features:  # `to` keeps strides only where nothing is copied
        if placed[key].stride() != inputs[key].stride():
            placed[key] = torch.empty_strided(inputs[key].shape, inputs[key].stride(), device=device).copy_(
                inputs[key]
            )
    (cpp,) = (one for one in OPERATORS[name].implementations if one.name == "cpp")
    skip_unless_able(OPERATORS[name], cpp, placed)
    assert_meets_rule(OPERATORS[name], "cpp", placed)


def _shifted(by: int) -> Callable[[Tensor], Tensor]:
    def lay(x: Tensor) -> Tensor:
        memory = torch.full((x.numel() + by,), torch.nan, dtype=x.dtype)
        return memory[by:].view(x.shape).copy_(x)

    return lay


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": lambda x: x.contiguous(),
    "planes from 1 on": _shifted(1),
    "planes from 6 on": _shifted(6),
    "cropped planes": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2],
    "pixels": _last,
    "cropped pixels": lambda x: _last(torch.nn.functional.pad(x, (3, 2), value=torch.nan))[..., 3:-2],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling(layout: str, dtype: torch.dtype, slots: int, device: str) -> None:
    """Odd planes; labels in blobs, so that some pixels have no class and some several."""
    features = LAYOUTS[layout](torch.randn(2, 24, 23, 29).to(dtype))
    low = torch.randint(0, 45, (2, 9, 11)) if slots > 3 else torch.randint(0, slots + 1, (2, 9, 11))
    labels = low.repeat_interleave(7, 1).repeat_interleave(8, 2).to(torch.uint8)
    _judge(
        "masked_average_pool",
        {"features": features, "labels": labels, "classes": torch.arange(slots).repeat(2, 1)},
        device,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 3, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prototypes(layout: str, dtype: torch.dtype, slots: int, device: str) -> None:
    query = LAYOUTS[layout](torch.randn(2, 24, 23, 29).to(dtype))
    _judge("prototype_similarity", {"query": query, "prototypes": torch.randn(2, slots, 24)}, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 8), (1, 24, 16, 32), (1, 16, 64, 64), (1, 256, 8, 16), (1, 300, 8, 8)], ids=str
)
def test_planes_that_all_start_aligned(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, slots: int, device: str
) -> None:
    query = LAYOUTS[layout](torch.randn(shape).to(dtype))
    batch, channels, height, width = shape
    _judge(
        "prototype_similarity", {"query": query, "prototypes": torch.randn(batch, slots, channels)}, device
    )
    labels = torch.randint(0, slots + 1, (batch, height // 4, width // 4)).repeat_interleave(9, 2)
    classes = torch.arange(slots).repeat(batch, 1)
    _judge("masked_average_pool", {"features": query, "labels": labels, "classes": classes}, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 2, 9])
@pytest.mark.parametrize("layout", ["planes", "planes from 1 on", "cropped planes", "pixels"])
def test_batches_that_end_with_fewer_images(layout: str, slots: int, device: str) -> None:
    """Of several launches, as the simulator has little memory, the last has fewer."""
    for channels, batch, size in [(24, 11, (8, 9)), (168, 11, (8, 17)), (8, 4, (11, 14))]:
        query = LAYOUTS[layout](torch.randn(batch, channels, *size))
        inputs = {"query": query, "prototypes": torch.randn(batch, slots, channels)}
        _judge("prototype_similarity", inputs, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(2, 1203), (37, 41)], ids=str)
def test_norms_of_an_image_that_do_not_fit_at_once(size: tuple[int, int], device: str) -> None:
    """Parts of a row, and some rows at a time, in the simulator, which holds few; rows with gaps, too."""
    wide = torch.randn(2, *size, 8)
    for query in (wide, wide[:, :, :-3]):
        inputs = {"query": query.permute(0, 3, 1, 2), "prototypes": torch.randn(2, 2, 8)}
        _judge("prototype_similarity", inputs, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["planes", "pixels"])
def test_more_channels_than_a_block_holds(layout: str, dtype: torch.dtype, slots: int, device: str) -> None:
    for channels in (257 if layout == "planes" else 264, 520):
        query = LAYOUTS[layout](torch.randn(1, channels, 5, 17).to(dtype))
        labels = torch.randint(0, slots + 2, (1, 10, 34))
        classes = torch.arange(slots)[None]
        _judge("masked_average_pool", {"features": query, "labels": labels, "classes": classes}, device)
        prototypes = torch.randn(1, slots, channels)
        _judge("prototype_similarity", {"query": query, "prototypes": prototypes}, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 40), (40, 2)], ids=str)
def test_many_labels_of_a_pixel(size: tuple[int, int], device: str) -> None:
    for dtype in (torch.uint8, torch.int64):
        labels = torch.randint(0, 4, (2, 201, 603)).to(dtype)
        features = torch.randn(2, 5, *size)
        classes = torch.tensor([[0, 2, 300], [3, 3, -1]])
        _judge("masked_average_pool", {"features": features, "labels": labels, "classes": classes}, device)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_a_row_that_do_not_fit_at_once(device: str) -> None:
    """Parts of a row, and the sums of the earlier ones go into the mean."""
    slots, width = 9000, 750
    inputs: dict[str, Any] = {
        "features": torch.randn(1, 2, 1, width, device=device),
        "labels": torch.randint(0, slots, (1, 1, width), device=device),
        "classes": torch.arange(slots, device=device)[None],
    }
    operator = OPERATORS["masked_average_pool"]
    (cpp,) = (one for one in operator.implementations if one.name == "cpp")
    skip_unless_able(operator, cpp, inputs)
    got = run(ops.masked_average_pool, inputs | {"impl": "cpp"}, ("features",))
    exact = inputs | {"features": inputs["features"].double()}
    want = run(naive.masked_average_pool, exact, ("features",))
    for name, value in got.items():
        assert_close(value.double(), want[name], 1e-6, what=name)


@pytest.mark.parametrize("device", DEVICES)
def test_prototypes_that_are_not_finite_without_pixels(device: str) -> None:
    prototypes = torch.randn(2, 3, 5)
    prototypes[0, 1, 2] = torch.nan
    prototypes[1, 0, 4] = torch.inf
    _judge("prototype_similarity", {"query": torch.randn(2, 5, 4, 0), "prototypes": prototypes}, device)
    leaf = prototypes.to(device).requires_grad_()
    ops.prototype_similarity(torch.randn(2, 5, 4, 0, device=device), leaf, impl="cpp").sum().backward()
    assert leaf.grad is not None
    spoilt = ~prototypes.isfinite().all(2, keepdim=True).expand_as(prototypes)
    assert torch.equal(leaf.grad.cpu().isnan(), spoilt)


@pytest.mark.skipif(not SIMULATED, reason="CISC_CHECK=0 is for GPUs: the CPU's kernels always check")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pixels", [0, 30])
def test_pooling_of_a_class_below_none(
    pixels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is NaN, also where labels have no pixels; without such a class all is 0 then."""
    monkeypatch.setenv("CISC_CHECK", "0")
    features = torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True)
    labels = torch.zeros(2, pixels, 30, dtype=torch.uint8)
    for wrong in (-2, 1):
        classes = torch.tensor([[0, -1], [wrong, 0]])
        pooled = ops.masked_average_pool(features, labels, classes, impl="cpp")
        (gradient,) = torch.autograd.grad(pooled.sum(), features)
        for values in (pooled, gradient):
            assert bool(values.isnan().all()) == (wrong == -2), wrong
            assert wrong == -2 or pixels > 0 or int(values.count_nonzero()) == 0
