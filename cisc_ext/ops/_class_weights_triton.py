"""What masked_average_pool weights features with, by a Triton kernel: the adjoint of the bilinear upsampling
(`align_corners=False`) of 1[labels = class], and the pixels of each class.

A weight is a sum of integers over 4 H W, so that it is exact and in no order. A program gathers those of a
part of a row of features: at a quarter of the labels' resolution, 8 x 8 labels for each pixel, which are read
once and looked at once for each class that is there, about 4 instructions a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton

_WEIGHT_BYTES = 32 * 2**20
"""Of the weights that are there at a time, unless those of one row of an image are more."""
_TAPS = 64
_MOST_TAPS = 256
_MOST_SLOTS = 128
_BINS = 256
_INT32 = 2**31


@triton.jit
def _hat(x, i, n, m):  # type: ignore[no-untyped-def]
    """2 m times the weight with which output x of m takes input i of n; output x must exist."""
    t = (2 * x + 1) * n - m - 2 * m * i
    t = tl.where(i == 0, tl.maximum(t, 0), t)
    t = tl.where(i == n - 1, tl.minimum(t, 0), t)
    return tl.maximum(2 * m - tl.abs(t), 0)


@triton.jit
def _first_tap(i, n, m):  # type: ignore[no-untyped-def]
    """The first output of m that takes anything from input i of n."""
    numerator = (2 * i - 1) * m - n
    return tl.where(numerator < 0, 0, tl.maximum(numerator, 0) // (2 * n) + 1)


@triton.jit
def _taps(  # type: ignore[no-untyped-def]
    labels,  # one image's
    stride_y,
    stride_x,
    row,  # scalar
    column,  # [PB]
    first_y,  # scalar
    first_x,  # [PB]
    h,
    w,
    height,
    width,
    TY: tl.constexpr,
    TX: tl.constexpr,
    NARROW: tl.constexpr,
):
    """The labels [TY*TX,PB] of outputs from (first_y, first_x), and 4 H W times their weights."""
    tap = tl.arange(0, TY * TX)
    y = (first_y + tap // TX)[:, None]
    x = first_x[None, :] + (tap % TX)[:, None]
    there = (y < height) & (x < width) & (column < w)[None, :]
    weight = tl.where(there, _hat(y, row, h, height) * _hat(x, column[None, :], w, width), 0)
    at = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    label = tl.load(labels + at, mask=weight > 0, other=0)
    return label.to(tl.int32 if NARROW else tl.int64), weight


@triton.jit(
    do_not_specialize=[
        *("batch", "h", "w", "height", "width"),
        *("first_image", "first_row", "rows", "column_blocks", "taps_y", "taps_x", "whole"),
    ]
)
def _weights(  # type: ignore[no-untyped-def]
    labels,  # [B,H,W] uint8, int32 or int64
    classes,  # [B,S] int32 or int64
    # outputs
    weights,  # [images,S or S+1,rows*w], of images and rows of this launch; the last row: any of the classes
    totals,  # [B*S+1] int64, added to: 4 H W times the pixels of each class; how many classes are below -1
    label_b,
    label_y,
    label_x,
    class_b,
    class_s,
    batch,
    slots,
    h,
    w,
    height,
    width,
    first_image,
    first_row,
    rows,
    pixels,  # rows * w
    any_class,  # slots * pixels
    image_weights,
    column_blocks,
    taps_y,
    taps_x,
    whole,  # 4 H W
    PB: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    SB: tl.constexpr,
    BINS: tl.constexpr,
    ONE: tl.constexpr,  # class
    SINGLE: tl.constexpr,  # all taps fit into [TY,TX]
    NARROW: tl.constexpr,  # labels are no int64
    WIDE: tl.constexpr,  # weights may not fit into int32
    COUNT: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % column_blocks
    local_row = pid // column_blocks % rows
    local_image = (pid // column_blocks // rows).to(tl.int64)
    image = first_image + local_image
    row = first_row + local_row
    column = block * PB + tl.arange(0, PB)
    inside = column < w
    at = local_row.to(tl.int64) * w + column
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    first_y = _first_tap(row, h, height)
    first_x = _first_tap(column, w, width)
    labels += image * label_b
    classes += image * class_b
    weights += local_image * image_weights
    totals_here = totals + image * slots
    used = tl.zeros([PB], tl.int32)
    if SINGLE:
        label, weight = _taps(
            labels, label_y, label_x, row, column, first_y, first_x, h, w, height, width, TY, TX, NARROW
        )
        if not ONE:
            bins = tl.histogram(tl.reshape((label & (BINS - 1)).to(tl.int32), [TY * TX * PB]), BINS)
    for first in range(0, slots, SB):
        slot = tl.arange(0, SB)
        value = tl.load(classes + (first + slot) * class_s, mask=first + slot < slots, other=-1).to(tl.int64)
        if COUNT and (row == 0) & (block == 0):
            tl.atomic_add(totals + batch * slots, tl.sum((value < -1).to(tl.int64)), sem="relaxed")
        present = value >= 0
        if NARROW:
            present = present & (value < 2147483648)
        if SINGLE and not ONE:
            present = present & (tl.gather(bins, (value & (BINS - 1)).to(tl.int32), 0) > 0)
        absent = (first + slot < slots) & (present == 0)
        tl.store(
            weights + (first + slot).to(tl.int64)[:, None] * pixels + at[None, :],
            tl.zeros([SB, PB], tl.float32),
            mask=absent[:, None] & inside[None, :],
        )
        s = tl.min(tl.where(present, slot, SB))
        while s < SB:
            target = tl.load(classes + (first + s) * class_s).to(tl.int32 if NARROW else tl.int64)
            total = tl.zeros([PB], tl.int64 if WIDE else tl.int32)
            if SINGLE:
                total += tl.sum(tl.where(label == target, weight, 0), 0)
            else:
                for y in range(0, taps_y, TY):
                    for x in range(0, taps_x, TX):
                        label, weight = _taps(
                            labels,
                            label_y,
                            label_x,
                            row,
                            column,
                            first_y + y,
                            first_x + x,
                            h,
                            w,
                            height,
                            width,
                            TY,
                            TX,
                            NARROW,
                        )
                        total += tl.sum(tl.where(label == target, weight, 0), 0)
            share = tl.div_rn(total.to(tl.float32), whole + tl.zeros([PB], tl.float32))
            tl.store(weights + (first + s).to(tl.int64) * pixels + at, share, mask=inside)
            used = tl.maximum(used, (total > 0).to(tl.int32))
            if COUNT:
                everything = tl.sum(total.to(tl.int64))
                tl.atomic_add(totals_here + first + s, everything, mask=everything > 0, sem="relaxed")
            s = tl.min(tl.where(present & (slot > s), slot, SB))
    if not ONE:
        tl.store(weights + any_class + at, used.to(tl.float32), mask=inside)


class Piece(NamedTuple):
    """Images and rows of features whose weights are there together."""

    image: int
    images: int
    row: int
    rows: int


def _pieces(batch: int, h: int, w: int, slots: int) -> list[Piece]:
    row_bytes = (slots + 1) * w * 4
    rows = min(h, max(1, _WEIGHT_BYTES // row_bytes))
    images = max(1, _WEIGHT_BYTES // (row_bytes * h))
    return [
        Piece(image, min(images, batch - image), row, min(rows, h - row))
        for image in range(0, batch, images)
        for row in range(0, h, rows)
    ]


class ClassWeights:
    """The weights of pieces of a batch, and the pixels of its classes."""

    def __init__(self, labels: Tensor, classes: Tensor, h: int, w: int) -> None:
        """labels: [B,H,W], classes: [B,S]."""
        self.labels, self.classes, self.h, self.w = labels, classes, h, w
        self.batch, self.slots = classes.shape
        height, width = labels.shape[1:]
        self.whole = 4 * height * width
        self.pieces = _pieces(self.batch, h, w, self.slots)
        self.held: Piece | None = None
        self.lines = 1 if self.slots == 1 else self.slots + 1
        most = max((piece.images * piece.rows for piece in self.pieces), default=0)
        self.values = labels.new_empty(most * self.lines * w, dtype=torch.float32)
        self.totals = labels.new_zeros(self.batch * self.slots + 1, dtype=torch.int64)

    def launch(self, piece: Piece, *, count: bool) -> None:
        """Fill the weights [images,lines,rows*w] of a piece; `count` its pixels."""
        height, width = self.labels.shape[1:]
        taps_y, taps_x = (min(m, -(-2 * m // n)) for n, m in ((self.h, height), (self.w, width)))
        tile_x, tile_y = _triton.next_power_of_2(taps_x), _triton.next_power_of_2(taps_y)
        # Of several classes, those that are not there are passed over if all taps are at hand.
        if tile_x * tile_y > (_TAPS if self.slots == 1 else _MOST_TAPS):
            tile_x = min(tile_x, _TAPS)
            tile_y = min(tile_y, _TAPS // tile_x)
        block = min(32, _triton.next_power_of_2(self.w))
        single = taps_y <= tile_y and taps_x <= tile_x
        column_blocks = -(-self.w // block)
        products = (
            2 * height * (taps_y + 2) * 2 * width * (taps_x + 2),
            4 * height * self.h,
            4 * width * self.w,
        )
        pixels = piece.rows * self.w
        _triton.launch(
            _weights,
            piece.images * piece.rows * column_blocks,
            self.labels,
            self.classes,
            self.values,
            self.totals,
            *_triton.strides(self.labels, self.classes),
            self.batch,
            self.slots,
            self.h,
            self.w,
            height,
            width,
            piece.image,
            piece.row,
            piece.rows,
            pixels,
            self.slots * pixels,
            self.lines * pixels,
            column_blocks,
            taps_y,
            taps_x,
            self.whole,
            PB=block,
            TY=tile_y,
            TX=tile_x,
            SB=min(_triton.next_power_of_2(self.slots), _MOST_SLOTS),
            BINS=_BINS,
            ONE=self.slots == 1,
            SINGLE=single,
            NARROW=self.labels.dtype != torch.int64,
            WIDE=max(products) >= _INT32,
            COUNT=count,
            num_warps=16 if tile_y * tile_x > _TAPS else 4 if single else 8,
        )

    def counted(self) -> Iterator[list[Piece]]:
        """The pieces of one image after another, or of several at once, when their pixels are counted."""
        for image in dict.fromkeys(piece.image for piece in self.pieces):
            pieces = [piece for piece in self.pieces if piece.image == image]
            for piece in pieces:
                self.launch(piece, count=True)
            self.held = pieces[-1]
            yield pieces

    def again(self, piece: Piece) -> None:
        """Have the weights of a piece, which is counted."""
        if piece != self.held:
            self.launch(piece, count=False)
            self.held = piece
