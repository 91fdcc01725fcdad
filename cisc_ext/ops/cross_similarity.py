"""Pixel-level similarity of a query image to the classes of a guide image, without the affinity between
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _library
from ._bilinear import nearest_rows
from ._cross_reference import REDUCTIONS, backward, forward
from ._implementations import implementations
from ._opaque import opaque_op, triton_body
from ._reference import accumulator
from ._workloads import CHANNELS, CROPS, IMAGES, regions
from .registry import Cost, Operator, Sample, Workload, choose, register

_NAME = "cross_similarity"
_COLDEST, _HOTTEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Temperatures between which a cosine divided by one is finite, and one is a float32."""


def cross_similarity(
    query: Tensor,  # [B,C,h,w]
    guide: Tensor,  # [B,C,h',w']
    guide_labels: Tensor,  # [B,H,W] uint8, int32 or int64
    classes: Tensor | None = None,  # [B,S] int32 or int64, -1 = none
    *,
    query_labels: Tensor | None = None,  # [B,H,W] uint8, int32 or int64
    reduction: str = "max",
    k: int = 8,
    temperature: float = 0.07,
    ignore_index: int = 255,
    return_index: bool = False,
    eps: float = 1e-8,
    impl: str | None = None,
) -> Any:  # [B,S,h,w], or a pair with the index [B,S,h,w] int64
    """How alike each query pixel is to the guide's pixels of a class, at the level of pixels.

    Replaces, for `max` (n = h*w query pixels, m = h'*w' guide pixels)

        q = F.normalize(query.flatten(2), dim=1)
        g = F.normalize(guide.flatten(2), dim=1)
        affinity = torch.einsum("bcn,bcm->bnm", q, g)
        label = F.interpolate(guide_labels[:, None].double(), guide.shape[-2:], mode="nearest-exact")
        member = label.flatten(2) == classes[..., None]  # [B,S,m]
        similarity = affinity[:, None].masked_fill(~member[:, :, None], -inf).amax(-1)  # 0 for an empty class

    The affinity (69 GB between two Cityscapes images at stride 4) does not exist, forward or backward.

    Args:
        query: features, float32, bfloat16 or float16, any strides; float64 for the reference.
        guide: features, of any of these dtypes. On tensor cores float32 features, or a pair of unlike dtypes,
            follow `torch.get_float32_matmul_precision()`: at "highest" products are as exact as float32's,
            else of unit vectors rounded to float16, about 4e-5 of a cosine.
        guide_labels: class of each guide pixel, brought to h' x w' by "nearest-exact".
        classes: the classes to compare with. -1 gives zeros. Exactly one of this and `query_labels`.
        query_labels: "own-label" mode, S = 1: each query pixel is compared with guide pixels of its own
            label only. With "mean", the reference on a GPU synchronises unless all labels are uint8.
        reduction: over the cosines with the guide pixels of the class: "max"; "topk", the mean of the k
            largest (of all if there are fewer); "softmax", their mean weighted by
            softmax(cosine / temperature); "mean". No such pixel: 0.
        k: for "topk"; pixels. More than the guide has are the same as all of them.
        temperature: for "softmax"; cosines per e-fold.
        ignore_index: label of query pixels that match nothing in own-label mode.
        return_index: also return the best guide pixel, row-major in h' x w', whatever the reduction; -1 if
            none, ties to the lowest.
        eps: a vector with a smaller norm, or one below float32's normal range, has cosine 0 and gradient 0.
        impl: "reference", "cpp", "triton", or None / "auto".

    Returns:
        Similarity in float32 (float64 if an operand is float64), and the index where asked for. Gradient to
        `query` and `guide`. A non-finite guide pixel makes its class NaN in that image.

    Raises:
        TypeError, ValueError: naming the argument. A class below -1 raises on the CPU, gives NaN on a GPU.

    Source: Wu et al., TPAMI 2023, cross-image semantic consistency, here between pixels instead of a pixel
    and a prototype.
    """
    checks.tensor(_NAME, "query", query, "[B,C,h,w]", checks.FEATURES)
    checks.tensor(_NAME, "guide", guide, "[B,C,h',w']", checks.FEATURES)
    checks.tensor(_NAME, "guide_labels", guide_labels, "[B,H,W]", checks.LABELS)
    batch = query.shape[0]
    checks.sizes(_NAME, "guide", guide, (batch, query.shape[1], None, None), "query")
    checks.sizes(_NAME, "guide_labels", guide_labels, (batch, None, None), "query")
    if guide.shape[-1] * guide.shape[-2] > 0:
        checks.pixels(_NAME, "guide_labels", guide_labels)
    checks.same_device(_NAME, "guide", guide, "query", query)
    checks.same_device(_NAME, "guide_labels", guide_labels, "query", query)
    if (classes is None) == (query_labels is None):
        given = "both" if classes is not None else "neither"
        raise ValueError(f"{_NAME}: exactly one of classes and query_labels must be given, got {given}")
    if classes is not None:
        checks.tensor(_NAME, "classes", classes, "[B,S]", checks.CLASSES)
        checks.sizes(_NAME, "classes", classes, (batch, None), "query")
        checks.same_device(_NAME, "classes", classes, "query", query)
    if query_labels is not None:
        checks.tensor(_NAME, "query_labels", query_labels, "[B,H,W]", checks.LABELS)
        checks.sizes(_NAME, "query_labels", query_labels, (batch, None, None), "query")
        if query.shape[-1] * query.shape[-2] > 0:
            checks.pixels(_NAME, "query_labels", query_labels)
        checks.same_device(_NAME, "query_labels", query_labels, "query", query)
    checks.choice(_NAME, "reduction", reduction, REDUCTIONS)
    checks.whole(_NAME, "k", k, least=1)
    checks.number(_NAME, "temperature", temperature, least=_COLDEST, most=_HOTTEST)
    checks.whole(_NAME, "ignore_index", ignore_index)
    checks.number(_NAME, "eps", eps, least=0.0, strict=True)
    run = choose(_NAME, impl, query, guide)
    settings = (reduction, k, float(temperature), ignore_index, float(eps))
    similarity, index, _ = run(query, guide, guide_labels, classes, query_labels, *settings, return_index)
    return (similarity, index) if return_index else similarity


