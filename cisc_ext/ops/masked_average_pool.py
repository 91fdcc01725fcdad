"""Prototypes: average features over a class, without upsampled features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _library
from ._bilinear import add_adjoint_rows, in_a_piece, outputs_of, pieces
from ._implementations import implementations
from ._opaque import opaque_op, triton_body
from ._reference import accumulator, part, pixel_ranges, set_part
from ._workloads import Size, sizes
from .registry import Cost, Operator, Sample, Workload, choose, register

_NAME = "masked_average_pool"


def masked_average_pool(
    features: Tensor,  # [B,C,h,w]
    labels: Tensor,  # [B,H,W] uint8, int32 or int64
    classes: Tensor,  # [B,S] int32 or int64, -1 = none
    *,
    eps: float = 5e-4,
    impl: str | None = None,
) -> Tensor:  # [B,S,C]
    """Average the features of each class over the pixels that bear its label.

    Replaces

        up = F.interpolate(features, labels.shape[-2:], mode="bilinear", align_corners=False)
        mask = (labels[:, None] == classes[..., None, None]).to(up.dtype)  # [B,S,H,W]
        prototypes = torch.einsum("bchw,bshw->bsc", up, mask) / (mask.sum((2, 3)) + eps)[..., None]

    Upsampling is linear: the same sum is that of `features` weighted by the adjoint of the upsampling of
    `mask`. Neither `up` (532 MB per image at 721 x 721 with 256 channels of float32) nor the masks of all
    classes exist.

    Args:
        features: float32, bfloat16 or float16, any strides; float64 for the reference.
        labels: class of each pixel of the full resolution, any values. Same device as `features`.
        classes: the classes to average over. -1 gives zeros.
        eps: added to the number of pixels; in pixels.
        impl: "reference", "cpp", "triton", or None / "auto".

    Returns:
        Prototypes in float32 (float64 for float64). A class without pixels gives zeros. A non-finite feature
        reaches the classes to which it contributes, no others. Gradient to `features`.

    Raises:
        TypeError, ValueError: naming the argument. A class below -1 raises on the CPU, gives NaN on a GPU.

    Source: Wu et al., TPAMI 2023, masked average pooling of the class prototype.
    """
    checks.tensor(_NAME, "features", features, "[B,C,h,w]", checks.FEATURES)
    checks.tensor(_NAME, "labels", labels, "[B,H,W]", checks.LABELS)
    checks.tensor(_NAME, "classes", classes, "[B,S]", checks.CLASSES)
    batch = features.shape[0]
    checks.sizes(_NAME, "labels", labels, (batch, None, None), "features")
    checks.sizes(_NAME, "classes", classes, (batch, None), "features")
    checks.pixels(_NAME, "features", features)
    checks.same_device(_NAME, "labels", labels, "features", features)
    checks.same_device(_NAME, "classes", classes, "features", features)
    checks.number(_NAME, "eps", eps, least=0.0, strict=True)
    prototypes: Tensor = choose(_NAME, impl, features)(features, labels, classes, float(eps))
    return prototypes


def _adjoint_mask(
    labels: Tensor, target: Tensor, h: int, w: int, dtype: torch.dtype, first: int, last: int
) -> Tensor:
    """Pixels first..last of the adjoint of the upsampling of 1[labels = target] of one image."""
    height, width = labels.shape
    weight = torch.zeros(h, w, dtype=dtype, device=labels.device)
    begin, end = outputs_of(h, height, False, first // w, (last - 1) // w + 1)
    for start, stop in pieces(end - begin, width * torch.int64.itemsize):
        rows = slice(begin + start, begin + stop)
        mask = (labels[rows].to(torch.int64) == target) & (target >= 0)
        add_adjoint_rows(weight, mask.to(dtype), (height, width), False, rows.start, rows.stop)
    return part(weight[None], first, last)[0]


def _pixels(labels: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """How many pixels of one image bear each of the targets, [S]."""
    counts = torch.zeros(targets.shape, dtype=torch.int64, device=labels.device)
    for start, stop in pieces(labels.shape[0], labels.shape[1] * torch.int64.itemsize):
        values = labels[start:stop].to(torch.int64)
        for s in range(len(targets)):
            counts[s] += ((values == targets[s]) & (targets[s] >= 0)).sum()
    return counts.to(dtype)


def _fake(features: Tensor, labels: Tensor, classes: Tensor, eps: float) -> Tensor:
    shape = (*classes.shape, features.shape[1])
    return torch.empty(shape, dtype=accumulator(features), device=features.device)


_SCHEMA = "(Tensor features, Tensor labels, Tensor classes, float eps) -> Tensor"


@opaque_op(f"{_NAME}_reference", _SCHEMA, _fake)
def _reference(features: Tensor, labels: Tensor, classes: Tensor, eps: float) -> Tensor:
    invalid = checks.class_values(_NAME, classes)
    dtype = accumulator(features)
    batch, channels, h, w = features.shape
    prototypes = torch.zeros(batch, classes.shape[1], channels, dtype=dtype, device=features.device)
    for b in range(batch):
        for first, last in pixel_ranges(h, w, in_a_piece(channels * dtype.itemsize)):
            pixels = part(features[b], first, last).to(dtype)
            for s in range(classes.shape[1]):
                weight = _adjoint_mask(labels[b], classes[b, s], h, w, dtype, first, last)
                prototypes[b, s] += torch.where(weight > 0, pixels, torch.zeros_like(weight)) @ weight
        prototypes[b] /= (_pixels(labels[b], classes[b], dtype) + eps)[:, None]
    return checks.poison(prototypes, invalid)


def _fake_backward(
    grad: Tensor, labels: Tensor, classes: Tensor, h: int, w: int, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch.empty((grad.shape[0], grad.shape[2], h, w), dtype=dtype, device=grad.device)


_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor labels, Tensor classes, SymInt h, SymInt w, float eps, ScalarType dtype) -> Tensor"
)


@opaque_op(f"{_NAME}_reference_backward", _BACKWARD_SCHEMA, _fake_backward)
def _reference_backward(
    grad: Tensor, labels: Tensor, classes: Tensor, h: int, w: int, eps: float, dtype: torch.dtype
) -> Tensor:
    batch, slots, channels = grad.shape
    result = torch.zeros(batch, channels, h, w, dtype=dtype, device=grad.device)
    for b in range(batch if slots else 0):
        scaled = grad[b] / (_pixels(labels[b], classes[b], grad.dtype) + eps)[:, None]
        for first, last in pixel_ranges(h, w, in_a_piece(channels * grad.itemsize)):
            pixels = grad.new_zeros(channels, last - first)
            for s in range(slots):
                weight = _adjoint_mask(labels[b], classes[b, s], h, w, grad.dtype, first, last)
                # Where a class has no weight its gradient is nothing, be it inf or NaN.
                pixels += torch.where(weight > 0, scaled[s, :, None] * weight, 0)
            set_part(result[b], first, last, pixels)
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, labels, classes, eps = inputs
    ctx.save_for_backward(labels, classes)
    ctx.rest = (*features.shape[2:], eps, features.dtype)


def _save_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, labels, classes, _, _, ctx.eps, _ = inputs
    ctx.save_for_backward(labels, classes)


def _gradients(
    forward: Callable[..., Tensor], backward: Callable[..., Tensor]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The gradient of an implementation, and that of its gradient."""

    def once(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None

    def twice(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The average is linear in the features: the adjoint of its adjoint is itself.
        return forward(grad, *ctx.saved_tensors, ctx.eps), *[None] * 6

    return once, twice


_triton = opaque_op(f"{_NAME}_triton", _SCHEMA, _fake)(triton_body(_NAME, "forward"))
_triton_backward = opaque_op(f"{_NAME}_triton_backward", _BACKWARD_SCHEMA, _fake_backward)(
    triton_body(_NAME, "backward")
)
for _forward, _back in ((_reference, _reference_backward), (_triton, _triton_backward)):
    _once, _twice = _gradients(_forward, _back)
    _forward.register_autograd(_once, setup_context=_save)
    _back.register_autograd(_twice, setup_context=_save_twice)

_cpp, _cpp_backward = _library.compiled(_NAME), _library.compiled(f"{_NAME}_backward")
_once, _twice = _gradients(_cpp, _cpp_backward)
_library.register(_NAME, _fake, _once, _save)
_library.register(f"{_NAME}_backward", _fake_backward, _twice, _save_twice)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(7)
    for name, (b, c, h, w, height, width, s) in {
        "square": (2, 16, 9, 9, 33, 33, 1),
        "odd": (1, 5, 7, 11, 40, 29, 3),
        "one_pixel": (2, 3, 1, 1, 17, 5, 2),
        "down": (1, 4, 12, 9, 5, 4, 2),
        "no_classes": (2, 4, 3, 3, 8, 8, 0),
        "no_images": (0, 4, 3, 3, 8, 8, 2),
        "no_channels": (2, 0, 3, 3, 8, 8, 2),
    }.items():
        classes = torch.randint(0, 5, (b, s), generator=generator)
        if s > 1:
            classes[:, -1] = -1
        yield Sample(
            name,
            {
                "features": torch.randn(b, c, h, w, generator=generator, dtype=torch.float64),
                "labels": torch.randint(0, 6, (b, height, width), generator=generator).to(torch.uint8),
                "classes": classes,
            },
        )


def _workloads() -> Iterator[Workload]:
    for size, ladder in sizes():
        for slots in (1,) if ladder else (1, size.classes):

            def make(size: Size = size, slots: int = slots) -> dict[str, Any]:
                generator = torch.Generator().manual_seed(7)
                return {
                    "features": size.features(generator),
                    "labels": size.labels(generator),
                    "classes": torch.arange(slots).expand(size.batch, -1).contiguous(),
                }

            name = size.name if slots == 1 else f"{size.name}_all_classes"
            passes = ("forward",) if ladder else ("forward", "backward")
            dtypes = ("float32",) if ladder or slots > 1 else ("float32", "bfloat16")
            yield Workload(
                name, {**size.shape(channels=True), "S": slots}, make, passes, dtypes, ladder=ladder
            )


def _cost(inputs: dict[str, Any], passes: str) -> Cost:
    features, labels, classes = inputs["features"], inputs["labels"], inputs["classes"]
    batch, channels, h, w = features.shape
    weighted = used = 0
    for b in range(batch):
        masks = torch.stack(
            [_adjoint_mask(labels[b], target, h, w, torch.float32, 0, h * w) > 0 for target in classes[b]]
            or [torch.zeros(h * w, dtype=torch.bool)]
        )
        weighted += int(masks.sum())
        used += int(masks.any(0).sum())
    # Forward reads the features of a class; backward writes all of the gradient.
    pixels = {"forward": used, "backward": batch * h * w, "both": used + batch * h * w}[passes]
    return Cost(
        flops=(2 if passes == "both" else 1) * 2 * channels * weighted,
        bytes=pixels * channels * features.itemsize + labels.nbytes + 4 * classes.numel() * channels,
    )


register(
    Operator(
        name=_NAME,
        function=masked_average_pool,
        implementations=implementations(_NAME, _cpp, _triton, _reference),
        samples=_samples,
        cost=_cost,
        workloads=_workloads,
        differentiable=("features",),
        features=("features",),
    )
)
