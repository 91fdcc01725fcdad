"""What the operators are measured against, one function each: it makes the call that runs a case's pass.

All of them start from the operator's arguments and normalise, bring labels and the like within the call, as
the operators do. Buffers are allocated when the call is made. Where a rival cannot run a case it raises
`CannotRunError` with the reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cross_rivals, gpu_rivals, measure, naive, published
from benchmarks.cases import Call, CannotRunError, Case, Result, call_of, cotangent, narrowed
from benchmarks.measure import SLOW_S
from benchmarks.rival_counts import all_pairs_flops, chunked_flops, naive_bytes, needed_flops, ranges

CROSS_CHUNKS = (128, 256, 512, 1024, 2048)  # query pixels
ROW_CHUNKS = (16, 64, 256)  # rows of labels
PIXEL_CHUNKS = (512, 2048, 8192)  # query pixels
_WIDER_ON_A_GPU = 8  # times these


@dataclass(frozen=True)
class Rival:
    """`make(case, whole, chunk)` gives the call; `flops` and `bytes` are its least for a case."""

    name: str
    make: Callable[[Case, bool, int], Call]
    chunks: tuple[int, ...] = (0,)
    flops: Callable[[Case], int] = lambda case: 0
    bytes: Callable[[Case], int] = lambda case: 0


def named(case: Case, name: str) -> Rival:
    """The rival of that name."""
    (rival,) = (one for one in RIVALS[case.operator.name] if one.name == name)
    return rival


def best_chunk(case: Case, rival: Rival) -> int:
    """The chunk that is fastest, on a part of the query where one can be taken."""
    if len(rival.chunks) == 1:
        return rival.chunks[0]
    seconds: dict[int, float] = {}
    chunks = [chunk * (_WIDER_ON_A_GPU if case.device == "cuda" else 1) for chunk in rival.chunks]
    few = narrowed(case, max(chunks)) or case
    for chunk in chunks:
        call = rival.make(few, False, chunk)
        first = measure.timed_s(call)
        seconds[chunk] = first if first > SLOW_S else min(first, measure.timed_s(call))
    return min(seconds, key=lambda chunk: seconds[chunk])


def _naive(case: Case, whole: bool, chunk: int) -> Call:
    return call_of(naive.ORACLES[case.operator.name], case, whole=whole)


def _compiled(case: Case, whole: bool, chunk: int) -> Call:
    """The naive expression through torch.compile."""
    if case.device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise CannotRunError("torch.compile needs a C++ compiler, found none")
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # so that the graph can run backward again
    function = torch.compile(naive.ORACLES[case.operator.name], dynamic=False)
    try:
        call = call_of(function, case, whole=whole)
        call()
    except CannotRunError:
        raise
    except Exception as error:
        raise CannotRunError(f"torch.compile fails: {_first_line(error)}") from error
    return call


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


# Logits, maps and features at label resolution, some rows at a time.


class _Axes:
    """Upsampling axis by axis, of which each chunk of rows takes its part: by two products with matrices, or
    with the columns interpolated."""

    def __init__(self, x: Tensor, size: tuple[int, int], align_corners: bool, products: bool) -> None:
        self.width, self.align_corners, self.products = size[1], align_corners, products
        rows, columns = (
            F.interpolate(
                torch.eye(n, dtype=torch.float32)[None], m, mode="linear", align_corners=align_corners
            )[0]
            for n, m in zip(x.shape[-2:], size, strict=True)
        )
        # On the CPU, where nothing waits for the device.
        self.first = rows.ne(0).int().argmax(0).tolist()
        self.stop = (len(rows) - rows.flip(0).ne(0).int().argmax(0)).tolist()
        self.rows, self.columns = rows.to(x), columns.to(x)  # [h,H], [w,W]

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The source rows that rows start..stop are made of."""
        return min(self.first[start:stop]), max(self.stop[start:stop])

    def up(self, part: Tensor, span: tuple[int, int], start: int, stop: int) -> Tensor:
        """[C,r,w] to [C,rows,W]."""
        part = part.to(self.columns)
        if self.products:
            wide = part @ self.columns
        else:
            size = (part.shape[1], self.width)
            wide = F.interpolate(part[None], size, mode="bilinear", align_corners=self.align_corners)[0]
        return self.rows[span[0] : span[1], start:stop].t() @ wide