_ARGUMENTS = (
    "Tensor query, Tensor guide, Tensor guide_labels, Tensor? classes, Tensor? query_labels, "
    "str reduction, int k, float temperature, int ignore_index, float eps"
)


def _fake(
    query: Tensor,
    guide: Tensor,
    guide_labels: Tensor,
    classes: Tensor | None,
    query_labels: Tensor | None,
    reduction: str,
    k: int,
    temperature: float,
    ignore_index: int,
    eps: float,
    return_index: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, device = accumulator(query, guide), query.device
    shape = (query.shape[0], 1 if classes is None else classes.shape[1], *query.shape[2:])
    indexed = return_index or reduction == "max"
    winners = max(1, min(k, guide.shape[2] * guide.shape[3]))
    saved = {"topk": (*shape, winners), "softmax": shape}.get(reduction, (0,))
    return (
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty(shape if indexed else (0,), dtype=torch.int64, device=device),
        torch.empty(saved, dtype=torch.int64 if reduction == "topk" else dtype, device=device),
    )


_SCHEMA = f"({_ARGUMENTS}, bool return_index) -> (Tensor similarity, Tensor index, Tensor saved)"


@opaque_op(f"{_NAME}_reference", _SCHEMA, _fake)
def _reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    classes = arguments[3]
    invalid = None if classes is None else checks.class_values(_NAME, classes)
    with_outputs: tuple[Any, ...] = (*arguments, *_fake(*arguments))
    similarity, index, saved = forward(*with_outputs)
    return checks.poison(similarity, invalid), index, saved


def _fake_backward(
    grad: Tensor, similarity: Tensor, index: Tensor, saved: Tensor, query: Tensor, guide: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    need_query, need_guide = rest[-2:]
    return (
        torch.empty_like(query) if need_query else torch.empty(0, dtype=query.dtype, device=query.device),
        torch.empty_like(guide) if need_guide else torch.empty(0, dtype=guide.dtype, device=guide.device),
    )


_BACKWARD_SCHEMA = (
    f"(Tensor grad, Tensor similarity, Tensor index, Tensor saved, {_ARGUMENTS}, "
    "bool need_query, bool need_guide) -> (Tensor, Tensor)"
)


@opaque_op(f"{_NAME}_reference_backward", _BACKWARD_SCHEMA, _fake_backward)
def _reference_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return backward(*arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.settings = inputs[:5], inputs[5:-1]
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward_by(operator: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (6 + len(ctx.settings))
        need = ctx.needs_input_grad[:2]
        grads = operator(grad, *ctx.saved_tensors, *ctx.settings, *need)
        wanted = (g if needed else None for g, needed in zip(grads, need, strict=True))
        return (*wanted, *[None] * (4 + len(ctx.settings)))

    return backward


_reference.register_autograd(_backward_by(_reference_backward), setup_context=_save)

_triton = opaque_op(f"{_NAME}_triton", _SCHEMA, _fake)(triton_body(_NAME, "forward"))
_triton_backward = opaque_op(f"{_NAME}_triton_backward", _BACKWARD_SCHEMA, _fake_backward)(
    triton_body(_NAME, "backward")
)
_triton.register_autograd(_backward_by(_triton_backward), setup_context=_save)


@torch.compiler.assume_constant_result
def _rounded() -> bool:
    """Whether unit vectors of float32 may be rounded to float16."""
    return torch.get_float32_matmul_precision() != "highest"


def _cpp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled operator, which cannot ask torch for the precision of products."""
    result: tuple[Tensor, Tensor, Tensor] = _library.compiled(_NAME)(
        *arguments[:-1], _rounded(), arguments[-1]
    )
    return result


def _cpp_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    without_rounded: tuple[Any, ...] = (*arguments[:-2], arguments[-1])
    return _fake(*without_rounded)


_cpp_backward = _library.compiled(f"{_NAME}_backward")
_library.register(_NAME, _cpp_fake, _backward_by(_cpp_backward), _save)
_library.register(f"{_NAME}_backward", _fake_backward, _library.refuse)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(23)

    def sample(name: str, size: tuple[int, ...], slots: int | None, **rest: Any) -> Sample:
        b, c, h, w, guide_h, guide_w, height, width = size
        labels = torch.randint(0, 4, (2, b, height, width), generator=generator).to(torch.uint8)
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
        inputs: dict[str, Any] = {
            "query": torch.randn(b, c, h, w, generator=generator, dtype=torch.float64),
            "guide": torch.randn(b, c, guide_h, guide_w, generator=generator, dtype=torch.float64),
            "guide_labels": labels[0],
            **rest,
        }
        if slots is None:
            inputs["query_labels"] = labels[1]
        else:
            inputs["classes"] = torch.randint(0, 4, (b, slots), generator=generator)
            if slots > 2:
                inputs["classes"][:, 1:3] = torch.tensor([-1, 9])
        return Sample(name, inputs)

    for reduction in REDUCTIONS:
        yield sample(f"{reduction}", (2, 8, 5, 7, 6, 4, 21, 17), 1, reduction=reduction)
        yield sample(
            f"{reduction}_classes", (1, 5, 3, 4, 7, 3, 9, 11), 4, reduction=reduction, k=3, return_index=True
        )
        yield sample(
            f"{reduction}_own", (2, 6, 4, 5, 5, 4, 15, 13), None, reduction=reduction, k=5, return_index=True
        )
    yield sample("few_pixels", (1, 4, 3, 3, 2, 2, 4, 4), 1, reduction="topk", k=50)
    yield sample("no_images", (0, 4, 3, 3, 2, 2, 4, 4), 2)
    yield sample("no_query_pixels", (1, 4, 0, 3, 2, 2, 4, 4), 2)
    yield sample("no_guide_pixels", (1, 4, 2, 3, 2, 0, 4, 4), 2, reduction="softmax", return_index=True)
    yield sample("no_classes", (1, 4, 2, 3, 2, 2, 4, 4), 0)


def _workloads() -> Iterator[Workload]:
    float32, both_dtypes = ("float32",), ("float32", "bfloat16")
    forward, both_passes = ("forward",), ("forward", "backward")

    def workload(
        name: str,
        reduction: str,
        mode: str,
        batch: int,
        low: tuple[int, int],
        passes: tuple[str, ...],
        dtypes: tuple[str, ...],
        ladder: bool = False,
    ) -> Workload:
        h, w = low

        def make() -> dict[str, Any]:
            generator = torch.Generator().manual_seed(29)
            query, guide = torch.randn(2, batch, CHANNELS, h, w, generator=generator)
            labels = regions(2 * batch, 4 * h, 4 * w, 4, generator, crop=False).unflatten(0, (2, batch))
            inputs = {"query": query, "guide": guide, "guide_labels": labels[0], "reduction": reduction}
            if mode == "own":
                return {**inputs, "query_labels": labels[1]}
            if mode == "dense":
                inputs["guide_labels"] = torch.zeros_like(labels[0])
            return {**inputs, "classes": torch.zeros(batch, 1, dtype=torch.int64)}

        shape = {"B": batch, "C": CHANNELS, "N": h * w, "M": h * w}
        return Workload(name, shape, make, passes, dtypes, mode, reduction, ladder)

    for reduction in REDUCTIONS:
        passes = both_passes if reduction == "mean" else forward
        yield workload(f"n4096_dense_{reduction}", reduction, "dense", 1, (64, 64), passes, float32)
    for mode in ("labels", "own"):
        for reduction in REDUCTIONS[:3]:
            yield workload(f"n4096_{mode}_{reduction}", reduction, mode, 1, (64, 64), forward, float32)
    for reduction in REDUCTIONS[:3]:
        yield workload(
            f"n16384_dense_{reduction}", reduction, "dense", 1, (128, 128), both_passes, both_dtypes
        )
    for mode in ("labels", "own"):
        yield workload(f"n16384_{mode}_max", "max", mode, 1, (128, 128), forward, both_dtypes)
    for crop in CROPS:
        name = f"{crop.name}_labels_max"
        yield workload(name, "max", "labels", crop.batch, crop.low, both_passes, both_dtypes)
    yield workload("n1024_dense_max", "max", "dense", 1, (32, 32), forward, float32, ladder=True)
    for image in IMAGES:
        dtypes = both_dtypes if image is IMAGES[-1] else float32
        name = f"{image.name}_dense_max"
        yield workload(name, "max", "dense", 1, image.low, forward, dtypes, ladder=True)


def _pairs(inputs: dict[str, Any]) -> tuple[int, int]:
    """Pairs of pixels that are to be compared, and query vectors that are compared with a class's mean."""
    query, guide, labels = inputs["query"], inputs["guide"], inputs["guide_labels"]
    h, w = query.shape[2:]
    if 0 in query.shape or 0 in guide.shape:
        return 0, 0

    def brought(values: Tensor, height: int, width: int) -> Tensor:
        rows = nearest_rows(values.shape[1], height, values.device)
        return values[:, rows][:, :, nearest_rows(values.shape[2], width, values.device)].flatten(1)

    low = brought(labels, guide.shape[2], guide.shape[3])
    classes, query_labels = inputs.get("classes"), inputs.get("query_labels")
    if classes is not None:
        members = ((low[:, None] == classes[..., None]) & (classes >= 0)[..., None]).sum(-1)  # [B,S]
        return int(members.sum()) * h * w, int((members > 0).sum()) * h * w
    assert query_labels is not None
    own = brought(query_labels, h, w)
    pairs = means = 0
    for b in range(len(own)):
        for value in own[b].unique():
            if int(value) != inputs.get("ignore_index", 255):
                count, members = int((own[b] == value).sum()), int((low[b] == value).sum())
                pairs += count * members
                means += count if members else 0
    return pairs, means


def _cost(inputs: dict[str, Any], passes: str) -> Cost:
    query, guide = inputs["query"], inputs["guide"]
    batch, channels, h, w = query.shape
    classes, reduction = inputs.get("classes"), inputs.get("reduction", "max")
    maps = batch * (1 if classes is None else classes.shape[1]) * h * w
    pairs, means = _pairs(inputs)
    operands, norms = query.nbytes + guide.nbytes, 2 * (query.numel() + guide.numel())
    # Both ways from the winners: a product towards either side of each. Softmax compares all pairs again.
    winners = min(inputs.get("k", 8), guide.shape[2] * guide.shape[3]) if reduction == "topk" else 1
    if reduction == "mean":
        forward = 2 * channels * means + guide.numel()
        backward = 4 * channels * means + guide.numel()
    else:
        forward = 2 * channels * pairs
        backward = 3 * forward if reduction == "softmax" else 4 * channels * maps * winners
    saved = 8 * maps * winners if reduction in ("max", "topk") else 4 * maps
    labels = inputs["guide_labels"].nbytes + (0 if classes is not None else inputs["query_labels"].nbytes)
    first = Cost(forward + norms, operands + labels + 4 * maps + saved, products=True)
    second = Cost(backward + 2 * norms, 2 * operands + labels + 8 * maps + saved, products=True)
    both = Cost(first.flops + second.flops, first.bytes + second.bytes, products=True)
    return {"forward": first, "backward": second, "both": both}[passes]


register(
    Operator(
        name=_NAME,
        function=cross_similarity,
        implementations=implementations(_NAME, cpp=_cpp, triton=_triton, reference=_reference),
        samples=_samples,
        cost=_cost,
        workloads=_workloads,
        differentiable=("query", "guide"),
        features=("query", "guide"),
    )
)
