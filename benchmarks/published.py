"""The published arithmetic, which the operators replace: features, maps and logits at label resolution.

One class per image, -1 for none. Any float dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AREA_EPS = 5e-4
IGNORE_INDEX = 255


def class_mask(
    labels: Tensor,  # [B,H,W]
    classes: Tensor,  # [B,1]
    like: Tensor,
) -> Tensor:  # [B,1,H,W]
    """1[labels = class], in the dtype of `like`."""
    return (labels[:, None] == classes[:, :, None, None]).to(like.dtype)


def prototype(
    features: Tensor,  # [B,C,h,w]
    labels: Tensor,  # [B,H,W]
    classes: Tensor,  # [B,1]
) -> Tensor:  # [B,C]
    """Masked average of the features upsampled to the labels' size."""
    mask = class_mask(labels, classes, features)
    up = F.interpolate(features, labels.shape[-2:], mode="bilinear", align_corners=False)
    return (up * mask).sum((2, 3)) / (mask.sum((2, 3)) + AREA_EPS)


def cisc_map(
    query: Tensor,  # [B,C,h,w]
    proto: Tensor,  # [B,C]
    size: torch.Size,
) -> Tensor:  # [B,1,H,W]
    """Cosine of each pixel with the prototype, upsampled to `size`."""
    similarity = F.cosine_similarity(query, proto[:, :, None, None], dim=1)[:, None]
    return F.interpolate(similarity, size, mode="bilinear", align_corners=False)


def map_loss(
    similarity: Tensor,  # [B,1,H,W]
    labels: Tensor,  # [B,H,W]
    classes: Tensor,  # [B,1]
) -> Tensor:  # scalar
    """Binary cross-entropy of a CISC map, mean over the pixels that are not ignored."""
    mask = class_mask(labels, classes, similarity)
    loss = F.binary_cross_entropy(similarity.clamp(0, 1), mask, reduction="none")[:, 0]
    return loss[labels != IGNORE_INDEX].mean()


def consistency(
    query: Tensor,  # [B,C,h,w]
    guide: Tensor,  # [B,C,h,w]
    query_labels: Tensor,  # [B,H,W]
    guide_labels: Tensor,  # [B,H,W]
    classes: Tensor,  # [B,1]
) -> Tensor:  # scalar
    """Loss of either image's map against the other's prototype."""
    of_guide, of_query = prototype(guide, guide_labels, classes), prototype(query, query_labels, classes)
    on_query = cisc_map(query, of_guide, query_labels.shape[-2:])
    on_guide = cisc_map(guide, of_query, guide_labels.shape[-2:])
    return map_loss(on_query, query_labels, classes) + map_loss(on_guide, guide_labels, classes)


def rectified(
    logits: Tensor,  # [B,K,h,w]
    labels: Tensor,  # [B,H,W]
    similarity: Tensor,  # [B,1,H,W]
    classes: Tensor,  # [B,1]
) -> Tensor:  # scalar
    """Cross-entropy of upsampled logits times 1 - |mask - map|, mean over all pixels."""
    up = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=True)
    loss = F.cross_entropy(up, labels.long(), ignore_index=IGNORE_INDEX, reduction="none")
    weight = 1 - (class_mask(labels, classes, similarity) - similarity.clamp(0, 1)).abs()
    return (loss * weight[:, 0].detach()).mean()
