"""The operators once more, naively: every intermediate in full, one line of plain torch after the other.

They take an operator's arguments at any precision, never call `cisc_ext`, and give what it gives.
`MAGNITUDES` are the sizes of what is rounded on the way: the same computations on absolute values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """nearest-exact: output i takes the input in which its centre lies; on a border the one behind it."""
    rows = [(2 * i + 1) * labels.shape[1] // (2 * size[0]) for i in range(size[0])]
    columns = [(2 * i + 1) * labels.shape[2] // (2 * size[1]) for i in range(size[1])]
    return labels.long()[:, rows][:, :, columns]


def one_hot(labels: Tensor, classes: Tensor) -> Tensor:
    """1[labels = class], [B,S,H,W] bool."""
    return (labels.long()[:, None] == classes.long()[..., None, None]) & (classes >= 0)[..., None, None]


def masked_average_pool(features: Tensor, labels: Tensor, classes: Tensor, eps: float = 5e-4) -> Tensor:
    up = upsample(features, (labels.shape[1], labels.shape[2]), False)
    mask = one_hot(labels, classes).to(up.dtype)
    return torch.einsum("bchw,bshw->bsc", up, mask) / (mask.sum((2, 3)) + eps)[..., None]


def unit(x: Tensor, dim: int, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    small = norm < eps
    return torch.where(small, 0.0, x / torch.where(small, 1.0, norm))


def prototype_similarity(query: Tensor, prototypes: Tensor, eps: float = 1e-8) -> Tensor:
    return torch.einsum("bchw,bsc->bshw", unit(query, 1, eps), unit(prototypes, 2, eps))


def cross_similarity(
    query: Tensor,
    guide: Tensor,
    guide_labels: Tensor,
    classes: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    reduction: str = "max",
    k: int = 8,
    temperature: float = 0.07,
    ignore_index: int = 255,
    return_index: bool = False,
    eps: float = 1e-8,
) -> Any:
    h, w = query.shape[2:]
    q, g = unit(query, 1, eps).flatten(2), unit(guide, 1, eps).flatten(2)
    cosine = torch.einsum("bcn,bcm->bnm", q, g)[:, None]  # [B,1,n,m]
    label = nearest(guide_labels, (guide.shape[2], guide.shape[3])).flatten(1)[:, None, None, :]
    if classes is not None:
        wanted = classes.long()[:, :, None, None]
        member = (label == wanted) & (wanted >= 0)  # [B,S,1,m]
    else:
        assert query_labels is not None
        own = nearest(query_labels, (h, w)).flatten(1)[:, None, :, None]
        member = (label == own) & (own != ignore_index)  # [B,1,n,m]
    inside = cosine.masked_fill(~member, -torch.inf)  # [B,S,n,m]
    some = member.any(-1)
    if reduction == "max":
        value = inside.amax(-1)
    elif reduction == "topk":
        best = inside.topk(min(k, inside.shape[-1]), -1).values
        found = best != -torch.inf
        value = torch.where(found, best, 0).sum(-1) / found.sum(-1).clamp(min=1)
    elif reduction == "softmax":
        filled = torch.where(some[..., None], inside, 0)
        value = (filled / temperature).softmax(-1).mul(torch.where(member, cosine, 0)).sum(-1)
    else:
        value = torch.where(member, cosine, 0).sum(-1) / member.sum(-1).clamp(min=1)
    value = torch.where(some, value, 0).unflatten(-1, (h, w))
    if not return_index:
        return value
    top = inside.max(-1, keepdim=True).values
    first = torch.where(inside == top, 1, 0).argmax(-1)
    return value, torch.where(some, first, -1).unflatten(-1, (h, w))


def map_pixels(up: Tensor, labels: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Loss of each pixel [B,H,W] from maps at label resolution, 0 where it is ignored."""
    p = up.clamp(0, 1)
    loss = F.binary_cross_entropy(p, one_hot(labels, classes).to(p.dtype), reduction="none")
    valid = (classes >= 0)[..., None, None]
    pixel = torch.where(valid, loss, 0).sum(1) / valid.sum(1).clamp(min=1)
    return torch.where(labels.long() != ignore_index, pixel, 0)


