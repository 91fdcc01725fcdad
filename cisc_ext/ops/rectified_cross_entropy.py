"""Cross-entropy of upsampled logits, each pixel weighted by how well its CISC map agrees with its label."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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

_NAME = "rectified_cross_entropy"
REDUCTIONS = ("mean", "valid_mean", "sum", "none")


def rectified_cross_entropy(
    logits: Tensor,  # [B,K,h,w]
    labels: Tensor,  # [B,H,W] uint8, int32 or int64
    similarity: Tensor | None = None,  # [B,S,h',w']
    classes: Tensor | None = None,  # [B,S] int32 or int64, -1 = none
    *,
    ignore_index: int = 255,
    reduction: str = "mean",
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 100000,
    impl: str | None = None,
) -> Tensor:  # scalar, or [B,H,W] for "none"
    """Cross-entropy at label resolution, times 1 - |1[labels = class] - similarity|.

    Replaces

        size = labels.shape[-2:]
        up = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        loss = F.cross_entropy(up, labels.long(), ignore_index=ignore_index, reduction="none")
        s = F.interpolate(similarity, size, mode="bilinear", align_corners=False).clamp(0, 1)
        gap = ((labels[:, None] == classes[..., None, None]).to(s.dtype) - s).abs()
        valid = (classes >= 0)[..., None, None]
        weight = 1 - (gap * valid).sum(1) / valid.sum(1).clamp(min=1)
        loss = (loss * weight.detach()).mean()

    No logits at label resolution exist (B x K x H x W, three times over above), forward or backward: for
    scalar reductions the gradient is computed in the forward pass when it is needed, "none" computes again
    in backward.

    Args:
        logits: float32, bfloat16 or float16, any strides; float64 for the reference.
        labels: class of each pixel, in [0,K) or `ignore_index`; such a pixel adds 0.
        similarity: CISC maps, of any of these dtypes and any size; no gradient. None: weight 1.
        classes: class of each map, -1 for none; an image without a valid class has weight 1. None with a
            similarity [B,1,h',w']: the likeness of each pixel to its own label, weight =
            clamp(U(similarity), 0, 1).
        ignore_index: label of the pixels to leave out.
        reduction: "mean" over all B*H*W pixels, "valid_mean" over those that count, "sum" or "none".
        ohem_threshold: keep only pixels whose probability of their label is at most the larger of this and
            the `ohem_min_kept`-th smallest; drop the rest as if ignored. None: keep all.
        ohem_min_kept: pixels of the batch to keep at least; with fewer valid ones nothing is dropped.
        impl: "reference", "cpp", "triton", or None / "auto".

    Returns:
        The loss in nats, float32 (float64 for float64 logits). Gradient to `logits`. A mean over no pixel is
        0.

    Raises:
        TypeError, ValueError: naming the argument. A label or class outside its range raises on the CPU,
            gives NaN on a GPU.

    Source: Wu et al., TPAMI 2023, rectification of pseudo labels; OHEM as in Shrivastava et al., CVPR 2016.
    """
    checks.tensor(_NAME, "logits", logits, "[B,K,h,w]", checks.FEATURES)
    checks.tensor(_NAME, "labels", labels, "[B,H,W]", checks.LABELS)
    batch, num_classes = logits.shape[:2]
    checks.sizes(_NAME, "labels", labels, (batch, None, None), "logits")
    checks.pixels(_NAME, "logits", logits)
    if num_classes == 0:
        raise ValueError(f"{_NAME}: logits must have at least one class, got shape {tuple(logits.shape)}")
    checks.same_device(_NAME, "labels", labels, "logits", logits)
    if similarity is None:
        if classes is not None:
            raise ValueError(f"{_NAME}: classes needs similarity, got None")
    else:
        checks.tensor(_NAME, "similarity", similarity, "[B,S,h',w']", checks.FEATURES)
        checks.pixels(_NAME, "similarity", similarity)
        checks.same_device(_NAME, "similarity", similarity, "logits", logits)
        if classes is None:
            checks.sizes(_NAME, "similarity", similarity, (batch, 1, None, None), "logits with classes=None")
        else:
            checks.tensor(_NAME, "classes", classes, "[B,S]", checks.CLASSES)
            checks.sizes(_NAME, "similarity", similarity, (batch, None, None, None), "logits")
            checks.sizes(_NAME, "classes", classes, tuple(similarity.shape[:2]), "similarity")
            checks.same_device(_NAME, "classes", classes, "logits", logits)
        similarity = similarity.detach()
    checks.whole(_NAME, "ignore_index", ignore_index)
    checks.choice(_NAME, "reduction", reduction, REDUCTIONS)
    checks.whole(_NAME, "ohem_min_kept", ohem_min_kept, least=0)
    if ohem_threshold is not None:
        checks.number(_NAME, "ohem_threshold", ohem_threshold, least=0.0)
        ohem_threshold = float(ohem_threshold)
    need_grad = reduction != "none" and logits.requires_grad and torch.is_grad_enabled()
    run = choose(_NAME, impl, logits, *([] if similarity is None else [similarity]))
    arguments = (labels, similarity, classes, ignore_index, reduction, ohem_threshold, ohem_min_kept)
    loss: Tensor = run(logits, *arguments, need_grad)[0]
    return loss


class _Piece(NamedTuple):
    """Rows start..stop of one image, at label resolution."""

    image: int
    start: int
    stop: int


class _Problem(NamedTuple):
    """The arguments, as every pass over the pixels reads them."""

    logits: Tensor
    labels: Tensor
    similarity: Tensor | None
    classes: Tensor | None
    ignore_index: int
    dtype: torch.dtype

    def pieces(self) -> Iterator[_Piece]:
        """All rows of all images, a bounded number at a time."""
        height, width = self.labels.shape[1:]
        for image in range(self.logits.shape[0]):
            for start, stop in pieces(height, self.logits.shape[1] * width * self.dtype.itemsize):
                yield _Piece(image, start, stop)

    def truth(self, piece: _Piece) -> Tensor:
        """Labels of a piece, [r,W] int64, in which any class and any `ignore_index` can be told apart."""
        return self.labels[piece.image, piece.start : piece.stop].to(torch.int64)

    def log_probabilities(self, piece: _Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities [K,r,W], their entry at the label [r,W], and which pixels are not ignored
        [r,W]."""
        b, start, stop = piece
        size = (self.labels.shape[1], self.labels.shape[2])
        log = upsample_rows(self.logits[b], size, True, start, stop, self.dtype).log_softmax(0)
        labels = self.truth(piece)
        num_classes = self.logits.shape[1]
        valid = (labels != self.ignore_index) & (labels >= 0) & (labels < num_classes)
        return log, log.gather(0, torch.where(valid, labels, 0)[None])[0], valid

    def weight(self, piece: _Piece) -> Tensor | None:
        """1 - mean over the valid classes of |1[labels = class] - similarity|, [r,W]; None for 1."""
        if self.similarity is None:
            return None
        b, start, stop = piece
        size = (self.labels.shape[1], self.labels.shape[2])

        def likeness(s: int) -> Tensor:
            assert self.similarity is not None
            return upsample_rows(self.similarity[b, s], size, False, start, stop, self.dtype).clamp_(0, 1)

        if self.classes is None:
            return likeness(0)
        labels = self.truth(piece)
        gap = torch.zeros(labels.shape, dtype=self.dtype, device=labels.device)
        for s in range(self.classes.shape[1]):
            target = self.classes[b, s]
            gap += torch.where(target >= 0, ((labels == target).to(self.dtype) - likeness(s)).abs(), 0)
        return 1 - gap / (self.classes[b] >= 0).sum().clamp(min=1)

    def keep_at_most(self, threshold: float | None, min_kept: int) -> Tensor | None:
        """Largest log probability of its label that a pixel may have to be kept (OHEM); None: no limit.

        The `min_kept`-th smallest is found exactly by counting the bit patterns of the probabilities, 16
        bits a pass: no tensor of the size of the labels.
        """
        if threshold is None:
            return None
        device = self.logits.device
        limit = torch.full((), threshold, dtype=self.dtype, device=device)
        words = self.dtype.itemsize // 2
        bits = {torch.float32: torch.int32, torch.float64: torch.int64}[self.dtype]
        prefix = torch.zeros((), dtype=torch.int64, device=device)
        rank = torch.full((), min_kept, dtype=torch.int64, device=device)
        valid_pixels = torch.zeros((), dtype=torch.int64, device=device)
        for word in range(words if min_kept > 0 else 0):
            shift = 16 * (words - 1 - word)
            histogram = torch.zeros(2**16, dtype=torch.int64, device=device)
            for piece in self.pieces():
                _, log, valid = self.log_probabilities(piece)
                # -0.0 would sort above 1; a probability is never negative.
                pattern = log.exp().abs().view(bits).to(torch.int64)
                counted = valid if word == 0 else valid & ((pattern >> (shift + 16)) == prefix)
                digit = (pattern >> shift) & 0xFFFF
                histogram.index_add_(0, digit.flatten(), counted.flatten().to(torch.int64))
            cumulated = histogram.cumsum(0)
            if word == 0:
                valid_pixels = cumulated[-1]
            # [1]: indexing with a 0-dim tensor would ask the device for its value.
            chosen = torch.searchsorted(cumulated, rank).clamp(max=2**16 - 1)[None]
            rank = rank - (cumulated - histogram).index_select(0, chosen)[0]
            prefix = (prefix << 16) | chosen[0]
        if min_kept > 0:
            smallest = prefix.to(bits).view(self.dtype)
            limit = torch.where(valid_pixels < min_kept, float("inf"), torch.maximum(limit, smallest))
        return limit

    def pixel_loss(self, piece: _Piece, limit: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Loss [r,W] (0 where not kept), log probabilities [K,r,W], which pixels are kept [r,W], and the
        weight."""
        log, own, valid = self.log_probabilities(piece)
        if limit is not None:
            valid = valid & ~(own.exp() > limit)
        weight = self.weight(piece)
        loss = -own if weight is None else -own * weight
        return torch.where(valid, loss, 0), log, valid, weight

    def add_gradient(
        self, grad: Tensor, piece: _Piece, log: Tensor, kept: Tensor, weight: Tensor | None
    ) -> None:
        """Add the gradient of a piece's summed loss to `grad` [B,K,h,w]; consumes `log`."""
        b, start, stop = piece
        factor = kept.to(self.dtype) if weight is None else torch.where(kept, weight, 0)
        labels = torch.where(kept, self.truth(piece), 0)
        slope = log.exp_().masked_fill_(~kept, 0)
        slope.scatter_add_(0, labels[None], torch.where(kept, -1.0, 0.0).to(self.dtype)[None])
        size = (self.labels.shape[1], self.labels.shape[2])
        add_adjoint_rows(grad[b], slope.mul_(factor), size, True, start, stop)


def _problem(
    logits: Tensor, labels: Tensor, similarity: Tensor | None, classes: Tensor | None, ignore_index: int
) -> tuple[_Problem, list[Tensor | None]]:
    invalid = [checks.label_values(_NAME, labels, logits.shape[1], ignore_index)]
    if classes is not None:
        invalid.append(checks.class_values(_NAME, classes, limit=logits.shape[1]))
    return _Problem(logits, labels, similarity, classes, ignore_index, accumulator(logits)), invalid


def _fake(
    logits: Tensor,
    labels: Tensor,
    similarity: Tensor | None,
    classes: Tensor | None,
    ignore_index: int,
    reduction: str,
    ohem_threshold: float | None,
    ohem_min_kept: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    dtype, device = accumulator(logits), logits.device
    loss = torch.empty(labels.shape if reduction == "none" else (), dtype=dtype, device=device)
    return loss, torch.empty(logits.shape if need_grad else (0,), dtype=dtype, device=device)


_ARGUMENTS = (
    "Tensor labels, Tensor? similarity, Tensor? classes, int ignore_index, str reduction, "
    "float? ohem_threshold, int ohem_min_kept"
)


_SCHEMA = f"(Tensor logits, {_ARGUMENTS}, bool need_grad) -> (Tensor loss, Tensor grad)"


@opaque_op(f"{_NAME}_reference", _SCHEMA, _fake)
def _reference(
    logits: Tensor,
    labels: Tensor,
    similarity: Tensor | None,
    classes: Tensor | None,
    ignore_index: int,
    reduction: str,
    ohem_threshold: float | None,
    ohem_min_kept: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    problem, invalid = _problem(logits, labels, similarity, classes, ignore_index)
    loss, grad = _fake(
        logits, labels, None, None, ignore_index, reduction, ohem_threshold, ohem_min_kept, need_grad
    )
    grad.zero_()
    limit = problem.keep_at_most(ohem_threshold, ohem_min_kept)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    count = torch.zeros((), dtype=torch.int64, device=logits.device)
    for piece in problem.pieces():
        pixel, log, kept, weight = problem.pixel_loss(piece, limit)
        if reduction == "none":
            loss[piece.image, piece.start : piece.stop] = pixel
            continue
        total += pixel.sum(dtype=torch.float64)
        count += kept.sum()
        if need_grad:
            problem.add_gradient(grad, piece, log, kept, weight)
    if reduction == "none":
        return checks.poison(loss, *invalid), grad
    if reduction == "valid_mean":
        divisor = count.clamp(min=1).to(torch.float64)
    else:
        pixels = max(labels.numel(), 1) if reduction == "mean" else 1
        divisor = torch.full((), pixels, dtype=torch.float64, device=logits.device)
    divisor = checks.poison(divisor, *invalid)
    return (total / divisor).to(loss.dtype), grad.div_(divisor)


def _fake_backward(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


_BACKWARD_SCHEMA = f"(Tensor grad, Tensor logits, {_ARGUMENTS}) -> Tensor"


@opaque_op(f"{_NAME}_reference_backward", _BACKWARD_SCHEMA, _fake_backward)
def _reference_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    similarity: Tensor | None,
    classes: Tensor | None,
    ignore_index: int,
    reduction: str,
    ohem_threshold: float | None,
    ohem_min_kept: int,
) -> Tensor:
    problem, invalid = _problem(logits, labels, similarity, classes, ignore_index)
    limit = problem.keep_at_most(ohem_threshold, ohem_min_kept)
    result = torch.zeros(logits.shape, dtype=problem.dtype, device=logits.device)
    for piece in problem.pieces():
        _, log, kept, weight = problem.pixel_loss(piece, limit)
        part = grad[piece.image, piece.start : piece.stop]
        problem.add_gradient(result, piece, log, kept, part if weight is None else weight * part)
    return torch.empty_like(logits).copy_(checks.poison(result, *invalid))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, similarity, classes, *rest, _ = inputs
    ctx.rest = rest
    if ctx.rest[1] == "none":
        ctx.save_for_backward(logits, labels, similarity, classes)
    else:
        ctx.save_for_backward(output[1], logits)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward_by(recompute: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Backward pass; `recompute` makes the gradient of "none", the others' was made in the forward pass."""

    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        if ctx.rest[1] == "none":
            result = recompute(grad, *ctx.saved_tensors, *ctx.rest)
        else:
            saved, logits = ctx.saved_tensors
            result = scaled_gradient(saved, grad, logits)
        return (result, *[None] * 8)

    return backward


_reference.register_autograd(_backward_by(_reference_backward), setup_context=_save)

_triton = opaque_op(f"{_NAME}_triton", _SCHEMA, _fake)(triton_body(_NAME, "forward"))
_triton_backward = opaque_op(f"{_NAME}_triton_backward", _BACKWARD_SCHEMA, _fake_backward)(
    triton_body(_NAME, "backward")
)
_triton.register_autograd(_backward_by(_triton_backward), setup_context=_save)


def _fake_cpp_backward(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)


def _cpp_recompute(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    labels, similarity, classes, ignore_index, _, *ohem = rest
    result = torch.ops.cisc_ext.rectified_cross_entropy_backward(
        grad, logits, labels, similarity, classes, ignore_index, *ohem
    )
    return result.to(logits.dtype)


_library.register(_NAME, _fake, _backward_by(_cpp_recompute), _save)
_library.register(f"{_NAME}_backward", _fake_cpp_backward, _library.refuse)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(17)

    def sample(
        name: str, size: tuple[int, ...], maps: tuple[int, ...] | None, own: bool = False, **rest: Any
    ) -> Sample:
        b, k, h, w, height, width = size
        labels = torch.randint(0, k, (b, height, width), generator=generator).to(torch.uint8)
        labels[torch.rand(b, height, width, generator=generator) < 0.2] = 255
        logits = torch.randn(b, k, h, w, generator=generator, dtype=torch.float64) * 2
        inputs: dict[str, Any] = {"logits": logits, "labels": labels, **rest}
        if maps is not None:
            inputs["similarity"] = torch.randn(b, *maps, generator=generator, dtype=torch.float64) * 0.5 + 0.4
            if not own:
                inputs["classes"] = torch.randint(-1, k, (b, maps[0]), generator=generator)
        return Sample(name, inputs)

    yield sample("plain", (2, 5, 9, 9, 33, 33), None)
    yield sample("one_class", (2, 5, 9, 9, 33, 33), (1, 9, 9))
    yield sample("three_classes_other_size", (2, 4, 5, 7, 18, 25), (3, 6, 11), reduction="valid_mean")
    yield sample("own_likeness", (1, 3, 4, 5, 13, 11), (1, 7, 3), own=True, reduction="sum")
    yield sample("per_pixel", (2, 3, 4, 5, 13, 11), (2, 4, 5), reduction="none")
    yield sample("ohem", (2, 5, 4, 5, 13, 11), (1, 5, 5), ohem_threshold=0.2, ohem_min_kept=80)
    yield sample("ohem_few_valid", (1, 3, 4, 4, 9, 9), None, ohem_threshold=0.1, reduction="valid_mean")
    yield sample("down", (1, 3, 9, 8, 4, 5), None)
    yield sample("one_pixel", (1, 2, 1, 1, 6, 5), (1, 1, 1))
    yield sample("no_images", (0, 3, 4, 4, 9, 9), (1, 4, 4))


def _workloads() -> Iterator[Workload]:
    for size, ladder in sizes():
        modes = ("rectified", "plain", "own", "pixels", "ohem")
        for mode in modes if size.name == "cityscapes" else modes[:1]:

            def make(size: Size = size, mode: str = mode) -> dict[str, Any]:
                generator = torch.Generator().manual_seed(17)
                inputs: dict[str, Any] = {"logits": size.logits(generator), "labels": size.labels(generator)}
                if mode in ("rectified", "own", "pixels"):
                    inputs["similarity"] = torch.rand(size.batch, 1, *size.low, generator=generator)
                if mode in ("rectified", "pixels"):
                    inputs["classes"] = torch.zeros(size.batch, 1, dtype=torch.int64)
                if mode == "pixels":
                    inputs["reduction"] = "none"
                if mode == "ohem":
                    inputs["ohem_threshold"] = 0.7
                return inputs

            name = size.name if mode == "rectified" else f"{size.name}_{mode}"
            reduction = "none" if mode == "pixels" else "mean"
            both = "backward" if mode == "pixels" else "both"
            passes = (both,) if ladder else ("forward", both)
            dtypes = ("float32", "bfloat16") if mode == "rectified" and not ladder else ("float32",)
            yield Workload(name, size.shape(), make, passes, dtypes, reduction=reduction, ladder=ladder)


def _cost(inputs: dict[str, Any], passes: str) -> Cost:
    logits, labels = inputs["logits"], inputs["labels"]
    maps = inputs.get("similarity")
    values, pixels = labels.numel() * logits.shape[1], labels.numel()
    # Interpolation, the maximum, an exponential and its sum; then the product with the weight and the adjoint
    # of the interpolation. "none" computes the first again in backward.
    forward, gradient = 3 + 2 + 12 + 1, 1 + 3
    per_pixel = 4 * pixels if inputs.get("reduction") == "none" else 0
    read = logits.nbytes + labels.nbytes + (0 if maps is None else maps.nbytes) + per_pixel
    recomputed = Cost((forward + gradient) * values, read + logits.nbytes)
    return {
        "forward": Cost(forward * values, read),
        "backward": recomputed if per_pixel else Cost(logits.numel(), 2 * logits.nbytes),
        "both": recomputed,
    }[passes]


register(
    Operator(
        name=_NAME,
        function=rectified_cross_entropy,
        implementations=implementations(
            _NAME, cpp=_library.compiled(_NAME), triton=_triton, reference=_reference
        ),
        samples=_samples,
        cost=_cost,
        workloads=_workloads,
        differentiable=("logits",),
        features=("logits", "similarity"),
    )
)
