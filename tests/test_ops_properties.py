"""What holds for any input: hypothesis looks for one for which it does not."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from numerics import assert_close, assert_equal
from torch import Tensor

from cisc_ext import ops
from cisc_ext.ops import _bilinear

REDUCTIONS = ("max", "topk", "softmax", "mean")
ROUNDING = 1e-12
"""Of the largest magnitude, in float64; the sums have up to a hundred terms."""

few = st.integers(1, 5)
some = st.integers(1, 9)
many = st.integers(1, 30)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _pair(seed: int, channels: int, size: tuple[int, int], other: tuple[int, int]) -> dict[str, Tensor]:
    """A query, a guide with labels at the guide's own resolution, and classes, one of them without pixels."""
    generator = _random(seed)
    return {
        "query": _normal(generator, 2, channels, *size),
        "guide": _normal(generator, 2, channels, *other),
        "guide_labels": torch.randint(0, 3, (2, *other), generator=generator),
        "classes": torch.tensor([[0, 1, 7], [2, -1, 0]]),
    }


@quick
@given(seeds, few, few, few, some, some, st.sampled_from(REDUCTIONS), st.integers(1, 12))
def test_order_of_guide_pixels_changes_only_the_index(
    seed: int, channels: int, h: int, w: int, guide_h: int, guide_w: int, reduction: str, k: int
) -> None:
    inputs = _pair(seed, channels, (h, w), (guide_h, guide_w))
    call: dict[str, Any] = {"reduction": reduction, "k": k, "return_index": True}
    value, index = ops.cross_similarity(**inputs, **call)
    order = torch.randperm(guide_h * guide_w, generator=_random(seed))
    shuffled = inputs | {
        name: inputs[name].flatten(-2)[..., order].view_as(inputs[name]) for name in ("guide", "guide_labels")
    }
    again, moved = ops.cross_similarity(**shuffled, **call)
    assert_close(again, value, ROUNDING, what=reduction)
    # Another index, but a pixel with the same cosine: with one channel all cosines are 1 or -1 and tie.
    if channels > 1:
        assert_equal(torch.where(moved < 0, -1, order[moved.clamp(min=0)]), index, what="index")


@quick
@given(seeds, few, few, few, some, some, st.sampled_from(REDUCTIONS))
def test_length_of_features_changes_no_cosine(
    seed: int, channels: int, h: int, w: int, guide_h: int, guide_w: int, reduction: str
) -> None:
    inputs = _pair(seed, channels, (h, w), (guide_h, guide_w))
    generator = _random(seed + 1)
    scaled = {
        name: inputs[name] * (3 * _normal(generator, 2, 1, *inputs[name].shape[2:])).exp()
        for name in ("query", "guide")
    }
    value = ops.cross_similarity(**inputs, reduction=reduction)
    again = ops.cross_similarity(**inputs | scaled, reduction=reduction)
    assert_close(again, value, ROUNDING, what=reduction)
    assert float(value.abs().max()) <= 1 + ROUNDING
    prototypes = _normal(generator, 2, 3, channels)
    longer = prototypes * (3 * _normal(generator, 2, 3, 1)).exp()
    want = ops.prototype_similarity(inputs["query"], prototypes)
    got = ops.prototype_similarity(scaled["query"], longer)
    assert_close(got, want, ROUNDING, what="prototype_similarity")


@quick
@given(seeds, few, some, some, st.booleans())
def test_a_guide_equal_to_the_query_gives_1(seed: int, channels: int, h: int, w: int, single: bool) -> None:
    generator = _random(seed)
    dtype = torch.float32 if single else torch.float64
    features = _normal(generator, 2, channels, h, w).to(dtype)
    labels = torch.randint(0, 3, (2, h, w), generator=generator)
    value, index = ops.cross_similarity(features, features, labels, query_labels=labels, return_index=True)
    error = 8 * torch.finfo(dtype).eps
    assert_close(value, torch.ones_like(value), error, what="max")
    # The best is the pixel itself, or one as good.
    best = F.normalize(features.flatten(2), dim=1).gather(2, index.flatten(2).expand(-1, channels, -1))
    own = F.normalize(features.flatten(2), dim=1)
    assert_close((best * own).sum(1), torch.ones(2, h * w, dtype=dtype), error, what="cosine with the best")


