"""The method's pure functions, against cases worked by hand or plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cisc_ext import method
from cisc_ext.config import MethodConfig
from cisc_ext.models import SegOutput


def plain_map(query: Tensor, guide: Tensor, guide_labels: Tensor, c: int) -> Tensor:
    """CISC map of one class by upsampled features, [B,h,w]."""
    up = F.interpolate(guide, guide_labels.shape[-2:], mode="bilinear", align_corners=False)
    mask = (guide_labels == c)[:, None].double()
    prototype = (up * mask).sum((2, 3)) / (mask.sum((2, 3)) + 5e-4)
    return F.cosine_similarity(query, prototype[:, :, None, None], dim=1)


@pytest.fixture
def scene() -> dict[str, Tensor]:
    """Features and labels of two images with their guides."""
    torch.manual_seed(3)
    return {
        "query": torch.randn(2, 6, 5, 7, dtype=torch.float64),
        "guide": torch.randn(2, 6, 4, 6, dtype=torch.float64),
        "labels": torch.randint(0, 3, (2, 20, 28)).to(torch.uint8),
        "guide_labels": torch.randint(0, 2, (2, 16, 24)).to(torch.uint8),
    }


def test_prototype_map_is_the_published_arithmetic(scene: dict[str, Tensor]) -> None:
    classes = torch.tensor([[1], [0]])
    config = MethodConfig()
    got = method.cisc_map(
        scene["query"], scene["labels"], scene["guide"], scene["guide_labels"], classes, 3, config
    )
    for b, c in enumerate([1, 0]):
        want = plain_map(scene["query"], scene["guide"], scene["guide_labels"], c)[b]
        torch.testing.assert_close(got[b, 0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("similarity", ["prototype", "max", "topk", "softmax"])
def test_own_label_map_compares_each_pixel_with_its_own_class(
    scene: dict[str, Tensor], similarity: str
) -> None:
    config = MethodConfig(similarity=similarity)
    arguments = scene["query"], scene["labels"], scene["guide"], scene["guide_labels"]
    own = method.cisc_map(*arguments, None, 3, config)
    each = method.cisc_map(*arguments, torch.tensor([[0, 1, 2]] * 2), 3, config)
    low = F.interpolate(
        scene["labels"][:, None].double(), scene["query"].shape[2:], mode="nearest-exact"
    ).long()
    assert own.shape == (2, 1, 5, 7)
    want = torch.where(low == 2, 1.0, each.gather(1, low))  # no guide has class 2
    torch.testing.assert_close(own, want, rtol=1e-12, atol=1e-12)


def test_own_label_map_holds_nothing_against_ignored_pixels(scene: dict[str, Tensor]) -> None:
    labels = torch.full_like(scene["labels"], 255)
    for similarity in ("prototype", "max"):
        got = method.cisc_map(
            scene["query"],
            labels,
            scene["guide"],
            scene["guide_labels"],
            None,
            3,
            MethodConfig(similarity=similarity),
        )
        assert torch.equal(got, torch.ones_like(got))


def test_pair_losses_are_symmetric_and_reach_both_images(scene: dict[str, Tensor]) -> None:
    first = SegOutput(torch.randn(2, 3, 5, 7, requires_grad=True), scene["query"].float().requires_grad_())
    second = SegOutput(torch.randn(2, 3, 4, 6, requires_grad=True), scene["guide"].float().requires_grad_())
    classes = torch.tensor([[1], [0]])
    config = MethodConfig(consistency_weight=0.5)
    there = method.pair_losses(first, scene["labels"], second, scene["guide_labels"], classes, config)
    back = method.pair_losses(second, scene["guide_labels"], first, scene["labels"], classes, config)
    assert there.keys() == {"cross_entropy", "consistency"}
    for name in there:
        torch.testing.assert_close(there[name], back[name])
    whole = method.pair_losses(first, scene["labels"], second, scene["guide_labels"], classes, MethodConfig())
    torch.testing.assert_close(there["consistency"], whole["consistency"] / 2)
    torch.stack(list(there.values())).sum().backward()
    for tensor in (*first, *second):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


def test_guide_pools_keep_the_better_half_rounded_up() -> None:
    losses = {2: {10: 0.3, 11: 0.1, 12: 0.2}, 5: {7: 1.0}, 6: {1: 0.5, 0: 0.5}}
    assert method.guide_pools(losses, 0.5) == {2: [11, 12], 5: [7], 6: [0]}


def test_image_score_sums_or_means_and_ranks_images_without_classes_last() -> None:
    assert method.image_score([1.0, 3.0], "sum") == 4.0
    assert method.image_score([1.0, 3.0], "mean") == 2.0
    assert method.image_score([], "sum") == math.inf
    assert method.lowest({0: math.inf, 1: 2.0, 2: 1.0}, 2) == [2, 1]


def test_class_losses_follow_the_classes_of_their_anchors() -> None:
    features = torch.zeros(1, 2, 4, 4)
    features[0, 0, :, :2] = 1.0
    features[0, 1, :, 2:] = 1.0
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    labels[0, :, 8:] = 1
    anchors = {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([1.0, 0.0])}
    losses = method.class_losses(features, labels, anchors)
    assert list(losses) == [0, 1]
    assert losses[0] < 1.0 < losses[1]
    assert method.class_losses(features, labels, {}) == {}


def test_iou_leaves_out_classes_that_are_nowhere() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert method.class_iou(confusion) == [0.75, 0.8, None]
    assert method.mean_iou(confusion) == pytest.approx(0.775)
    assert method.mean_iou(torch.zeros(2, 2, dtype=torch.int64)) == 0.0


def test_stability_is_the_mean_over_checkpoints() -> None:
    same, other = torch.tensor([[4, 0], [0, 4]]), torch.tensor([[2, 2], [2, 2]])
    assert method.stability([same, other]) == pytest.approx((1 + 1 / 3) / 2)
