"""The method, CISC-R, in pure functions: losses, the CISC map, and the choice of guides and reliable images.

Source of all of it: Wu et al., "Querying Labeled for Unlabeled: Cross-Image Semantic Consistency Guided
Semi-Supervised Semantic Segmentation", TPAMI 2023, doi 10.1109/TPAMI.2022.3233584. `stpp` functions: Yang et
al., "ST++: Make Self-Training Work Better for Semi-Supervised Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cisc_ext import ops
from cisc_ext.config import MethodConfig
from cisc_ext.models import SegOutput

IGNORE_INDEX = 255


def labeled_loss(output: SegOutput, labels: Tensor, config: MethodConfig) -> Tensor:
    """Cross-entropy of a labeled batch, mean over the pixels that count.

    output  logits [B,K,h,w]
    labels  [B,H,W] uint8
    """
    loss: Tensor = ops.rectified_cross_entropy(
        output.logits,
        labels,
        ignore_index=IGNORE_INDEX,
        reduction="valid_mean",
        ohem_threshold=config.ohem_threshold,
        ohem_min_kept=config.ohem_min_kept,
    )
    return loss


def pseudo_labeled_loss(output: SegOutput, labels: Tensor) -> Tensor:
    """ST++: plain cross-entropy with pseudo labels [B,H,W], mean over the pixels that count."""
    loss: Tensor = ops.rectified_cross_entropy(
        output.logits, labels, ignore_index=IGNORE_INDEX, reduction="valid_mean"
    )
    return loss


def consistency_loss(
    features: Tensor,  # [B,C,h,w]
    labels: Tensor,  # [B,H,W]
    guide: Tensor,  # [B,C,h',w']
    guide_labels: Tensor,  # [B,H',W']
    classes: Tensor,  # [B,S], -1 = none
) -> Tensor:
    """Consistency of an image's labels with its similarity to the guide's class prototypes; gradient to
    both."""
    prototypes = ops.masked_average_pool(guide, guide_labels, classes)
    similarity = ops.prototype_similarity(features, prototypes)
    loss: Tensor = ops.map_consistency(similarity, labels, classes, ignore_index=IGNORE_INDEX)
    return loss


def pair_losses(
    first: SegOutput,
    labels: Tensor,
    second: SegOutput,
    guide_labels: Tensor,
    classes: Tensor,
    config: MethodConfig,
) -> dict[str, Tensor]:
    """Stage 1, a pair of labeled images: cross-entropy of each, and consistency with the other, by name."""
    forth = consistency_loss(first.features, labels, second.features, guide_labels, classes)
    back = consistency_loss(second.features, guide_labels, first.features, labels, classes)
    return {
        "cross_entropy": labeled_loss(first, labels, config) + labeled_loss(second, guide_labels, config),
        "consistency": config.consistency_weight * (forth + back),
    }


def cisc_map(
    query: Tensor,  # [B,C,h,w], the teacher's features
    labels: Tensor,  # [B,H,W], pseudo labels
    guide: Tensor,  # [B,C,h',w']
    guide_labels: Tensor,  # [B,H',W']
    classes: Tensor | None,  # [B,S], -1 = none; None: each pixel against its own label
    num_classes: int,
    config: MethodConfig,
) -> Tensor:  # [B,S,h,w], S = 1 without classes
    """Stages 4 and 6: how alike each query pixel is to the guide's pixels of the shared classes.

    Without `classes`, to those of its own label: 1 where the guide has none, so that nothing is held against
    it.
    """
    if classes is None:
        return _own_label_map(query, labels, guide, guide_labels, num_classes, config)
    similarity: Tensor
    if config.similarity == "prototype":
        prototypes = ops.masked_average_pool(guide, guide_labels, classes)
        similarity = ops.prototype_similarity(query, prototypes)
    else:
        similarity = ops.cross_similarity(query, guide, guide_labels, classes, **_pixel_settings(config))
    return similarity


def _own_label_map(
    query: Tensor, labels: Tensor, guide: Tensor, guide_labels: Tensor, num_classes: int, config: MethodConfig
) -> Tensor:
    if config.similarity == "prototype":
        every = torch.arange(num_classes, device=query.device).expand(len(query), -1)
        prototypes = ops.masked_average_pool(guide, guide_labels, every)
        similarity = ops.prototype_similarity(query, prototypes)
        size = query.shape[2:]
        own = F.interpolate(labels[:, None].float(), size, mode="nearest-exact").long()  # [B,1,h,w]
        own_class = own.clamp(max=num_classes - 1)
        present = torch.stack([(guide_labels == c).flatten(1).any(1) for c in range(num_classes)], 1)  # [B,K]
        found = present.gather(1, own_class.flatten(1)).view_as(own) & (own < num_classes)
        return torch.where(found, similarity.gather(1, own_class), 1.0)
    similarity, index = ops.cross_similarity(
        query, guide, guide_labels, query_labels=labels, return_index=True, **_pixel_settings(config)
    )
    return torch.where(index < 0, 1.0, similarity)


def _pixel_settings(config: MethodConfig) -> dict[str, object]:
    return {"reduction": config.similarity, "k": config.topk, "temperature": config.temperature}


def rectified_loss(output: SegOutput, labels: Tensor, similarity: Tensor, classes: Tensor | None) -> Tensor:
    """Cross-entropy with pseudo labels, each pixel weighted by its agreement with the CISC map [B,S,h,w]."""
    loss: Tensor = ops.rectified_cross_entropy(
        output.logits, labels, similarity, classes, ignore_index=IGNORE_INDEX
    )
    return loss


def image_prototypes(features: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Prototypes [S,C] of some classes of one image: features [1,C,h,w], labels [1,H,W]."""
    prototypes: Tensor = ops.masked_average_pool(features, labels, _classes(classes, features))
    return prototypes[0]