@quick
@given(seeds, few, few, few, some, some, st.integers(0, 3))
def test_topk_lies_between_max_and_mean(
    seed: int, channels: int, h: int, w: int, guide_h: int, guide_w: int, more: int
) -> None:
    inputs = _pair(seed, channels, (h, w), (guide_h, guide_w))
    pixels = guide_h * guide_w

    def value(reduction: str, **rest: Any) -> Tensor:
        result: Tensor = ops.cross_similarity(**inputs, reduction=reduction, **rest)
        return result

    largest, mean = value("max"), value("mean")
    assert_close(value("topk", k=1), largest, 0, what="k = 1")
    assert_close(value("topk", k=pixels + more), mean, ROUNDING, what="k of all")
    assert bool((value("topk", k=2 + more) <= largest + ROUNDING).all())
    assert bool((value("topk", k=2 + more) >= mean - ROUNDING).all())
    assert bool((value("softmax") <= largest + ROUNDING).all())
    assert bool((value("softmax") >= mean - ROUNDING).all())


@quick
@given(seeds, st.integers(2, 5), few, few, some, some)
def test_softmax_tends_to_max_and_to_mean(
    seed: int, channels: int, h: int, w: int, guide_h: int, guide_w: int
) -> None:
    inputs = _pair(seed, channels, (h, w), (guide_h, guide_w))
    largest = ops.cross_similarity(**inputs)
    last = torch.inf
    for temperature in (1e-1, 1e-3, 1e-5):
        value = ops.cross_similarity(**inputs, reduction="softmax", temperature=temperature)
        distance = float((largest - value).max())
        # The mean over p of (max - cosine) is at most temperature * pixels / e.
        assert -ROUNDING <= distance <= temperature * guide_h * guide_w / torch.e + ROUNDING
        assert distance <= last + ROUNDING
        last = distance
    flat = ops.cross_similarity(**inputs, reduction="softmax", temperature=1e9)
    assert_close(flat, ops.cross_similarity(**inputs, reduction="mean"), 1e-8, what="high temperature")


def _upsampled(x: Tensor, size: tuple[int, int], align_corners: bool, step: int) -> Tensor:
    """In pieces of `step` rows."""
    pieces = [(start, min(start + step, size[0])) for start in range(0, size[0], step)]
    return torch.cat(
        [_bilinear.upsample_rows(x, size, align_corners, *piece, x.dtype) for piece in pieces], -2
    )


@quick
@given(seeds, some, some, many, many, st.booleans(), some)
def test_upsampling_in_pieces_is_that_of_torch(
    seed: int, h: int, w: int, height: int, width: int, align_corners: bool, step: int
) -> None:
    x = _normal(_random(seed), 2, 3, h, w)
    got = _upsampled(x, (height, width), align_corners, step)
    want = F.interpolate(x, (height, width), mode="bilinear", align_corners=align_corners)
    assert_close(got, want, ROUNDING, what="upsampled")