def _by_rows(products: bool, case: Case, whole: bool, chunk: int) -> Call:
    """The naive expression on `chunk` rows of labels at a time, forward and at once backward."""
    name, inputs = case.operator.name, case.inputs
    if inputs.get("ohem_threshold") is not None:
        raise CannotRunError("OHEM needs the probabilities of all pixels at once")
    source_name = case.operator.features[0]
    source, labels, classes = inputs[source_name], inputs["labels"], inputs.get("classes")
    height, width = labels.shape[1:]
    # In bfloat16 maps would round to 1, where the loss is at its floor and its gradient is not.
    like = source.float() if name == "map_consistency" else source
    axes = _Axes(like, (height, width), name == "rectified_cross_entropy", products)
    maps = inputs.get("similarity") if name == "rectified_cross_entropy" else None
    map_axes = None if maps is None else _Axes(maps, (height, width), False, products)
    ignored = inputs.get("ignore_index", published.IGNORE_INDEX)
    per_pixel = inputs.get("reduction") == "none"
    start_from = cotangent(labels.float()) if per_pixel else None
    pool_grad = None
    if name == "masked_average_pool" and classes is not None:
        pool_grad = cotangent(torch.empty(*classes.shape, source.shape[1], device=source.device)).to(source)
    differentiated = case.passes != "forward" or whole

    def pixels(up: Tensor, b: int, a: int, e: int) -> Tensor:
        truth = labels[b : b + 1, a:e]
        of_image = None if classes is None else classes[b : b + 1]
        if name == "map_consistency":
            assert of_image is not None
            return naive.map_pixels(up[None], truth, of_image, ignored)[0]
        loss = F.cross_entropy(up[None], truth.long(), ignore_index=ignored, reduction="none")
        if maps is not None and map_axes is not None:
            span = map_axes.span(a, e)
            s = map_axes.up(maps[b, :, slice(*span)], span, a, e)[None]
            loss = loss * naive.weight_of(s, truth, of_image)
        return loss[0]

    def pooled(up: Tensor, b: int, a: int, e: int) -> Tensor:
        assert classes is not None
        mask = naive.one_hot(labels[b : b + 1, a:e], classes[b : b + 1])[0].to(up.dtype)
        return mask.flatten(1) @ up.flatten(1).t()  # [S,C]

    def run() -> Result:
        grad = torch.zeros_like(source) if differentiated else None
        total: Tensor = torch.zeros((), device=source.device)
        full = torch.empty(labels.shape, device=source.device) if per_pixel else None
        if name == "masked_average_pool":
            assert classes is not None
            area = naive.one_hot(labels, classes).sum((2, 3))[..., None] + 5e-4
            full = torch.zeros(*classes.shape, source.shape[1], device=source.device)
        for b in range(len(source)):
            for a, e in ranges(height, chunk):
                span = axes.span(a, e)
                part = source[b, :, slice(*span)]
                if differentiated:
                    part = part.detach().requires_grad_()
                up = axes.up(part, span, a, e)
                if name == "masked_average_pool":
                    value = pooled(up, b, a, e)
                    assert full is not None
                    full[b] += value.detach()
                    if pool_grad is not None:
                        value = (value * (pool_grad[b] / area[b])).sum()
                else:
                    value = pixels(up, b, a, e)
                    if full is not None:
                        full[b, a:e] = value.detach()
                    if start_from is not None:
                        value = value * start_from[b, a:e]
                    value = value.sum()
                    total = total + value.detach()
                if grad is not None:
                    grad[b, :, slice(*span)] += torch.autograd.grad(value, part)[0]
        if name == "masked_average_pool":
            assert full is not None
            full = full / area
        if full is not None:
            if case.passes == "forward":
                return (full,)
            assert grad is not None
            return (full, grad) if whole else (grad,)
        count = labels.numel() if name == "rectified_cross_entropy" else labels.ne(ignored).sum().clamp(min=1)
        return (total / count,) if grad is None else (total / count, grad / count)

    def forward() -> Result:
        with torch.no_grad():
            return run()

    return run if differentiated else forward


def _predict_by_rows(products: bool, case: Case, whole: bool, chunk: int) -> Call:
    logits, labels = case.inputs["logits"], case.inputs["labels"]
    (height, width), classes = case.inputs["size"], logits.shape[1]
    axes = _Axes(logits, (height, width), True, products)
    ignored = case.inputs.get("ignore_index", published.IGNORE_INDEX)

    @torch.no_grad()
    def run() -> Result:
        best = torch.empty(labels.shape, dtype=torch.uint8, device=logits.device)
        confusion = torch.zeros(classes**2, dtype=torch.int64, device=logits.device)
        for b in range(len(logits)):
            for a, e in ranges(height, chunk):
                span = axes.span(a, e)
                found = axes.up(logits[b, :, slice(*span)], span, a, e).argmax(0)
                best[b, a:e] = found
                truth = labels[b, a:e].long()
                pair = (truth * classes + found)[truth != ignored]
                confusion += torch.bincount(pair, minlength=classes**2)
        return best, confusion.view(classes, classes)

    return run


