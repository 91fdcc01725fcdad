"""Values that are special: NaN and inf, ties, small temperatures, hard pixels, wrong labels on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close, assert_equal, assert_rounding
from opcases import BAD_VALUES, DEVICES, as_dtype, bad_inputs, run, runs_of, skip_unless_able
from torch import Tensor

from benchmarks import naive as oracles
from cisc_ext import ops
from cisc_ext.ops import _checks, _cross_reference
from cisc_ext.ops.registry import Implementation, Operator

REDUCTIONS = _cross_reference.REDUCTIONS
NAN, INF = float("nan"), float("inf")


def _halves(height: int, width: int, device: str = "cpu") -> Tensor:
    """Labels 0 on the left and 1 on the right."""
    labels = torch.zeros(1, height, width, dtype=torch.uint8, device=device)
    labels[..., width // 2 :] = 1
    return labels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_guide_pixel_that_is_not_finite(reduction: str, value: float, device: str) -> None:
    """Only its class becomes NaN, in its image only; with gradients too, where classes are apart."""
    query = torch.randn(2, 4, 3, 6, device=device)
    guide = torch.randn(2, 4, 4, 6, device=device)
    labels = _halves(4, 6, device).repeat(2, 1, 1)
    labels[:, 3] = 255
    classes = torch.tensor([[0, 1, -1, 7]] * 2, device=device)
    inputs = {"query": query, "guide": guide, "guide_labels": labels, "reduction": reduction}
    clean = run(ops.cross_similarity, inputs | {"classes": classes}, ("query", "guide"))
    spoilt = guide.clone()
    spoilt[0, 2, 1, 1] = value
    got = run(ops.cross_similarity, inputs | {"classes": classes, "guide": spoilt}, ("query", "guide"))
    want = clean["output0"].clone()
    want[0, 0] = NAN
    assert_equal(got["output0"], want, what="similarity")
    assert_equal(got["grad_query"][1], clean["grad_query"][1], what="gradient of the other image")

    # A guide pixel of a class that nobody asks for changes nothing, forward or backward.
    spoilt = guide.clone()
    spoilt[:, :, 3] = value
    got = run(ops.cross_similarity, inputs | {"classes": classes, "guide": spoilt}, ("query", "guide"))
    assert_equal(got["output0"], clean["output0"], what="similarity, pixel of no class")
    assert_equal(got["grad_query"], clean["grad_query"], what="gradient to the query, pixel of no class")
    kept = [0, 1, 2]
    assert_equal(got["grad_guide"][:, :, kept], clean["grad_guide"][:, :, kept], what="gradient to the guide")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_own_labels_keep_what_is_not_finite_apart(reduction: str, value: float, device: str) -> None:
    """In own-label mode query pixels of one label never see the guide pixels or gradients of another."""
    query, guide = torch.randn(2, 1, 4, 3, 6, device=device).unbind()
    labels = _halves(3, 6, device)
    inputs = {"guide_labels": labels, "query_labels": labels, "reduction": reduction}
    clean = run(ops.cross_similarity, inputs | {"query": query, "guide": guide}, ("query", "guide"))
    for spoilt in ("query", "guide"):
        features = {"query": query.clone(), "guide": guide.clone()}
        features[spoilt][0, 1, 2, 0] = value
        got = run(ops.cross_similarity, inputs | features, ("query", "guide"))
        assert bool(got["output0"][..., 2, 0].isnan().all())
        for name, result in got.items():
            assert_equal(result[..., 3:], clean[name][..., 3:], what=f"{name} with {spoilt} spoilt")
    assert bool(clean["output0"].isfinite().all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_query_pixel_that_is_not_finite(reduction: str, device: str) -> None:
    """It is NaN itself for classes that have pixels, and 0 for those without."""
    query, guide = torch.randn(2, 1, 4, 3, 6, device=device).unbind()
    inputs = {"guide_labels": _halves(3, 6, device), "classes": torch.tensor([[0, 5]], device=device)}
    want = ops.cross_similarity(query, guide, **inputs, reduction=reduction).clone()
    want[0, 0, 1, 4] = NAN
    query[0, 3, 1, 4] = NAN
    assert_equal(ops.cross_similarity(query, guide, **inputs, reduction=reduction), want, what="similarity")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), runs_of("masked_average_pool"))
def test_feature_that_is_not_finite_in_pooling(
    operator: Operator, implementation: Implementation, device: str
) -> None:
    """It reaches the prototypes to which it contributes, no others; with channels-last features too."""
    features = torch.randn(2, 70, 5, 8, device=device)
    skip_unless_able(operator, implementation, {"features": features})
    labels = _halves(20, 32, device).repeat(2, 1, 1)
    labels[:, 16:] = 2
    labels[:, 12:16, 20:] = 255
    classes = torch.tensor([[0, 1, 2, -1]] * 2, device=device)
    clean = ops.masked_average_pool(features, labels, classes, impl=implementation.name)
    for value in (NAN, INF, -INF):
        # Pixel (0, 0) belongs to class 0 alone, (3, 7) to class 2 and ignored pixels.
        for at, reached in (((0, 0), 0), ((4, 7), 2)):
            spoilt = features.clone()
            spoilt[0, 66, at[0], at[1]] = value
            want = clean.clone()
            want[0, reached, 66] = value
            for layout in (torch.contiguous_format, torch.channels_last):
                got = ops.masked_average_pool(
                    spoilt.contiguous(memory_format=layout), labels, classes, impl=implementation.name
                )
                assert_close(got, want, 1e-6, what=f"{value} at {at}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), runs_of("masked_average_pool"))
def test_gradient_that_is_not_finite_in_pooling(
    operator: Operator, implementation: Implementation, device: str
) -> None:
    """It reaches the pixels of its class and no others; the gradient of class -1 reaches none."""
    features = torch.randn(1, 3, 5, 8, device=device, requires_grad=True)
    skip_unless_able(operator, implementation, {"features": features})
    labels = _halves(20, 32, device)
    classes = torch.tensor([[0, -1, 1, 0, 9]], device=device)
    output = ops.masked_average_pool(features, labels, classes, impl=implementation.name)
    grad = torch.randn_like(output)
    (clean,) = torch.autograd.grad(output, features, grad, retain_graph=True)
    for value in (NAN, INF, -INF):
        grad[0, 1, 2] = grad[0, 4, 2] = value
        assert_equal(
            torch.autograd.grad(output, features, grad, retain_graph=True)[0], clean, what="of no pixel"
        )
        for slot, reached in ((0, slice(0, 5)), (2, slice(3, 8))):
            spoilt = grad.clone()
            spoilt[0, slot, 1] = value
            want = clean.clone()
            want[0, 1, :, reached] = value
            (got,) = torch.autograd.grad(output, features, spoilt, retain_graph=True)
            assert_close(got, want, 1e-6, what=f"{value} in slot {slot}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), runs_of("prototype_similarity"))
def test_tiny_eps(operator: Operator, implementation: Implementation, device: str) -> None:
    """A zero vector has cosine 0 and gradient 0 even if float32 takes eps for 0."""
    query, prototypes = torch.randn(1, 20, 3, 7, device=device), torch.randn(1, 2, 20, device=device)
    skip_unless_able(operator, implementation, {"query": query})
    query[:, :, 1, 2], prototypes[:, 1] = 0, 0
    inputs = {"query": query, "prototypes": prototypes}
    want = run(ops.prototype_similarity, inputs | {"impl": implementation.name}, ("query", "prototypes"))
    got = run(
        ops.prototype_similarity,
        inputs | {"impl": implementation.name, "eps": 1e-60},
        ("query", "prototypes"),
    )
    for name, value in want.items():
        assert bool(value.isfinite().all()), name
        assert_equal(got[name], value, what=name)
    assert not bool(got["output0"][0, :, 1, 2].any()) and not bool(got["grad_prototypes"][0, 1].any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "lost"), [(1e-20, 1e-4), (2e18, 1e-6)])
@pytest.mark.parametrize(("operator", "implementation"), runs_of("prototype_similarity"))
def test_gradient_of_very_short_and_long_vectors(
    operator: Operator, implementation: Implementation, size: float, lost: float, device: str
) -> None:
    """It goes with 1 / norm; the square of that is beyond float32. Squares of the short ones are rounded."""
    query, prototypes = torch.randn(1, 20, 3, 7, device=device), torch.randn(1, 5, 20, device=device)
    skip_unless_able(operator, implementation, {"query": query})
    for layout in (torch.contiguous_format, torch.channels_last):
        scaled = (query * size).contiguous(memory_format=layout)
        inputs = {"query": scaled, "prototypes": prototypes, "eps": 1e-30}
        want = run(ops.prototype_similarity, as_dtype(inputs, torch.float64), ("query",))["grad_query"]
        got = run(ops.prototype_similarity, inputs | {"impl": implementation.name}, ("query",))["grad_query"]
        assert_close(got.double(), want, lost, what="gradient")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), runs_of("masked_average_pool"))
def test_gradients_below_the_normal_range(
    operator: Operator, implementation: Implementation, device: str
) -> None:
    """bfloat16 holds such numbers as float32 does: rounded, not lost, wherever they lie in a row."""
    labels, classes = (
        torch.zeros(1, 1, 37, dtype=torch.uint8, device=device),
        torch.zeros(1, 1, device=device),
    )
    got = {}
    for dtype in (torch.float32, torch.bfloat16):
        features = torch.zeros(1, 3, 1, 37, device=device, dtype=dtype, requires_grad=True)
        skip_unless_able(operator, implementation, {"features": features})
        output = ops.masked_average_pool(features, labels, classes.long(), impl=implementation.name)
        grad = torch.tensor([[[3e-37, -2e-38, 1.0]]], device=device)
        got[dtype] = torch.autograd.grad(output, features, grad)[0]
    assert bool((got[torch.float32][0, :2].abs() < torch.finfo(torch.float32).tiny).all())
    assert bool(got[torch.float32].all())
    assert_equal(got[torch.bfloat16], got[torch.float32].bfloat16(), what="gradient in bfloat16")


@pytest.mark.parametrize("device", DEVICES)
def test_maps_and_logits_that_are_not_finite(device: str) -> None:
    """NaN makes the loss NaN where its pixel counts, and is no loss where all that it touches is ignored."""
    maps, logits = torch.full((1, 1, 4, 4), 0.5, device=device), torch.zeros(1, 3, 4, 4, device=device)
    labels = _halves(8, 8, device)
    ignored = torch.where(labels == 1, 255, labels)
    classes = torch.zeros(1, 1, dtype=torch.int64, device=device)
    maps[..., 3], logits[:, 1, :, 3] = NAN, NAN
    assert bool(ops.map_consistency(maps, labels, classes).isnan())
    got = run(
        ops.map_consistency, {"similarity": maps, "labels": labels, "classes": classes}, ("similarity",)
    )
    assert bool(got["grad_similarity"][..., 3].isnan().all())
    assert bool(got["grad_similarity"][..., :2].isfinite().all())
    for reduction in ("mean", "valid_mean", "sum"):
        loss = ops.rectified_cross_entropy(logits, labels, reduction=reduction)
        assert bool(loss.isnan())
    # The first column that a NaN reaches is 5, with and without align_corners: all ignored here.
    assert bool(ops.map_consistency(maps, ignored, classes).isfinite())
    assert bool(ops.rectified_cross_entropy(logits, ignored, maps, classes).isfinite())
    pixel = ops.rectified_cross_entropy(logits, labels, reduction="none")
    naive = oracles.rectified_cross_entropy(logits, labels, reduction="none")
    assert_close(pixel, naive, 1e-6, what="per pixel")
    assert_equal(ops.predict(logits, (8, 8))[0], oracles.predict(logits, (8, 8))[0], what="classes")
    maps[..., 3] = 0.5
    none = torch.full_like(classes, -1)
    spoilt = torch.full_like(maps, NAN)
    assert float(ops.map_consistency(spoilt, labels, none)) == 0
    assert bool(ops.rectified_cross_entropy(torch.zeros_like(logits), labels, spoilt, none).isfinite())


def _one_hot_images(codes: Tensor, channels: int) -> Tensor:
    """[1,C,h,w] with 1 at the channel that `codes` [h,w] names: cosines are exactly 0 or 1."""
    return torch.nn.functional.one_hot(codes, channels).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ties_go_to_the_lowest_index(reduction: str, device: str) -> None:
    """Across tiles too: the guide has more pixels than one tile holds."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 3, (40, 70), generator=generator)
    codes[:20] = 0  # codes 1 and 2 first come in the second tile of 1024 pixels
    assert codes.numel() > 2 * _cross_reference._GUIDE_PIXELS > 2 * 20 * 70 * 0.7
    labels = torch.randint(0, 2, (1, 40, 70), generator=generator)
    query = _one_hot_images(torch.tensor([[0, 1, 2, 3]]), 4).to(device)
    _, index = ops.cross_similarity(
        query,
        _one_hot_images(codes, 4).to(device),
        labels.to(device),
        torch.tensor([[0, 1, 9]], device=device),
        reduction=reduction,
        return_index=True,
    )
    flat, own = codes.flatten(), labels.flatten()
    for slot in (0, 1):
        for code in range(3):
            first = int(((flat == code) & (own == slot)).to(torch.uint8).argmax())
            assert int(index[0, slot, 0, code]) == first
        # Nothing is like code 3: all cosines are 0, and the first pixel of the class wins.
        assert int(index[0, slot, 0, 3]) == int((own == slot).to(torch.uint8).argmax())
    assert index[0, 2].unique().tolist() == [-1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (33, 33), (41, 37), (1, 1500)], ids=str)