@quick
@given(some, many, st.booleans(), st.data())
def test_outputs_of_a_range_of_inputs(n: int, m: int, align_corners: bool, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    low, high, _ = _bilinear.axis(n, m, align_corners, torch.float64, torch.device("cpu"))
    first, last = _bilinear.outputs_of(n, m, align_corners, start, stop)
    taken = [i for i in range(m) if int(low[i]) < stop and int(high[i]) >= start]
    assert set(taken) <= set(range(first, last)) <= {i for i in range(m) if start - 1 <= int(low[i]) < stop}


@quick
@given(seeds, some, some, many, many, st.booleans(), some)
def test_adjoint_identity(
    seed: int, h: int, w: int, height: int, width: int, align_corners: bool, step: int
) -> None:
    """<U x, y> = <x, U* y>, also when U* comes in pieces; and U* keeps the sum, since U keeps constants."""
    generator = _random(seed)
    x, y = _normal(generator, 2, h, w), _normal(generator, 2, height, width)
    back = torch.zeros_like(x)
    for start in range(0, height, step):
        stop = min(start + step, height)
        _bilinear.add_adjoint_rows(back, y[:, start:stop], (height, width), align_corners, start, stop)
    up = _upsampled(x, (height, width), align_corners, step)
    scale = float((up.abs() * y.abs()).sum())
    assert abs(float((up * y).sum() - (x * back).sum())) <= ROUNDING * scale
    assert abs(float(back.sum() - y.sum())) <= ROUNDING * float(y.abs().sum())


@quick
@given(seeds, few, some, some, many, many, st.integers(-1, 4))
def test_pooling_is_the_adjoint(
    seed: int, channels: int, h: int, w: int, height: int, width: int, target: int
) -> None:
    """Both implementations: the prototype of constant features is that constant, less what eps takes."""
    generator = _random(seed)
    labels = torch.randint(0, 4, (1, height, width), generator=generator)
    constant = _normal(generator, 1, channels, 1, 1).expand(1, channels, h, w)
    count = float((labels == target).sum()) if target >= 0 else 0.0
    for dtype, relative in ((torch.float64, ROUNDING), (torch.float32, 1e-6)):
        got = ops.masked_average_pool(constant.to(dtype), labels, torch.tensor([[target]]), eps=0.5)
        want = constant[0, :, 0, 0] * (count / (count + 0.5))
        assert_close(got[0, 0], want, relative, what=str(dtype))


@settings(quick, max_examples=300)
@given(st.integers(1, 300), st.integers(1, 300))
def test_nearest_is_nearest_exact(n: int, m: int) -> None:
    """As torch takes it in float64, except where a centre falls on a border: its rounding may miss by one."""
    got = _bilinear.nearest_rows(n, m, torch.device("cpu"))
    numbers = torch.arange(n, dtype=torch.float64)[None, None]
    want = F.interpolate(numbers, m, mode="nearest-exact")[0, 0].long()
    on_border = ((2 * torch.arange(m) + 1) * n) % (2 * m) == 0
    assert_equal(got[~on_border], want[~on_border], what="index")
    assert bool(((got - want)[on_border] <= 1).all() and ((got - want)[on_border] >= 0).all())
    assert int(got.min()) >= 0 and int(got.max()) < n


@quick
@given(seeds, st.integers(2, 5), st.integers(0, 3), some, some, many, many)
def test_weights_lie_between_0_and_1(
    seed: int, num_classes: int, slots: int, h: int, w: int, height: int, width: int
) -> None:
    """The weight, seen as the loss of each pixel over its plain cross-entropy."""
    generator = _random(seed)
    logits = _normal(generator, 2, num_classes, h, w)
    labels = torch.randint(0, num_classes, (2, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    similarity = 2 * _normal(generator, 2, max(slots, 1), w, h)
    classes = torch.randint(-1, num_classes, (2, slots), generator=generator) if slots else None
    loss = ops.rectified_cross_entropy(logits, labels, similarity, classes, reduction="none")
    plain = ops.rectified_cross_entropy(logits, labels, reduction="none")
    weight = torch.where(plain > 0, loss / plain, 1)
    assert float(weight.min()) >= -ROUNDING and float(weight.max()) <= 1 + ROUNDING
    assert float(loss[labels == 255].abs().sum()) == 0
    if classes is not None:
        unweighted = (classes < 0).all(1)
        assert_close(loss[unweighted], plain[unweighted], ROUNDING, what="no valid class")
    mean = ops.rectified_cross_entropy(logits, labels, similarity, classes)
    assert_close(mean, loss.mean(), ROUNDING, what="mean")
    kept = int((labels != 255).sum())
    valid_mean = ops.rectified_cross_entropy(logits, labels, similarity, classes, reduction="valid_mean")
    assert_close(valid_mean, loss.sum() / max(kept, 1), ROUNDING, what="valid_mean")


@quick
@given(seeds, st.integers(0, 3), some, some, many, many, st.booleans())
def test_consistency_is_not_negative_and_a_mean_over_nothing_is_0(
    seed: int, slots: int, h: int, w: int, height: int, width: int, nothing: bool
) -> None:
    generator = _random(seed)
    similarity = _normal(generator, 2, slots, h, w).requires_grad_()
    labels = torch.randint(0, 3, (2, height, width), generator=generator)
    if nothing:
        labels[:] = 255
    classes = torch.randint(-1, 3, (2, slots), generator=generator)
    loss = ops.map_consistency(similarity, labels, classes)
    loss.backward()
    assert 0 <= float(loss.detach()) <= 100
    assert similarity.grad is not None and bool(similarity.grad.isfinite().all())
    if nothing or bool((classes < 0).all()):
        assert float(loss.detach()) == 0
        assert float(similarity.grad.abs().sum()) == 0


@quick
@given(seeds, st.integers(1, 6), some, some, many, many)
def test_confusion_counts_every_pixel_once(
    seed: int, num_classes: int, h: int, w: int, height: int, width: int
) -> None:
    generator = _random(seed)
    logits = _normal(generator, 2, num_classes, h, w)
    labels = torch.randint(0, num_classes, (2, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    classes, confusion = ops.predict(logits, (height, width), labels)
    assert confusion is not None
    for truth in range(num_classes):
        for found in range(num_classes):
            assert int(confusion[truth, found]) == int(((labels == truth) & (classes == found)).sum())
    shifted, _ = ops.predict(logits + 2.0, (height, width))
    assert_equal(shifted, classes, what="classes of shifted logits")
