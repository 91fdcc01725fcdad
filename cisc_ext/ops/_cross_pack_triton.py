"""Operands of `cross_similarity` for tensor cores: rows of 16-bit numbers, in the order of their class.

A pixel's vector becomes a row: the vector times a power of two that brings its largest component to
[256,512). If both images are of one 16-bit dtype, nothing is rounded, and a product of rows is as exact
as in float32; others are rounded to float16 where torch.get_float32_matmul_precision() allows it. Else
the row is the unit vector times 256, twice in float16: rounded, and what rounding took away, of which
three products make one as exact as in float32. Vectors that are not finite become rows of zeros, with a
scale of NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton
from ._bilinear import nearest_rows
from ._triton import image_offsets

_RESIDENT = 256
"""Channels up to which a tile of the query is held as a whole."""
_CHUNK = 64
_BLOCK = 32
_LABEL_BITS = 0x2545F4914F6CDD1D
_TINY = torch.finfo(torch.float32).tiny


class Form(NamedTuple):
    """How vectors become rows."""

    dtype: torch.dtype
    split: bool  # followed by what rounding took away
    padded: int  # channels, with zeros behind the true ones
    chunk: int  # channels that are multiplied at a time

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.padded * (2 if self.split else 1)

    @property
    def piece(self) -> int:
        """Channels that are read at a time where nothing is multiplied."""
        return min(_CHUNK, self.padded)

    def constants(self) -> dict[str, Any]:
        """What every kernel needs to know of it."""
        return {
            "CHUNK": self.chunk,
            "CHUNKS": self.padded // self.chunk,
            "SPLIT": self.split,
            "WIDEN": _triton.INTERPRETED,
        }

    @property
    def precision(self) -> str:
        """Of products of float32 with unit vectors: those of 16-bit vectors are exact in tf32."""
        return "tf32x3" if self.split else "tf32"


def form(query: Tensor, guide: Tensor) -> Form:
    """The form for two images."""
    channels = query.shape[1]
    alike = query.dtype == guide.dtype != torch.float32
    split = not alike and torch.get_float32_matmul_precision() == "highest"
    # Before Hopper, products take the tile that stays from registers: twice the rows are too many.
    whole = channels <= _RESIDENT and (not split or _triton.capability(query.device) >= (9, 0))
    padded = max(16, _triton.next_power_of_2(channels))
    if channels > _RESIDENT:
        padded = -(-channels // _CHUNK) * _CHUNK
    return Form(
        query.dtype if alike else torch.float16, split, padded, padded if whole else min(padded, _CHUNK)
    )


class Rows(NamedTuple):
    """Images of one side as rows."""

    image: Tensor  # [B,C,h,w]
    packed: Tensor  # [B,n,width]
    scale: (
        Tensor  # [B,n] float32, times which a row is a unit vector; 0 below eps, NaN for what is not finite
    )
    inverse: Tensor  # [B,n] float32, 1 / norm; 0 below eps
    order: Tensor | None  # [B,n] int64, pixel of each row; None: as they are
    digest: Tensor | None  # [B,n] int64, alike for rows of the same numbers, where asked for

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.packed.shape[1]


class Ranges(NamedTuple):
    """Which rows of the guide each query row is compared with, and the other way round.

    Rows are sorted by label. In own-label mode, bounds are there for each row, else for each slot.
    """

    guide_order: Tensor  # [B,m] int64
    guide_labels: Tensor  # [B,m] int64, sorted
    query_order: Tensor | None  # [B,n] int64 in own-label mode
    start: Tensor  # [B,S] or [B,n] int32
    stop: Tensor  # [B,S] or [B,n] int32
    query_end: Tensor  # [B,n] int32, end of the run of query rows of a label; unused outside own-label mode
    back_start: Tensor  # [B,m] int32: query rows that a guide row is compared with; unused outside it
    back_stop: Tensor  # [B,m] int32
    guide_end: Tensor  # [B,m] int32, end of the run of guide rows of a label

    @property
    def own(self) -> bool:
        """Whether in own-label mode."""
        return self.query_order is not None

    def of(self, slots: slice) -> Ranges:
        """Those of some slots; in own-label mode there is one."""
        if self.own:
            return self
        start, stop = self.start[:, slots].contiguous(), self.stop[:, slots].contiguous()
        return self._replace(start=start, stop=stop)


def tensor_or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An argument for a kernel, which does not read it where there is no tensor."""
    return other if tensor is None else tensor