def map_consistency(similarity: Tensor, labels: Tensor, classes: Tensor, ignore_index: int = 255) -> Tensor:
    up = upsample(similarity, (labels.shape[1], labels.shape[2]), False)
    count = (labels.long() != ignore_index).sum().clamp(min=1)
    return map_pixels(up, labels, classes, ignore_index).sum() / count


def weight(labels: Tensor, similarity: Tensor | None, classes: Tensor | None) -> Tensor | float:
    if similarity is None:
        return 1.0
    return weight_of(
        upsample(similarity.detach(), (labels.shape[1], labels.shape[2]), False), labels, classes
    )


def weight_of(up: Tensor, labels: Tensor, classes: Tensor | None) -> Tensor:
    """Weight of each pixel [B,H,W] from maps at label resolution."""
    s = up.clamp(0, 1)
    if classes is None:
        return s[:, 0]
    valid = (classes >= 0)[..., None, None]
    gap = torch.where(valid, (one_hot(labels, classes).to(s.dtype) - s).abs(), 0)
    return 1 - gap.sum(1) / valid.sum(1).clamp(min=1)


def kept_by_ohem(probability: Tensor, valid: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Hard pixels, by sorting all probabilities of valid pixels."""
    ordered = probability[valid].sort().values
    if len(ordered) < min_kept:
        return valid
    limit = threshold if min_kept == 0 else max(threshold, float(ordered[min_kept - 1]))
    return valid & (probability <= limit)


def rectified_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    similarity: Tensor | None = None,
    classes: Tensor | None = None,
    *,
    ignore_index: int = 255,
    reduction: str = "mean",
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 100000,
    pixel_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    up = upsample(logits, (labels.shape[1], labels.shape[2]), True)
    kept = labels.long() != ignore_index
    index = torch.where(kept, labels.long(), 0)
    loss = (pixel_loss or (lambda a, b: F.cross_entropy(a, b, reduction="none")))(up, index)
    if ohem_threshold is not None:
        probability = up.detach().softmax(1).gather(1, index[:, None])[:, 0]
        kept = kept_by_ohem(probability, kept, ohem_threshold, ohem_min_kept)
    loss = torch.where(kept, loss * weight(labels, similarity, classes), 0)
    if reduction == "none":
        return loss
    if reduction == "valid_mean":
        return loss.sum() / kept.sum().clamp(min=1)
    return loss.sum() / (max(labels.numel(), 1) if reduction == "mean" else 1)


def predict(
    logits: Tensor, size: tuple[int, int], labels: Tensor | None = None, *, ignore_index: int = 255
) -> tuple[Tensor, Tensor | None]:
    best = upsample(logits, size, True).argmax(1)
    if labels is None:
        return best.to(torch.uint8), None
    num_classes = logits.shape[1]
    counted = labels.long() != ignore_index
    pair = labels.long()[counted] * num_classes + best[counted]
    confusion = torch.bincount(pair, minlength=num_classes**2).view(num_classes, num_classes)
    return best.to(torch.uint8), confusion


ORACLES: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        masked_average_pool,
        prototype_similarity,
        cross_similarity,
        map_consistency,
        rectified_cross_entropy,
        predict,
    )
}


def _on_absolute_values(oracle: Callable[..., Any]) -> Callable[..., Any]:
    def magnitude(**inputs: Any) -> Any:
        values = {
            name: value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        result = oracle(**values)
        return result[0] if isinstance(result, tuple) else result

    return magnitude


def _cross_entropy_magnitude(**inputs: Any) -> Tensor:
    """|log-sum-exp| + |logit| of each pixel."""
    inputs["logits"] = inputs["logits"].abs()
    return rectified_cross_entropy(
        **inputs, pixel_loss=lambda up, _: 2 * up.amax(1) + up.new_tensor(up.shape[1]).log()
    )


MAGNITUDES: dict[str, Callable[..., Any]] = {
    "masked_average_pool": _on_absolute_values(masked_average_pool),
    "prototype_similarity": _on_absolute_values(prototype_similarity),
    "cross_similarity": _on_absolute_values(cross_similarity),
    "map_consistency": map_consistency,  # a sum of terms >= 0
    "rectified_cross_entropy": _cross_entropy_magnitude,
}
