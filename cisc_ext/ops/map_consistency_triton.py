"""`map_consistency` in Triton: a cell of low-resolution points per thread, loss and gradient in one pass.

Work: at B = 16, S = 1, 721 x 721 there are 8.3 M pixels of some 60 instructions with the gradient (labels,
interpolation, logarithm, division, adjoint): 17 us of 132 x 128 lanes at 1.75 GHz; the bytes, mostly labels
read twice, are 21 MB, 5 us.
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
    Plan,
    corner_sums,
    divisor_of,
    far,
    first_pixel,
    fraction_in,
    launch_count,
    launch_finish,
    load_labels,
    offset,
    pass_on,
    upsample_cell,
)

_NAME = "map_consistency"
_TILES = Tiles(
    _NAME,
    (
        Row({"CELLS": 32, "ROWS": 2, "num_warps": 1}, at_most={"rows": 4096}),
        Row({"CELLS": 32, "ROWS": 4, "num_warps": 1}, at_most={"rows": 12288}),
        Row({"CELLS": 32, "ROWS": 12, "num_warps": 1}),
    ),
    ({"CELLS": 32, "ROWS": 8, "num_warps": 1}, {"CELLS": 64, "ROWS": 8, "num_warps": 2}),
)
_UNSPECIALIZED = (
    *("slots", *AXES, "stride_b", "stride_s", "stride_y", "stride_x", "labels_b", "labels_y", "labels_x"),
    *("classes_b", "classes_s", "ignore_index", "bands", "tiles", "start"),
)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _consistency(  # type: ignore[no-untyped-def]
    similarity,  # [B,S,h,w]
    labels,  # [B,H,W] uint8, int32 or int64
    classes,  # [B,S] int32 or int64
    state,  # [2] int64, as of count_labels
    slots,
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
    stride_s,
    stride_y,
    stride_x,
    labels_b,
    labels_y,
    labels_x,
    classes_b,
    classes_s,
    ignore_index,
    bands,
    tiles,
    start,  # number of the first program
    # outputs
    carry,  # [programs,2,S,CELLS] float32, workspace
    partial,  # [start + programs] float64, sums of the losses
    grad,  # [B,S,h,w] float32
    GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    CELLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0) + start
    tile = program % tiles
    row = (program // tiles) % bands * ROWS
    image = (program // (tiles * bands)).to(tl.int64)
    similarity += image * stride_b
    labels += image * labels_b
    classes += image * classes_b
    lane = tl.arange(0, CELLS)
    if GRAD:
        cell = tile * (CELLS - 1) - 1 + lane
        own = (lane > 0) & (cell < n_x)
        grad += (image * slots * n_y) * n_x + cell
        carry += tl.program_id(0).to(tl.int64) * (2 * slots * CELLS) + lane
    else:
        cell = tile * CELLS + lane
        own = cell < n_x
    first = first_pixel(cell, n_x, m_x, step_x, shift_x, whole_x, WIDE)
    last = first_pixel(cell + 1, n_x, m_x, step_x, shift_x, whole_x, WIDE)
    left = offset(tl.minimum(tl.maximum(cell, 0), n_x - 1), stride_x, FAR)
    right = offset(tl.minimum(cell + 1, n_x - 1), stride_x, FAR)
    pieces = tl.maximum((tl.max(last - first, 0) + (RX - 1)) // RX, 1)
    valid = 0
    slot = 0
    while slot < slots:
        valid += (tl.load(classes + offset(slot, classes_s, FAR)) >= 0).to(tl.int32)
        slot += 1
    share = tl.div_rn(1.0, tl.maximum(valid, 1).to(tl.float32))
    factor = share
    if GRAD:
        factor = tl.div_rn(share, divisor_of(state, 0, 0).to(tl.float32))
    total = tl.zeros([CELLS], tl.float64)
    end = tl.minimum(row + ROWS, n_y)
    begin = row
    at = tl.maximum(row - 1, 0) if GRAD else row
    before = 0
    while at < end:
        y = first_pixel(at, n_y, m_y, step_y, shift_y, whole_y, WIDE)
        stop = first_pixel(at + 1, n_y, m_y, step_y, shift_y, whole_y, WIDE)
        upper = offset(at, stride_y, FAR)
        lower = offset(tl.minimum(at + 1, n_y - 1), stride_y, FAR)
        pieces_y = tl.maximum((stop - y + (RY - 1)) // RY, 1)
        piece = 0
        while piece < pieces * pieces_y:
            rows = y + piece // pieces * RY + tl.arange(0, RY)
            x = first[None, :] + piece % pieces * RX + tl.arange(0, RX)[:, None]
            fraction_y = fraction_in(rows, at, n_y, step_y, shift_y, whole_y, WIDE)[:, None]
            fraction_x = fraction_in(x, cell[None, :], n_x, step_x, shift_x, whole_x, WIDE)[None]
            label = load_labels(
                *(labels, y + piece // pieces * RY, stop, first + piece % pieces * RX, last),
                *(labels_y, labels_x, ignore_index, FAR, RY, RX),
            )
            counted = own & (lane * 0 + at >= begin)
            slot = 0
            while slot < slots:
                target = tl.load(classes + offset(slot, classes_s, FAR)).to(tl.int64)
                plane = offset(slot, stride_s, FAR)
                p = upsample_cell(
                    similarity, plane + upper, plane + lower, left, right, fraction_y, fraction_x
                )
                # No label of 32 bits is a class beyond them.
                positive = (label == target.to(label.dtype)) & (target.to(label.dtype) == target)
                loss, slope = _cross_entropy(p, positive)
                wanted = (label >= -1) & (target >= 0)
                pixel = tl.where(wanted, loss, 0.0)
                sums = tl.sum(tl.sum(pixel, 0), 0).to(tl.float64)
                total += tl.where(counted, sums, 0.0)
                if GRAD:
                    slope = tl.where(wanted, slope, 0.0)
                    above, beneath = corner_sums(slope, fraction_y, fraction_x, cell, n_x, lane)
                    pass_on(
                        above,
                        beneath,
                        carry + (at % 2 * slots + slot) * CELLS,
                        carry + ((at + 1) % 2 * slots + slot) * CELLS,
                        before,
                        piece,
                        pieces * pieces_y - 1 - piece,
                        n_y - 1 - at,
                        counted,
                        factor,
                        grad + (tl.cast(slot, tl.int64) * n_y + at) * n_x,
                        False,
                    )
                slot += 1
            before = 1
            piece += 1
        at += 1
    tl.store(partial + program, tl.sum(total, 0) * share.to(tl.float64))


@triton.jit
def _cross_entropy(p, positive):  # type: ignore[no-untyped-def]
    """-log p where `positive`, else -log(1 - p), at most 100; and its derivative, 0 outside (0,1)."""
    bounded = tl.maximum(tl.minimum(p, 1.0, tl.PropagateNan.ALL), 0.0, tl.PropagateNan.ALL)
    complement = 1.0 - bounded
    probability = tl.where(positive, bounded, complement)
    # What 1 - p lost by rounding is to its logarithm, too, what it is to p: log(1 - p) as good as log1p.
    lost = tl.where(positive, 0.0, (1.0 - complement) - bounded)
    loss = -tl.log(probability) - lost
    slope = tl.where(positive, -1.0, 1.0) / probability
    slope = tl.where((p <= 0.0) | (p >= 1.0) | (loss > 100.0), 0.0, slope)
    return tl.minimum(loss, 100.0, tl.PropagateNan.ALL), slope


def forward(
    similarity: Tensor,  # [B,S,h,w]
    labels: Tensor,  # [B,H,W]
    classes: Tensor,  # [B,S]
    ignore_index: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:  # [], and [B,S,h,w] or [0]
    """Loss and gradient, as the reference's."""
    batch, slots, h, w = similarity.shape
    height, width = labels.shape[1:]
    device = similarity.device
    if device.type == "cpu" or os.environ.get("CISC_CHECK") == "1":
        checks.class_values(_NAME, classes)
    loss = torch.empty((), dtype=torch.float32, device=device)
    pixels = height * width > 0
    grad = torch.empty(similarity.shape if need_grad else (0,), dtype=torch.float32, device=device)
    state = torch.zeros(2, dtype=torch.int64, device=device)
    launch_count(labels, classes, ignore_index, None, state)
    rows, columns = Axis.of(h, height, False), Axis.of(w, width, False)

    def launch(tile: Tile) -> Tensor:
        images = batch if pixels and slots > 0 else 0
        plan = Plan.of(images, h, w, slots, tile["ROWS"], tile["CELLS"], need_grad)
        partial = torch.empty(plan.programs, dtype=torch.float64, device=device)
        carry = torch.empty(plan.carry, dtype=torch.float32, device=device)
        for start in plan.starts():
            _triton.launch(
                _consistency,
                min(plan.chunk, plan.programs - start),
                similarity,
                labels,
                classes,
                state,
                slots,
                *rows.arguments,
                *columns.arguments,
                *_triton.strides(similarity, labels, classes),
                ignore_index,
                plan.bands,
                plan.tiles,
                start,
                carry,
                partial,
                grad,
                GRAD=need_grad,
                WIDE=rows.wide or columns.wide,
                FAR=far(similarity) or far(labels) or far(classes),
                RY=rows.piece,
                RX=columns.piece,
                **tile,
            )
        return partial

    shape = {"S": slots, "H": height, "W": width, "h": h, "w": w, "rows": batch * h * triton.cdiv(w, 32)}
    shape |= {"gradient": int(need_grad), "bytes": similarity.itemsize}
    partial = _TILES.run(launch, _triton.capability(device), device, shape)
    launch_finish(partial, state, 0, 0, loss)
    # Without pixels the loss is 0, or NaN for a wrong class, and so is its gradient.
    return loss, grad if pixels else grad.copy_(loss)