def _low(labels: Tensor, image: Tensor) -> Tensor:  # [B,n] int64
    rows = nearest_rows(labels.shape[1], image.shape[2], labels.device)
    columns = nearest_rows(labels.shape[2], image.shape[3], labels.device)
    return labels[:, rows[:, None], columns].flatten(1)


def _bounds(labels: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `values` [B,k] starts and stops in sorted `labels` [B,n]; the same where not `valid`."""
    start = torch.searchsorted(labels, values)
    stop = torch.searchsorted(labels, values, right=True)
    return start.to(torch.int32), torch.where(valid, stop, start).to(torch.int32)


def first_alike(guide: Rows, found: Ranges) -> Tensor:
    """Of each guide row the first one of its class that has the same numbers, [B,m] int32.

    Two rows are the same if 64 bits that are made of theirs and of the class are.
    """
    assert guide.digest is not None
    keys, perm = (guide.digest + found.guide_labels * _LABEL_BITS).sort(dim=1, stable=True)
    first = perm.gather(1, torch.searchsorted(keys, keys)).to(torch.int32)
    return torch.empty_like(first).scatter_(1, perm, first)


def ranges(
    query: Tensor,  # [B,C,h,w]
    guide: Tensor,  # [B,C,h',w']
    guide_labels: Tensor,  # [B,H,W]
    classes: Tensor | None,  # [B,S]
    query_labels: Tensor | None,  # [B,H,W]
    ignore_index: int,
) -> Ranges:
    """Sort by label, stable; all of it on the device."""
    guide_sorted, guide_order = _low(guide_labels, guide).sort(dim=1, stable=True)
    guide_sorted = guide_sorted.to(torch.int64)
    if classes is not None:
        values = classes.to(torch.int64).contiguous()
        start, stop = _bounds(guide_sorted, values, values >= 0)
        return Ranges(guide_order, guide_sorted, None, start, stop, *[start] * 4)
    assert query_labels is not None
    query_sorted, query_order = _low(query_labels, query).sort(dim=1, stable=True)
    query_sorted = query_sorted.to(torch.int64)
    return Ranges(
        guide_order,
        guide_sorted,
        query_order,
        *_bounds(guide_sorted, query_sorted, query_sorted != ignore_index),
        torch.searchsorted(query_sorted, query_sorted, right=True).to(torch.int32),
        *_bounds(query_sorted, guide_sorted, guide_sorted != ignore_index),
        torch.searchsorted(guide_sorted, guide_sorted, right=True).to(torch.int32),
    )


@triton.jit
def pack_rows(  # type: ignore[no-untyped-def]
    image,  # [B,C,h,w]
    order,  # [B,n] int64
    image_stride_b,
    image_stride_c,
    image_stride_h,
    image_stride_w,
    columns,
    channels,
    pixels,
    blocks,
    eps,
    # outputs
    packed,  # [B,n,width]
    scale,  # [B,n]
    inverse,  # [B,n]
    digest,  # [B,n] int64, where DIGEST: rows of the same numbers have the same one
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    ORDERED: tl.constexpr,
    SPLIT: tl.constexpr,
    DIGEST: tl.constexpr,
):
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    row = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = row < pixels
    pixel = row.to(tl.int64)
    if ORDERED:
        pixel = tl.load(order + b * pixels + row, mask=inside, other=0)
    vector = image + b * image_stride_b + image_offsets(pixel, columns, image_stride_h, image_stride_w, False)
    channel = tl.arange(0, CHUNK)
    largest = tl.zeros([BLOCK], tl.float32)
    not_finite = tl.zeros([BLOCK], tl.float32)
    for first in range(0, channels, CHUNK):
        c = (first + channel).to(tl.int64)
        mask = inside[:, None] & (c < channels)[None, :]
        x = tl.load(vector[:, None] + (c * image_stride_c)[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        not_finite += tl.sum(x * 0.0, 1)
    # The power of two that brings the largest component to [1,2): no square overflows or vanishes.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    power = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    # In float64: an error of the norm is one of all its cosines.
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, channels, CHUNK):
        c = (first + channel).to(tl.int64)
        mask = inside[:, None] & (c < channels)[None, :]
        x = tl.load(vector[:, None] + (c * image_stride_c)[None, :], mask=mask, other=0.0).to(tl.float32)
        x = (x * power[:, None]).to(tl.float64)
        squares += tl.sum(x * x, 1)
    bad = not_finite != not_finite
    root = tl.sqrt(tl.where(bad, 1.0, squares))
    zero = (root == 0.0) | (root / power < eps)
    root = tl.where(zero, 1.0, root)
    reciprocal = tl.where(zero, 0.0, power / root).to(tl.float32)
    factor = power.to(tl.float64) * 256.0
    size = (0.00390625 / root).to(tl.float32)
    if SPLIT:
        factor = factor / root
        size = tl.full([BLOCK], 0.00390625, tl.float32)
    nan = float("nan")
    tl.store(scale + b * pixels + row, tl.where(bad, nan, tl.where(zero, 0.0, size)), mask=inside)
    tl.store(inverse + b * pixels + row, tl.where(bad, nan, reciprocal), mask=inside)
    dropped = bad | zero
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    target = packed + (b * pixels + row)[:, None] * WIDTH
    sums = tl.zeros([BLOCK], tl.int64)
    for first in range(0, PADDED, CHUNK):
        c = (first + channel).to(tl.int64)
        mask = inside[:, None] & (c < channels)[None, :]
        x = tl.load(vector[:, None] + (c * image_stride_c)[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(dropped[:, None], 0.0, x.to(tl.float64) * factor[:, None])
        high = x.to(tl.float32).to(packed.dtype.element_ty)
        tl.store(target + c[None, :], high, mask=inside[:, None])
        bits = high.to(tl.int16, bitcast=True).to(tl.int64)
        if SPLIT:
            low = (x - high.to(tl.float64)).to(tl.float32).to(packed.dtype.element_ty)
            tl.store(target + PADDED + c[None, :], low, mask=inside[:, None])
            bits = bits * 65536 + low.to(tl.int16, bitcast=True).to(tl.int64)
        if DIGEST:
            mixed = (bits + (c[None, :] + 1) * 0x1E3779B97F4A7C15) * 0x3F58476D1CE4E5B9
            mixed = (mixed ^ (mixed >> 29)) * 0x14D049BB133111EB
            sums += tl.sum(mixed ^ (mixed >> 32), 1)
    if DIGEST:
        tl.store(digest + b * pixels + row, sums, mask=inside)


def pack(
    image: Tensor,  # [B,C,h,w]
    order: Tensor | None,  # [B,n] int64
    form: Form,
    eps: float,
    *,
    digests: bool = False,
) -> Rows:
    """The pixels of images as rows, in `order`."""
    batch, channels, height, width = image.shape
    pixels, device = height * width, image.device
    packed = torch.empty(batch, pixels, form.width, dtype=form.dtype, device=device)
    scale, inverse = torch.empty(2, batch, pixels, dtype=torch.float32, device=device)
    digest = torch.empty(batch, pixels, dtype=torch.int64, device=device) if digests else None
    blocks = -(-pixels // _BLOCK)
    _triton.launch(
        pack_rows,
        batch * blocks,
        image,
        scale if order is None else order,
        *image.stride(),
        width,
        channels,
        pixels,
        blocks,
        max(eps, _TINY),
        packed,
        scale,
        inverse,
        tensor_or(digest, scale),
        BLOCK=_BLOCK,
        CHUNK=form.piece,
        PADDED=form.padded,
        ORDERED=order is not None,
        SPLIT=form.split,
        DIGEST=digests,
        num_warps=4,
    )
    return Rows(image, packed, scale, inverse, order, digest)
