"""Consistency loss: binary cross-entropy between CISC maps and labels, without maps at label resolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _library
from ._bilinear import add_adjoint_rows, pieces, upsample_rows
from ._implementations import implementations
from ._opaque import opaque_op, triton_body
from ._reference import accumulator, scaled_gradient
from ._workloads import Size, sizes
from .registry import Cost, Operator, Sample, Workload, choose, register

_NAME = "map_consistency"
_LOG_FLOOR = -100.0


def map_consistency(
    similarity: Tensor,  # [B,S,h,w]
    labels: Tensor,  # [B,H,W] uint8, int32 or int64
    classes: Tensor,  # [B,S] int32 or int64, -1 = none
    *,
    ignore_index: int = 255,
    impl: str | None = None,
) -> Tensor:  # scalar
    """Binary cross-entropy of the upsampled CISC maps against 1[labels = class].

    Replaces

        size = labels.shape[-2:]
        p = F.interpolate(similarity, size, mode="bilinear", align_corners=False).clamp(0, 1)
        target = (labels[:, None] == classes[..., None, None]).to(p.dtype)
        loss = F.binary_cross_entropy(p, target, reduction="none")  # logs floored at -100
        valid = (classes >= 0)[..., None, None]
        pixel = (loss * valid).sum(1) / valid.sum(1).clamp(min=1)
        loss = (pixel * (labels != ignore_index)).sum() / (labels != ignore_index).sum()

    An image without a valid class adds 0, and its pixels count. The mean over no pixel is 0. Nothing of size
    S x H x W exists; the gradient is computed in the forward pass when it is needed.

    Args:
        similarity: float32, bfloat16 or float16, any strides; float64 for the reference. Its gradient is 0
            where the upsampled value lies outside the open interval (0,1).
        labels: class of each pixel at full resolution.
        classes: class of each map.
        ignore_index: label of the pixels to leave out.
        impl: "reference", "cpp", "triton", or None / "auto".

    Returns:
        The loss, dimensionless, in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument. A class below -1 raises on the CPU, gives NaN on a GPU.

    Source: Wu et al., TPAMI 2023, the consistency loss of the first stage.
    """
    checks.tensor(_NAME, "similarity", similarity, "[B,S,h,w]", checks.FEATURES)
    checks.tensor(_NAME, "labels", labels, "[B,H,W]", checks.LABELS)
    checks.tensor(_NAME, "classes", classes, "[B,S]", checks.CLASSES)
    checks.sizes(_NAME, "labels", labels, (similarity.shape[0], None, None), "similarity")
    checks.sizes(_NAME, "classes", classes, tuple(similarity.shape[:2]), "similarity")
    checks.pixels(_NAME, "similarity", similarity)
    checks.same_device(_NAME, "labels", labels, "similarity", similarity)
    checks.same_device(_NAME, "classes", classes, "similarity", similarity)
    checks.whole(_NAME, "ignore_index", ignore_index)
    need_grad = similarity.requires_grad and torch.is_grad_enabled()
    loss: Tensor = choose(_NAME, impl, similarity)(similarity, labels, classes, ignore_index, need_grad)[0]
    return loss


def _fake(
    similarity: Tensor, labels: Tensor, classes: Tensor, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(similarity)
    shape = similarity.shape if need_grad else (0,)
    return (
        torch.empty((), dtype=dtype, device=similarity.device),
        torch.empty(shape, dtype=dtype, device=similarity.device),
    )


_SCHEMA = (
    "(Tensor similarity, Tensor labels, Tensor classes, int ignore_index, bool need_grad) "
    "-> (Tensor loss, Tensor grad)"
)


@opaque_op(f"{_NAME}_reference", _SCHEMA, _fake)
def _reference(
    similarity: Tensor, labels: Tensor, classes: Tensor, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    invalid = checks.class_values(_NAME, classes)
    dtype, device = accumulator(similarity), similarity.device
    batch, slots, h, w = similarity.shape
    height, width = labels.shape[1:]
    total = torch.zeros((), dtype=torch.float64, device=device)
    pixels = torch.zeros((), dtype=torch.int64, device=device)
    grad = torch.zeros((batch, slots, h, w) if need_grad else (0,), dtype=dtype, device=device)
    share = (classes >= 0).to(dtype)
    share = share / share.sum(1, keepdim=True).clamp_(min=1)
    for b in range(batch):
        for start, stop in pieces(height, width * torch.int64.itemsize):
            truth = labels[b, start:stop].to(torch.int64)
            kept = truth != ignore_index
            pixels += kept.sum()
            for s in range(slots):
                p = upsample_rows(similarity[b, s], (height, width), False, start, stop, dtype)
                # log p where the label is the class, log(1 - p) elsewhere; clamp keeps NaN.
                positive = truth == classes[b, s]
                probability = torch.where(positive, p, 1 - p)
                log = torch.where(positive, p.clamp(0, 1).log(), torch.log1p(-p.clamp(0, 1)))
                counted = kept & (classes[b, s] >= 0)
                total += (
                    torch.where(counted, -log.clamp(min=_LOG_FLOOR), 0).sum(dtype=torch.float64) * share[b, s]
                )
                if need_grad:
                    inside = counted & ~(p <= 0) & ~(p >= 1) & ~(log < _LOG_FLOOR)
                    slope = torch.where(positive, -share[b, s], share[b, s]) / probability
                    slope = torch.where(inside, slope, 0)
                    add_adjoint_rows(grad[b, s], slope, (height, width), False, start, stop)
    count = checks.poison(pixels.clamp(min=1).to(torch.float64), invalid)
    return (total / count).to(dtype), grad.div_(count)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    saved, similarity = ctx.saved_tensors
    return scaled_gradient(saved, grad, similarity), None, None, None, None


_reference.register_autograd(_backward, setup_context=_save)
_triton = opaque_op(f"{_NAME}_triton", _SCHEMA, _fake)(triton_body(_NAME, "forward"))
_triton.register_autograd(_backward, setup_context=_save)
_library.register(_NAME, _fake, _backward, _save)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(13)
    for name, (b, s, h, w, height, width) in {
        "one_class": (2, 1, 9, 9, 33, 33),
        "odd": (3, 3, 5, 7, 22, 31),
        "one_pixel": (1, 2, 1, 1, 7, 3),
        "down": (1, 2, 9, 8, 4, 5),
        "no_classes": (1, 0, 3, 3, 7, 7),
        "no_images": (0, 2, 3, 3, 7, 7),
    }.items():
        labels = torch.randint(0, 5, (b, height, width), generator=generator).to(torch.uint8)
        labels[torch.rand(b, height, width, generator=generator) < 0.2] = 255
        classes = torch.randint(0, 5, (b, s), generator=generator)
        if b > 1 and s > 1:
            classes[0], classes[1, -1] = -1, -1
        yield Sample(
            name,
            {
                "similarity": torch.randn(b, s, h, w, generator=generator, dtype=torch.float64) * 0.5 + 0.4,
                "labels": labels,
                "classes": classes,
            },
        )


def _workloads() -> Iterator[Workload]:
    for size, ladder in sizes():
        for slots in (1, 4) if size.name == "cityscapes" else (1,):

            def make(size: Size = size, slots: int = slots) -> dict[str, Any]:
                generator = torch.Generator().manual_seed(13)
                return {
                    "similarity": torch.rand(size.batch, slots, *size.low, generator=generator),
                    "labels": size.labels(generator),
                    "classes": torch.arange(slots).expand(size.batch, -1).contiguous(),
                }

            name = size.name if slots == 1 else f"{size.name}_four_classes"
            passes = ("both",) if ladder else ("forward", "both")
            dtypes = ("float32",) if ladder or slots > 1 else ("float32", "bfloat16")
            yield Workload(name, {**size.shape(), "S": slots}, make, passes, dtypes, ladder=ladder)


def _cost(inputs: dict[str, Any], passes: str) -> Cost:
    similarity, labels = inputs["similarity"], inputs["labels"]
    values = labels.numel() * similarity.shape[1]
    # Interpolation, a logarithm and the sum; then a division, its sign and the adjoint of the interpolation.
    forward, gradient = 3 + 12 + 2, 2 + 3
    return {
        "forward": Cost(forward * values, similarity.nbytes + labels.nbytes),
        "backward": Cost(similarity.numel(), 2 * similarity.nbytes),
        "both": Cost((forward + gradient) * values, 2 * similarity.nbytes + labels.nbytes),
    }[passes]


register(
    Operator(
        name=_NAME,
        function=map_consistency,
        implementations=implementations(
            _NAME, cpp=_library.compiled(_NAME), triton=_triton, reference=_reference
        ),
        samples=_samples,
        cost=_cost,
        workloads=_workloads,
        differentiable=("similarity",),
        features=("similarity",),
    )
)
