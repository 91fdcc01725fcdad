"""`predict` in Triton: a cell of low-resolution points per thread, the classes one after another.

Work: an interpolation costs 3 instructions per pixel and class where a thread has 4 x 4 pixels, the argmax 3
more (a maximum that keeps NaN, a comparison of bits, a selection) and addresses 1.5. At B = 16, K = 19,
721 x 721 that is 1.2 G instructions of 132 x 128 lanes at 1.75 GHz, 40 us; logits, labels and classes are
56 MB, 13 us.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks as checks
from . import _triton
from ._tiles import Row, Tile, Tiles
from ._upsample_triton import (
    AXES,
    Axis,
    count_equal,
    far,
    first_pixel,
    fraction_in,
    load_labels,
    offset,
    pick,
    upsample_cell,
)

_NAME = "predict"
_COPIES, _COPIES_BYTES = 256, 16 * 2**20
_BINS, _FEW = 64, 32
_FILL = 1024
_FINISHING_PROGRAMS = 264

_TILES = Tiles(
    _NAME,
    (Row({"CELLS": 32, "ROWS": 4, "num_warps": 1, "maxnreg": 168}),),
    ({"CELLS": 32, "ROWS": 1, "num_warps": 1, "maxnreg": 168}, {"CELLS": 64, "ROWS": 4, "num_warps": 2}),
)
_UNSPECIALIZED = (
    *(
        "num_classes",
        *AXES,
        "stride_b",
        "stride_k",
        "stride_y",
        "stride_x",
        "labels_b",
        "labels_y",
        "labels_x",
    ),
    *("ignore_index", "bands", "tiles", "copies"),
)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _predict(  # type: ignore[no-untyped-def]
    logits,  # [B,K,h,w]
    labels,  # [B,H,W], or anything without LABELS
    num_classes,
    n_y,
    m_y,
    step_y,
    shift_y,
    whole_y,
    n_x,
    m_x,
    step_x,
    shift_x,
    whole_x,
    stride_b,
    stride_k,
    stride_y,
    stride_x,
    labels_b,
    labels_y,
    labels_x,
    ignore_index,
    bands,
    tiles,
    copies,
    # outputs
    classes,  # [B,H,W] uint8
    counts,  # [copies,K,K] int64, added to
    wrong,  # [1] int64, set where a label is wrong
    LABELS: tl.constexpr,
    WHOLE_CELLS: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    CELLS: tl.constexpr,
    ROWS: tl.constexpr,
    SOME_NAN: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    band = (program // tiles) % bands
    image = (program // (tiles * bands)).to(tl.int64)
    logits += image * stride_b
    classes += image * m_y * m_x
    labels += image * labels_b
    counts += (program % copies).to(tl.int64) * num_classes * num_classes
    cell = tile * CELLS + tl.arange(0, CELLS)
    first = first_pixel(cell, n_x, m_x, step_x, shift_x, whole_x, WIDE)
    last = first_pixel(cell + 1, n_x, m_x, step_x, shift_x, whole_x, WIDE)
    left = offset(tl.minimum(cell, n_x - 1), stride_x, FAR)
    right = offset(tl.minimum(cell + 1, n_x - 1), stride_x, FAR)
    pieces_x = 1 if WHOLE_CELLS else (tl.max(last - first, 0) + (RX - 1)) // RX
    row = band * ROWS
    end = tl.minimum(row + ROWS, n_y)
    while row < end:
        y = first_pixel(row, n_y, m_y, step_y, shift_y, whole_y, WIDE)
        stop = first_pixel(row + 1, n_y, m_y, step_y, shift_y, whole_y, WIDE)
        upper = offset(row, stride_y, FAR)
        lower = offset(tl.minimum(row + 1, n_y - 1), stride_y, FAR)
        while y < stop:
            rows = y + tl.arange(0, RY)
            fraction_y = fraction_in(rows, row, n_y, step_y, shift_y, whole_y, WIDE)[:, None]
            piece = 0
            while piece < pieces_x:
                x = first[None, :] + piece * RX + tl.arange(0, RX)[:, None]
                fraction_x = fraction_in(x, cell[None, :], n_x, step_x, shift_x, whole_x, WIDE)[None]
                found = _argmax(
                    *(logits, num_classes, stride_k, upper, lower, left, right, fraction_y, fraction_x),
                    *(FAR, RY, RX, CELLS, SOME_NAN),
                )
                i = 0
                while i < RY:
                    line = pick(found, i)
                    for j in tl.static_range(RX):
                        column = first + piece * RX + j
                        inside = (column < last) & (column * 0 + y + i < stop)
                        place = offset(y + i, m_x, FAR) + column
                        tl.store(classes + place, pick(line, j).to(tl.uint8), mask=inside)
                    i += 1
                if LABELS:
                    label = load_labels(
                        *(labels, y, stop, first + piece * RX, last, labels_y, labels_x, ignore_index),
                        *(FAR, RY, RX),
                    )
                    outside = (label == -1) | (label >= num_classes)
                    tl.store(wrong, 1, mask=tl.sum(tl.sum(tl.sum(outside.to(tl.int32), 0), 0), 0) > 0)
                    pair = tl.where(outside | (label < 0), -1, label.to(tl.int32) * num_classes + found)
                    count_equal(counts, pair)
                piece += 1
            y += RY
        row += 1


@triton.jit
def _argmax(  # type: ignore[no-untyped-def]
    image,  # [K,h,w]
    num_classes,
    stride_k,
    upper,
    lower,
    left,  # [CELLS]
    right,  # [CELLS]
    fraction_y,  # [RY,1]
    fraction_x,  # [1,RX,CELLS]
    FAR: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    CELLS: tl.constexpr,
    SOME_NAN: tl.constexpr,  # NaN has more than one pattern
):
    """Class of the largest value [RY,RX,CELLS]: the lowest of equals, or that of the first NaN."""
    best = tl.full([RY, RX, CELLS], float("-inf"), tl.float32)
    found = tl.zeros([RY, RX, CELLS], tl.int32)
    k = num_classes - 1
    plane = offset(k, stride_k, FAR)
    while k >= 0:
        value = upsample_cell(image, plane + upper, plane + lower, left, right, fraction_y, fraction_x)
        if SOME_NAN:
            value = tl.where(value == value, value, float("nan"))
        # In bits, of which NaN has one pattern and 0 has one: the last that is no less stays.
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        found = tl.where(best.to(tl.int32, bitcast=True) == value.to(tl.int32, bitcast=True), k, found)
        plane -= stride_k
        k -= 1
    return found


@triton.jit(do_not_specialize=["bins", "copies", "pixels"])
def _finish(  # type: ignore[no-untyped-def]
    counts,  # [copies,K,K] int64
    wrong,  # [1] int64
    bins,  # K * K
    copies,
    pixels,
    # outputs
    classes,  # [B,H,W] uint8, all 255 if a label is wrong
    confusion,  # [K,K] int64
    BINS: tl.constexpr,
    FEW: tl.constexpr,
    FILL: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    bad = tl.load(wrong) > 0
    at = program * BINS + tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int64)
    start = 0
    while start < copies:
        copy = start + tl.arange(0, FEW)[:, None]
        mask = (copy < copies) & (at < bins)[None]
        total += tl.sum(tl.load(counts + copy.to(tl.int64) * bins + at[None], mask=mask, other=0), 0)
        start += FEW
    tl.store(confusion + at, tl.where(bad, 0, total), mask=at < bins)
    if bad:
        place = program * FILL
        while place < pixels:
            pixel = place + tl.arange(0, FILL)
            tl.store(classes + pixel, tl.full([FILL], 255, tl.uint8), mask=pixel < pixels)
            place += tl.num_programs(0).to(tl.int64) * FILL


def forward(
    logits: Tensor,  # [B,K,h,w]
    height: int,
    width: int,
    labels: Tensor | None,  # [B,H,W]
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [B,H,W] uint8, [K,K] int64 or [0]
    """Classes and their confusion matrix, as the reference's."""
    batch, num_classes, h, w = logits.shape
    device = logits.device
    if labels is not None and (device.type == "cpu" or os.environ.get("CISC_CHECK") == "1"):
        checks.label_values(_NAME, labels, num_classes, ignore_index)
    classes = torch.empty((batch, height, width), dtype=torch.uint8, device=device)
    bins = num_classes * num_classes
    confusion = torch.empty(
        (0,) if labels is None else (num_classes, num_classes), dtype=torch.int64, device=device
    )
    rows, columns = Axis.of(h, height, True), Axis.of(w, width, True)
    copies = max(1, min(_COPIES, _COPIES_BYTES // (8 * bins)))

    def launch(tile: Tile) -> Tensor:
        # [copies * K * K + 1]: the last one is set by a wrong label
        counts = torch.zeros(1 if labels is None else copies * bins + 1, dtype=torch.int64, device=device)
        bands, tiles = triton.cdiv(h, tile["ROWS"]), triton.cdiv(w, tile["CELLS"])
        _triton.launch(
            _predict,
            batch * bands * tiles if height * width > 0 else 0,
            logits,
            classes if labels is None else labels,
            num_classes,
            *rows.arguments,
            *columns.arguments,
            *logits.stride(),
            *(classes if labels is None else labels).stride(),
            ignore_index,
            bands,
            tiles,
            copies,
            classes,
            counts,
            counts[-1:],
            LABELS=labels is not None,
            WHOLE_CELLS=columns.whole_cells,
            WIDE=rows.wide or columns.wide,
            FAR=far(logits) or far(classes) or (labels is not None and far(labels)),
            RY=rows.piece,
            RX=columns.piece,
            SOME_NAN=_triton.INTERPRETED,
            **tile,
        )
        return counts

    shape = {"K": num_classes, "H": height, "W": width, "h": h, "w": w}
    shape |= {"labels": int(labels is not None), "bytes": logits.itemsize}
    counts = _TILES.run(launch, _triton.capability(device), device, shape)
    if labels is not None:
        _triton.launch(
            _finish,
            max(triton.cdiv(bins, _BINS), min(_FINISHING_PROGRAMS, triton.cdiv(classes.numel(), _FILL))),
            counts,
            counts[-1:],
            bins,
            copies,
            classes.numel(),
            classes,
            confusion,
            BINS=_BINS,
            FEW=_FEW,
            FILL=_FILL,
            num_warps=4,
        )
    return classes, confusion