@pytest.mark.parametrize("channels", [3, 33, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_pixels_tie(dtype: torch.dtype, channels: int, size: tuple[int, int], device: str) -> None:
    """Four vectors again and again, whose cosines are no round numbers: the first of the best one wins."""
    vectors = torch.randn(channels, 4)
    vectors[:, 0] = vectors[:, 1] * 3  # differs from another by no more than rounding
    which = torch.randint(0, 4, size)
    guide = vectors.to(dtype)[:, which][None].to(device)
    query = torch.randn(1, channels, 3, 11, dtype=dtype, device=device)
    labels = torch.zeros(1, *size, dtype=torch.uint8, device=device)
    classes = torch.zeros(1, 1, dtype=torch.int64, device=device)
    _, index = ops.cross_similarity(query, guide, labels, classes, return_index=True)
    first = [int((which.flatten() == number).to(torch.uint8).argmax()) for number in range(4)]
    assert set(index.unique().tolist()) <= set(first)
    k = ops.cross_similarity(query, guide, labels, classes, reduction="topk", k=10**9)
    mean = ops.cross_similarity(query, guide, labels, classes, reduction="mean")
    assert_close(k, mean, 1e-5, what="more winners than pixels")


@pytest.mark.parametrize("device", DEVICES)
def test_ties_of_topk(device: str) -> None:
    """Of equal cosines the lowest indices count, and only they get a gradient."""
    codes = torch.zeros(30, 60, dtype=torch.int64)
    codes.view(-1)[[1700, 1100, 900, 30]] = 1
    guide = _one_hot_images(codes, 3).to(device)
    query = _one_hot_images(torch.tensor([[1, 2]]), 3).to(device)
    query[:, 2] += 0.5  # keeps the derivative of the cosine from vanishing
    labels = torch.zeros(1, 30, 60, dtype=torch.uint8, device=device)
    classes = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for k in (1, 3, 6):
        got = run(
            ops.cross_similarity,
            {"query": query, "guide": guide, "guide_labels": labels, "classes": classes},
            ("guide",),
            reduction="topk",
            k=k,
        )
        touched = got["grad_guide"].abs().sum(1).flatten().nonzero().flatten().tolist()
        like_one = [30, 900, 1100, 1700][:k]
        # The second query pixel has cosine 0 with all pixels: the first k of them.
        assert touched == sorted({*like_one, *range(k)})
        first = got["output0"].flatten().cpu()[0]
        assert_close(first, torch.tensor(min(k, 4) / k / 1.25**0.5), 1e-6, what=f"k={k}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_of_few(dtype: torch.dtype, device: str) -> None:
    """With fewer than k pixels it is the mean of all; without any, 0."""
    query, guide = torch.randn(2, 1, 4, 3, 4, dtype=dtype, device=device).unbind()
    labels = torch.zeros(1, 3, 4, dtype=torch.uint8, device=device)
    labels[0, 1, 2] = 1
    classes = torch.tensor([[0, 1, 2]], device=device)
    got = run(
        ops.cross_similarity,
        {"query": query, "guide": guide, "guide_labels": labels, "classes": classes},
        ("query", "guide"),
        reduction="topk",
        k=11,
    )
    want = run(
        ops.cross_similarity,
        {"query": query, "guide": guide, "guide_labels": labels, "classes": classes},
        ("query", "guide"),
        reduction="mean",
    )
    for name, value in got.items():
        assert_close(value, want[name], 16 * torch.finfo(dtype).eps, what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 10.0])
def test_softmax_of_any_temperature(temperature: float, device: str) -> None:
    query, guide = torch.randn(2, 1, 6, 5, 8, dtype=torch.float64, device=device).unbind()
    inputs = {
        "query": query,
        "guide": guide,
        "guide_labels": _halves(5, 8, device),
        "classes": torch.tensor([[0, 1, 3]], device=device),
        "reduction": "softmax",
        "temperature": temperature,
    }
    want = run(oracles.cross_similarity, inputs, ("query", "guide"))
    for name, value in run(ops.cross_similarity, inputs, ("query", "guide")).items():
        assert_close(value, want[name], 1e-11, what=name)
    single = as_dtype(inputs, torch.float32)
    truth = run(ops.cross_similarity, as_dtype(single, torch.float64), ("query", "guide"))
    naive = run(oracles.cross_similarity, single, ("query", "guide"))
    for name, value in run(ops.cross_similarity, single, ("query", "guide")).items():
        assert bool(value.isfinite().all()), name
        assert_rounding(value, truth[name], naive[name], truth[name].abs().max(), what=name)


def _tied_logits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of two classes that take nine values, so that probabilities tie exactly; and labels."""
    logits = torch.zeros(2, 2, 12, 10)
    logits[:, 0] = torch.randint(-4, 5, (2, 12, 10), generator=generator)
    labels = torch.zeros(2, 12, 10, dtype=torch.int64)
    labels[torch.rand(2, 12, 10, generator=generator) < 0.25] = 255
    return logits, labels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("min_kept", [0, 1, 60, 170, 10000])
def test_hard_pixels_against_sorting(
    dtype: torch.dtype, threshold: float, min_kept: int, device: str
) -> None:
    logits, labels = _tied_logits(torch.Generator().manual_seed(3))
    kept = labels != 255
    assert int(kept.sum()) > 170
    want = oracles.kept_by_ohem(logits.to(dtype).softmax(1)[:, 0], kept, threshold, min_kept)
    loss = ops.rectified_cross_entropy(
        logits.to(device, dtype),
        labels.to(device),
        reduction="none",
        ohem_threshold=threshold,
        ohem_min_kept=min_kept,
    ).cpu()
    assert_equal(loss > 0, want, what="kept pixels")
    for reduction in ("mean", "valid_mean", "sum"):
        got = run(
            ops.rectified_cross_entropy,
            {"logits": logits.to(device, dtype), "labels": labels.to(device)},
            ("logits",),
            reduction=reduction,
            ohem_threshold=threshold,
            ohem_min_kept=min_kept,
        )
        plain = run(
            ops.rectified_cross_entropy,
            {"logits": logits.to(device, dtype), "labels": torch.where(want, labels, 255).to(device)},
            ("logits",),
            reduction=reduction,
        )
        for name, value in got.items():
            assert_equal(value, plain[name], what=f"{name} of {reduction}")


def test_threshold_of_probability_keeps_its_equals() -> None:
    """With two classes and equal logits every probability is exactly 1/2."""
    logits, labels = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.uint8)
    for threshold, kept in ((0.5, 9), (0.499, 0)):
        loss = ops.rectified_cross_entropy(
            logits, labels, reduction="none", ohem_threshold=threshold, ohem_min_kept=0
        )
        assert int((loss > 0).sum()) == kept


@pytest.mark.parametrize("device", DEVICES)
def test_predict_ties_and_confusion(device: str) -> None:
    """By hand: classes 0 and 2 tie in the first pixel, 1 and 2 in the second; the third is ignored."""
    logits = torch.tensor([[3.0, 0, 5], [1, 4, 5], [3, 4, 5]], device=device).view(1, 3, 1, 3)
    labels = torch.tensor([[[2, 1, 255]]], dtype=torch.uint8, device=device)
    classes, confusion = ops.predict(logits, (1, 3), labels)
    assert classes.tolist() == [[[0, 1, 0]]]
    assert confusion is not None
    assert confusion.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    classes, confusion = ops.predict(logits, torch.Size((4, 6)))
    assert confusion is None
    assert classes.shape == (1, 4, 6) and classes.dtype == torch.uint8
    assert not classes.requires_grad


def test_rectified_cross_entropy_by_hand() -> None:
    """Loss log 2 in both pixels; weights 1 - 0.25, 1 - 0.75 and their mean, or the map itself."""
    logits = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    maps = torch.tensor([[[[0.75, 0.75]], [[0.5, 2.0]]]], dtype=torch.float64)
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    for classes, weights in (
        ([[0, -1]], (0.75, 0.25)),
        ([[-1, 1]], (0.5, 1.0)),
        ([[0, 1]], (0.625, 0.625)),
        ([[-1, -1]], (1.0, 1.0)),
    ):
        loss = ops.rectified_cross_entropy(logits, labels, maps, torch.tensor(classes), reduction="none")
        assert_close(
            loss, (log2 * torch.tensor(weights, dtype=torch.float64)).view(1, 1, 2), 1e-15, what=str(classes)
        )
    own = ops.rectified_cross_entropy(logits, labels, maps[:, 1:], reduction="none")
    assert_close(own, (log2 * torch.tensor([0.5, 1.0], dtype=torch.float64)).view(1, 1, 2), 1e-15, what="own")


@pytest.mark.parametrize(("name", "given"), BAD_VALUES)
def test_wrong_values(name: str, given: dict[str, Any]) -> None:
    """One wrong value raises on the CPU, and names the argument."""
    with pytest.raises(ValueError, match=f"^{name}: (labels|classes) must be"):
        getattr(ops, name)(**bad_inputs(given, "cpu"))


@pytest.mark.parametrize(("name", "given"), BAD_VALUES[2:5])
def test_wrong_values_reach_the_gradient(
    name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where values are not read, as on a GPU, a loss that is NaN must not leave a finite gradient behind."""
    monkeypatch.setattr(_checks, "invalid_values", lambda invalid, expected, values: invalid.any())
    first, value = next(iter(given.items()))
    leaf = value.clone().requires_grad_()
    labels = torch.full((1, 5, 5), given["labels"])
    inputs = {key: torch.full((1, 1), given[key]) for key in given.keys() & {"classes"}}
    inputs |= {key: given[key] for key in given.keys() & {"reduction"}}
    loss = getattr(ops, name)(**{first: leaf, "labels": labels, **inputs}, impl="reference")
    loss.sum().backward()
    assert leaf.grad is not None and bool(loss.isnan().all()) and bool(leaf.grad.isnan().all())
