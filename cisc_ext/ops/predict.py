"""Predicted classes and their confusion matrix, without logits at label resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _library
from ._bilinear import pieces, upsample_rows
from ._implementations import implementations
from ._opaque import opaque_op, triton_body
from ._reference import accumulator
from ._workloads import Size, sizes
from .registry import Cost, Operator, Sample, Workload, choose, register

_NAME = "predict"
_MOST_CLASSES = 256
_INVALID = 255


def predict(
    logits: Tensor,  # [B,K,h,w]
    size: Sequence[int],
    labels: Tensor | None = None,  # [B,H,W] uint8, int32 or int64
    *,
    ignore_index: int = 255,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # [B,H,W] uint8, [K,K] int64 or None
    """Class of each pixel at `size`, and the confusion matrix where labels are given.

    Replaces

        up = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        classes = up.argmax(1).to(torch.uint8)
        counted = labels != ignore_index
        pair = labels[counted].long() * K + classes[counted]
        confusion = torch.bincount(pair, minlength=K * K).view(K, K)

    without the upsampled logits (159 MB for an image of Cityscapes).

    Args:
        logits: float32, bfloat16 or float16, any strides; float64 for the reference. K <= 256.
        size: (H, W) in pixels.
        labels: truth, in [0,K) or `ignore_index`.
        ignore_index: label of the pixels not counted.
        impl: "reference", "cpp", "triton", or None / "auto".

    Returns:
        Classes, ties to the lowest; and pixel counts, rows = truth, None without labels. No gradient.

    Raises:
        TypeError, ValueError: naming the argument. A label outside its range raises on the CPU; on a GPU all
            classes become 255 and nothing is counted.

    Source: the confusion matrix from which Long et al., CVPR 2015, take pixel accuracy and mean IoU.
    """
    checks.tensor(_NAME, "logits", logits, "[B,K,h,w]", checks.FEATURES)
    checks.pixels(_NAME, "logits", logits)
    num_classes = logits.shape[1]
    if not 1 <= num_classes <= _MOST_CLASSES:
        raise ValueError(
            f"{_NAME}: logits must have 1 to {_MOST_CLASSES} classes, got shape {tuple(logits.shape)}"
        )
    if not isinstance(size, Sequence):
        raise TypeError(f"{_NAME}: size must be (H, W), got {type(size).__name__}")
    if len(size) != 2:
        raise ValueError(f"{_NAME}: size must be (H, W), got {tuple(size)}")
    height, width = size
    checks.whole(_NAME, "size", height, least=0)
    checks.whole(_NAME, "size", width, least=0)
    if labels is not None:
        checks.tensor(_NAME, "labels", labels, "[B,H,W]", checks.LABELS)
        checks.sizes(_NAME, "labels", labels, (logits.shape[0], height, width), "logits and size")
        checks.same_device(_NAME, "labels", labels, "logits", logits)
    checks.whole(_NAME, "ignore_index", ignore_index)
    run = choose(_NAME, impl, logits)
    classes, confusion = run(logits.detach(), height, width, labels, ignore_index)
    return classes, None if labels is None else confusion


def _fake(
    logits: Tensor, height: int, width: int, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    num_classes = logits.shape[1]
    return (
        torch.empty((logits.shape[0], height, width), dtype=torch.uint8, device=logits.device),
        torch.empty(
            (0,) if labels is None else (num_classes, num_classes), dtype=torch.int64, device=logits.device
        ),
    )


_SCHEMA = (
    "(Tensor logits, SymInt height, SymInt width, Tensor? labels, int ignore_index) "
    "-> (Tensor classes, Tensor confusion)"
)


@opaque_op(f"{_NAME}_reference", _SCHEMA, _fake)
def _reference(
    logits: Tensor, height: int, width: int, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    num_classes = logits.shape[1]
    invalid = None if labels is None else checks.label_values(_NAME, labels, num_classes, ignore_index)
    classes, confusion = _fake(logits, height, width, labels, ignore_index)
    counts = confusion.zero_().view(-1)
    dtype = accumulator(logits)
    for b in range(logits.shape[0]):
        for start, stop in pieces(height, num_classes * width * dtype.itemsize):
            best = upsample_rows(logits[b], (height, width), True, start, stop, dtype).argmax(0)
            classes[b, start:stop] = best
            if labels is not None:
                truth = labels[b, start:stop].to(torch.int64)
                counted = (truth != ignore_index) & (truth >= 0) & (truth < num_classes)
                pair = torch.where(counted, truth * num_classes + best, 0)
                counts.index_add_(0, pair.flatten(), counted.flatten().to(torch.int64))
    if invalid is not None:
        classes = torch.where(invalid, torch.full_like(classes, _INVALID), classes)
        confusion = torch.where(invalid, torch.zeros_like(confusion), confusion)
    return classes, confusion


_triton = opaque_op(f"{_NAME}_triton", _SCHEMA, _fake)(triton_body(_NAME, "forward"))
_library.register(_NAME, _fake)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(19)
    for name, (b, k, h, w, height, width) in {
        "square": (2, 5, 9, 9, 33, 33),
        "odd": (1, 19, 5, 7, 22, 31),
        "one_pixel": (1, 3, 1, 1, 7, 3),
        "one_class": (1, 1, 3, 3, 7, 3),
        "many_classes": (1, 256, 2, 3, 7, 3),
        "down": (1, 3, 9, 8, 4, 5),
        "no_images": (0, 3, 4, 4, 9, 9),
    }.items():
        labels = torch.randint(0, k, (b, height, width), generator=generator)
        labels[torch.rand(b, height, width, generator=generator) < 0.2] = -1
        yield Sample(
            name,
            {
                "logits": torch.randn(b, k, h, w, generator=generator, dtype=torch.float64),
                "size": (height, width),
                "labels": labels,
                "ignore_index": -1,
            },
        )


def _workloads() -> Iterator[Workload]:
    for size, ladder in sizes():

        def make(size: Size = size) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(19)
            labels = size.labels(generator)
            return {"logits": size.logits(generator), "size": labels.shape[1:], "labels": labels}

        dtypes = ("float32",) if ladder else ("float32", "bfloat16")
        yield Workload(size.name, size.shape(), make, ("forward",), dtypes, ladder=ladder)


def _cost(inputs: dict[str, Any], passes: str) -> Cost:
    logits, (height, width), labels = inputs["logits"], inputs["size"], inputs.get("labels")
    pixels = logits.shape[0] * height * width
    # Interpolation, comparison, and choice of the index.
    return Cost(
        flops=5 * pixels * logits.shape[1],
        bytes=logits.nbytes + pixels + (0 if labels is None else labels.nbytes),
    )


register(
    Operator(
        name=_NAME,
        function=predict,
        implementations=implementations(
            _NAME, cpp=_library.compiled(_NAME), triton=_triton, reference=_reference
        ),
        samples=_samples,
        cost=_cost,
        workloads=_workloads,
        features=("logits",),
    )
)