def _prototypes_by_pixels(case: Case, whole: bool, chunk: int) -> Call:
    query, prototypes = case.inputs["query"], case.inputs["prototypes"]
    start_from = cotangent(torch.empty(*prototypes.shape[:2], query.shape[2:].numel()).to(query))
    differentiated = case.passes != "forward" or whole

    def run() -> Result:
        shape = (*prototypes.shape[:2], query.shape[2:].numel())
        result = torch.empty(shape, dtype=query.dtype, device=query.device)
        grads = (torch.empty_like(query), torch.empty_like(prototypes)) if differentiated else None
        for b in range(len(query)):
            classes = prototypes[b]
            if differentiated:
                classes = classes.detach().requires_grad_()
            unit = F.normalize(classes, dim=1)
            grad_unit = torch.zeros_like(unit)
            for a, e in ranges(shape[2], chunk):
                part = query[b].flatten(1)[:, a:e]
                against = unit
                if differentiated:
                    part, against = part.detach().requires_grad_(), unit.detach().requires_grad_()
                value = against @ F.normalize(part, dim=0)
                result[b, :, a:e] = value.detach()
                if grads is not None:
                    g_part, g_unit = torch.autograd.grad(value, (part, against), start_from[b, :, a:e])
                    grads[0][b].flatten(1)[:, a:e] = g_part
                    grad_unit += g_unit
            if grads is not None:
                (grads[1][b],) = torch.autograd.grad(unit, classes, grad_unit)
        output = result.unflatten(2, tuple(query.shape[2:]))
        if grads is None:
            return (output,)
        return (output, *grads) if whole else grads

    def forward() -> Result:
        with torch.no_grad():
            return run()

    return run if differentiated else forward


# The published arithmetic.


def _published(case: Case, whole: bool, chunk: int) -> Call:
    def pool(features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        return published.prototype(features, labels, classes)[:, None]

    def similarity(query: Tensor, prototypes: Tensor) -> Tensor:
        return F.cosine_similarity(query, prototypes[:, 0, :, None, None], dim=1)[:, None]

    def consistency(similarity: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        up = F.interpolate(similarity, labels.shape[-2:], mode="bilinear", align_corners=False)
        return published.map_loss(up, labels, classes)

    def rectified(logits: Tensor, labels: Tensor, similarity: Tensor, classes: Tensor) -> Tensor:
        up = F.interpolate(similarity, labels.shape[-2:], mode="bilinear", align_corners=False)
        return published.rectified(logits, labels, up, classes)

    x = case.inputs
    slots = x["prototypes"].shape[1] if "prototypes" in x else x["classes"].shape[1] if "classes" in x else 0
    if slots != 1:
        raise CannotRunError("the published arithmetic compares exactly one class")
    if x.get("reduction", "mean") != "mean" or "ohem_threshold" in x:
        raise CannotRunError("the published loss is the mean over all pixels")
    functions: dict[str, Callable[..., Tensor]] = {
        "masked_average_pool": pool,
        "prototype_similarity": similarity,
        "map_consistency": consistency,
        "rectified_cross_entropy": rectified,
    }
    return call_of(functions[case.operator.name], case, whole=whole)


def _by_either(make: Callable[[bool, Case, bool, int], Call], *more: Rival) -> tuple[Rival, ...]:
    """Rows in chunks, upsampled either way: which is faster depends on dtype and size."""
    products = Rival("chunked_products", partial(make, True), ROW_CHUNKS, flops=chunked_flops)
    return _plain(partial(make, False), ROW_CHUNKS, products, *more)


def _plain(
    chunked: Callable[[Case, bool, int], Call], chunks: tuple[int, ...], *more: Rival
) -> tuple[Rival, ...]:
    return (
        Rival("naive", _naive, flops=all_pairs_flops, bytes=naive_bytes),
        Rival("chunked", chunked, chunks, flops=chunked_flops),
        Rival("compile", _compiled, flops=all_pairs_flops, bytes=naive_bytes),
        *more,
    )


_PUBLISHED = Rival("published", _published, flops=all_pairs_flops, bytes=naive_bytes)
RIVALS: dict[str, tuple[Rival, ...]] = {
    "cross_similarity": _plain(
        partial(cross_rivals.cross_chunked, False),
        CROSS_CHUNKS,
        Rival("gathered", partial(cross_rivals.cross_chunked, True), CROSS_CHUNKS, flops=needed_flops),
        Rival("softmax", cross_rivals.softmax_chunked, CROSS_CHUNKS, flops=chunked_flops),
        Rival("attention", cross_rivals.attention, flops=needed_flops),
        Rival("flex_attention", gpu_rivals.flex_attention, flops=needed_flops),
        Rival("flashlib", gpu_rivals.flashlib, flops=needed_flops),
        Rival("faiss", cross_rivals.faiss, flops=needed_flops),
        Rival("keops", cross_rivals.keops, flops=needed_flops),
        Rival("brgemm", cross_rivals.brgemm, (128, 512), flops=needed_flops),
    ),
    "masked_average_pool": _by_either(_by_rows, _PUBLISHED),
    "prototype_similarity": _plain(_prototypes_by_pixels, PIXEL_CHUNKS, _PUBLISHED),
    "map_consistency": _by_either(_by_rows, _PUBLISHED),
    "rectified_cross_entropy": _by_either(
        _by_rows,
        _PUBLISHED,
        Rival("liger", gpu_rivals.liger, bytes=naive_bytes),
        Rival("cut_cross_entropy", gpu_rivals.cut_cross_entropy, bytes=naive_bytes),
    ),
    "predict": _by_either(_predict_by_rows),
}