def class_losses(features: Tensor, labels: Tensor, anchors: Mapping[int, Tensor]) -> dict[int, float]:
    """Stage 3: consistency loss of one image [1,C,h,w] against the anchor [C] of each class it shows."""
    if not anchors:
        return {}
    similarity = ops.prototype_similarity(features, torch.stack(list(anchors.values()))[None])
    losses = [
        ops.map_consistency(
            similarity[:, s : s + 1], labels, _classes([c], features), ignore_index=IGNORE_INDEX
        )
        for s, c in enumerate(anchors)
    ]
    return dict(zip(anchors, torch.stack(losses).tolist(), strict=True))


def _classes(classes: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([list(classes)], dtype=torch.int64, device=like.device)


def guide_pools(losses: Mapping[int, Mapping[int, float]], share: float) -> dict[int, list[int]]:
    """Stage 3: for each class the labeled images with the lowest losses, ceil(share * n) of its n.

    losses  class -> image -> consistency loss against the class anchor
    """
    return {c: lowest(images, math.ceil(share * len(images))) for c, images in losses.items()}


def image_score(losses: Iterable[float], ranking: str) -> float:
    """One number for an unlabeled image, from the losses of its classes: "sum" or "mean"; inf without any.

    An image that shows no class with an anchor has nothing that speaks for it, so it ranks last.
    """
    values = list(losses)
    if not values:
        return math.inf
    return sum(values) if ranking == "sum" else sum(values) / len(values)


def lowest(scores: Mapping[int, float], count: int) -> list[int]:
    """The `count` keys with the lowest values, in the order of the values, ties in the order of the keys."""
    return sorted(scores, key=lambda key: (scores[key], key))[:count]


def class_iou(confusion: Tensor) -> list[float | None]:
    """Intersection over union of each class from pixel counts [K,K]; None where truth and prediction lack
    it."""
    counts = confusion.to(torch.float64)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return [
        float(i / u) if u > 0 else None
        for i, u in zip(counts.diagonal().tolist(), union.tolist(), strict=True)
    ]


def mean_iou(confusion: Tensor) -> float:
    """Mean of `class_iou` over the classes that have one, as a fraction; 0 where none has."""
    values = [value for value in class_iou(confusion) if value is not None]
    return sum(values) / len(values) if values else 0.0


def stability(confusions: Sequence[Tensor]) -> float:
    """ST++: mean over earlier checkpoints of the mIoU of their prediction with the last one's."""
    return sum(map(mean_iou, confusions)) / len(confusions)
