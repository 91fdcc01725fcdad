"""Kernels of `rectified_cross_entropy`: a cell of low-resolution points per thread, loss and gradient in one
pass over the pixels, in which the classes are gone through twice.

Work: for a pixel and class, with 4 x 4 pixels of a thread, the sum of exponentials takes 10 instructions and
an exponential, the gradient 16 and another one: at B = 16, K = 19, 721 x 721 that is 28 x 158 M = 4.4 G
instructions of 132 x 128 lanes at 1.75 GHz, 150 us, a sixteenth of it again for the cells between bands and a
thirtieth for those between tiles; the exponentials alone take 84 us, logits, labels and gradient (96 MB) 22.

The exponentials are taken relative to the largest corner of a cell so far, which bounds all its pixels. Where
a pixel lies so far below that its sum gets tiny, the maximum of each pixel is found first.

So it is, too, for the probabilities by which hard pixels are chosen: equal logits must have equal ones, and
three launches must find the same, to the last bit. There is no product in them that a compiler might fuse
with a sum. Loss and gradient of the chosen are then those that the same pixels have without the choice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._upsample_triton import (
    AXES,
    between,
    corner_sums,
    count_equal,
    divisor_of,
    first_pixel,
    fraction_in,
    load_corners,
    load_labels,
    load_pixels,
    offset,
    pass_on,
    pick,
    upsample_cell,
    upsample_pixels,
)

DIGITS = 2**16
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
LOSS, GRADIENT, PIXELS, HISTOGRAM = (tl.constexpr(task) for task in range(4))
NO_WEIGHT, BY_CLASSES, OWN = (tl.constexpr(weight) for weight in range(3))
_SIMILARITY_AXES = tuple(f"similarity_{name}" for name in AXES)

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
    *("slots", *_SIMILARITY_AXES, "similarity_b", "similarity_s", "similarity_y", "similarity_x"),
    *("classes_b", "classes_s", "given_b", "given_y", "given_x", "grad_b", "grad_k", "grad_y", "grad_x"),
    *("ignore_index", "pixels", "bands", "tiles", "start"),
)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def cross_entropy(  # type: ignore[no-untyped-def]
    logits,  # [B,K,h,w]
    labels,  # [B,H,W] uint8, int32 or int64
    similarity,  # [B,S,h',w'], with a WEIGHT
    classes,  # [B,S] int32 or int64, with a WEIGHT by classes
    given,  # [B,H,W] float32, gradient of each pixel, where RECOMPUTE
    limit,  # [] float32, largest probability of a pixel that is kept, where HARD
    state,  # [3] int64, as of count_labels; pixels that are kept are added to the third, where HARD
    search,  # [2] int64, for histograms: leading digits and rank
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
    slots,
    similarity_n_y,
    similarity_m_y,
    similarity_step_y,
    similarity_shift_y,
    similarity_whole_y,
    similarity_n_x,
    similarity_m_x,
    similarity_step_x,
    similarity_shift_x,
    similarity_whole_x,
    similarity_b,
    similarity_s,
    similarity_y,
    similarity_x,
    classes_b,
    classes_s,
    given_b,
    given_y,
    given_x,
    grad_b,
    grad_k,
    grad_y,
    grad_x,
    ignore_index,
    pixels,  # what the gradient is divided by, without a COUNT
    bands,
    tiles,
    start,  # number of the first program
    # outputs
    carry,  # [programs,2,K,CELLS] float32, workspace, where GRADIENT
    partial,  # [start + programs] float64, sums of the losses
    grad,  # [B,K,h,w], where GRADIENT
    loss,  # [B,H,W] float32, where PIXELS
    histogram,  # [copies,65536] int64, added to, where HISTOGRAM
    TASK: tl.constexpr,
    WEIGHT: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    HARD: tl.constexpr,
    COUNT: tl.constexpr,  # as in divisor_of
    WORD: tl.constexpr,  # digit of the probability that is counted
    COPIES: tl.constexpr,
    WHOLE_CELLS: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    CELLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0) + start
    tile = program % tiles
    begin = (program // tiles) % bands * ROWS
    image = (program // (tiles * bands)).to(tl.int64)
    logits += image * stride_b
    labels += image * labels_b
    lane = tl.arange(0, CELLS)
    if TASK == GRADIENT:
        cell = tile * (CELLS - 1) - 1 + lane
        own = (lane > 0) & (cell < n_x)
        grad += image * grad_b + offset(cell, grad_x, FAR)
        carry += tl.program_id(0).to(tl.int64) * (2 * num_classes * CELLS) + lane
    else:
        cell = tile * CELLS + lane
        own = cell < n_x
    first = first_pixel(cell, n_x, m_x, step_x, shift_x, whole_x, WIDE)
    last = first_pixel(cell + 1, n_x, m_x, step_x, shift_x, whole_x, WIDE)
    left = offset(tl.minimum(tl.maximum(cell, 0), n_x - 1), stride_x, FAR)
    right = offset(tl.minimum(cell + 1, n_x - 1), stride_x, FAR)
    pieces = 1 if WHOLE_CELLS else tl.maximum((tl.max(last - first, 0) + (RX - 1)) // RX, 1)
    factor = 1.0
    if TASK != LOSS and TASK != HISTOGRAM:
        factor = tl.div_rn(1.0, divisor_of(state, pixels, COUNT).to(tl.float32))
    total = tl.zeros([CELLS], tl.float64)
    count = tl.zeros([CELLS], tl.int32)
    end = tl.minimum(begin + ROWS, n_y)
    at = tl.maximum(begin - 1, 0) if TASK == GRADIENT else begin
    before = 0
    while at < end:
        y = first_pixel(at, n_y, m_y, step_y, shift_y, whole_y, WIDE)
        stop = first_pixel(at + 1, n_y, m_y, step_y, shift_y, whole_y, WIDE)
        upper = offset(at, stride_y, FAR)
        lower = offset(tl.minimum(at + 1, n_y - 1), stride_y, FAR)
        pieces_y = 1 if WHOLE_CELLS else tl.maximum((stop - y + (RY - 1)) // RY, 1)
        counted = own & (lane * 0 + at >= begin)
        piece = 0
        while piece < pieces * pieces_y:
            row = y + piece // pieces * RY
            column = first + piece % pieces * RX
            fraction_y = fraction_in(row + tl.arange(0, RY), at, n_y, step_y, shift_y, whole_y, WIDE)[:, None]
            fraction_x = fraction_in(
                column[None, :] + tl.arange(0, RX)[:, None],
                cell[None, :],
                n_x,
                step_x,
                shift_x,
                whole_x,
                WIDE,
            )[None]
            cells = (logits, num_classes, stride_k, upper, lower, left, right, fraction_y, fraction_x)
            label = load_labels(
                labels, row, stop, column, last, labels_y, labels_x, ignore_index, FAR, RY, RX
            )
            if labels.dtype.element_ty.primitive_bitwidth == 64:
                label = tl.minimum(label, num_classes)
            # As numbers that compare in one instruction with those of the classes.
            label = label.to(tl.float32)
            weight = tl.full([RY, RX, CELLS], 1.0, tl.float32)
            if WEIGHT != NO_WEIGHT:
                weight = _weight(
                    *(
                        similarity + image * similarity_b,
                        classes + image * classes_b,
                        slots,
                        label,
                        row,
                        column,
                    ),
                    *(
                        similarity_n_y,
                        similarity_m_y,
                        similarity_step_y,
                        similarity_shift_y,
                        similarity_whole_y,
                    ),
                    *(
                        similarity_n_x,
                        similarity_m_x,
                        similarity_step_x,
                        similarity_shift_x,
                        similarity_whole_x,
                    ),
                    *(similarity_s, similarity_y, similarity_x, classes_s, WEIGHT, WIDE, FAR, RY, RX, CELLS),
                )
            if RECOMPUTE:
                weight *= load_pixels(
                    given + image * given_b, row, stop, column, last, given_y, given_x, FAR, RY, RX
                )
            if HARD or TASK == HISTOGRAM:
                sums, peak, own_logit = _exact_sums(cells, label, FAR)
                probability = tl.div_rn(tl.exp2((own_logit - peak) * _LOG2_E), sums)
                kept = (label >= 0) & (label < num_classes)
                if HARD:
                    kept = kept & ((probability > tl.load(limit)) == 0)
                    label = tl.where(kept, label, -2.0)
                kept = kept & counted[None, None, :]
                count += tl.sum(tl.sum(kept.to(tl.int32), 0), 0)
            if TASK == HISTOGRAM:
                bits = probability.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                digit = (bits >> 16) if WORD == 0 else bits & 0xFFFF
                if WORD == 1:
                    kept = kept & ((bits >> 16) == tl.load(search).to(tl.int32))
                count_equal(histogram + (program % COPIES) * 65536, tl.where(kept, digit, -1))
            else:
                sums, most, own_logit = _bounded_sums(cells, label, FAR)
                # Between 2^-64 and 2^64 no term that counts was lost. With one class the loss is exactly 0.
                fine = (sums > 5.4210109e-20) & (sums < 1.8446744e19)
                fine = fine | (label < 0) | (label >= num_classes)
                walk = (at, before, piece, pieces * pieces_y - 1 - piece, n_y - 1 - at)
                points = (cell, n_x, lane, counted, factor, carry, grad, grad_k, grad_y)
                if (tl.min(tl.min(tl.min(fine.to(tl.int32), 0), 0), 0) > 0) & (num_classes > 1):
                    value = _finish(
                        *(cells, label, sums, most[None, None, :], own_logit, weight, walk, points),
                        *(TASK, False, WHOLE_CELLS, FAR),
                    )
                else:
                    sums, peak, own_logit = _exact_sums(cells, label, FAR)
                    value = _finish(
                        *(cells, label, sums, peak, own_logit, weight, walk, points),
                        *(TASK, True, WHOLE_CELLS, FAR),
                    )
                if TASK == PIXELS:
                    value *= factor
                    i = 0
                    while i < RY:
                        line = pick(value, i)
                        for j in tl.static_range(RX):
                            inside = (column + j < last) & (column * 0 + row + i < stop)
                            place = (image * m_y + row + i) * m_x + column + j
                            tl.store(loss + place, pick(line, j), mask=inside)
                        i += 1
                else:
                    total += tl.where(counted, tl.sum(tl.sum(value, 0), 0).to(tl.float64), 0.0)
            before = 1
            piece += 1
        at += 1
    if TASK != PIXELS and TASK != HISTOGRAM:
        tl.store(partial + program, tl.sum(total, 0))
        if HARD:
            tl.atomic_add(state + 2, tl.sum(count, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _bounded_sums(cells, label, FAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the classes of 2^(logit log2(e) - most) [RY,RX,CELLS], `most` [CELLS], and the logits of the
    labels; `most` is log2(e) times the largest corner."""
    logits, num_classes, stride_k, upper, lower, left, right, fraction_y, fraction_x = cells
    sums = tl.zeros(label.shape, tl.float32)
    own_logit = tl.zeros(label.shape, tl.float32)
    most = tl.full([label.shape[2]], -3e38, tl.float32)
    k = 0
    while k < num_classes:
        plane = offset(k, stride_k, FAR)
        a, b, c, d = load_corners(logits, plane + upper, plane + lower, left, right)
        logit = between(a, b, c, d, fraction_y, fraction_x)
        larger = tl.maximum(most, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)) * _LOG2_E)
        term = tl.exp2(tl.fma(logit, _LOG2_E, -larger[None, None, :]))
        sums = tl.fma(sums, tl.exp2(most - larger)[None, None, :], term)
        own_logit = tl.where(label == k, logit, own_logit)
        most = larger
        k += 1
    return sums, most, own_logit


@triton.jit
def _exact_sums(cells, label, FAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the classes of e^(logit - most), `most` and the logits of the labels, each [RY,RX,CELLS];
    `most` is the largest logit of the pixel."""
    logits, num_classes, stride_k, upper, lower, left, right, fraction_y, fraction_x = cells
    most = tl.full(label.shape, float("-inf"), tl.float32)
    own_logit = tl.zeros(label.shape, tl.float32)
    k = 0
    while k < num_classes:
        plane = offset(k, stride_k, FAR)
        logit = upsample_cell(logits, plane + upper, plane + lower, left, right, fraction_y, fraction_x)
        most = tl.maximum(most, logit)
        own_logit = tl.where(label == k, logit, own_logit)
        k += 1
    sums = tl.zeros(label.shape, tl.float32)
    k = 0
    while k < num_classes:
        plane = offset(k, stride_k, FAR)
        logit = upsample_cell(logits, plane + upper, plane + lower, left, right, fraction_y, fraction_x)
        sums += tl.exp2((logit - most) * _LOG2_E)
        k += 1
    return sums, most, own_logit


@triton.jit
def _weight(  # type: ignore[no-untyped-def]
    similarity,  # [S,h',w']
    classes,  # [S]
    slots,
    label,  # [RY,RX,CELLS]
    row,
    column,
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
    stride_s,
    stride_y,
    stride_x,
    classes_s,
    WEIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    CELLS: tl.constexpr,
):
    """1 - mean over the valid classes of |1[label = class] - similarity|, or the similarity to the own
    label."""
    gap = tl.zeros([RY, RX, CELLS], tl.float32)
    valid = 0
    slot = 0
    while slot < slots:
        likeness = upsample_pixels(
            *(similarity + offset(slot, stride_s, FAR), row, column, n_y, m_y, step_y, shift_y, whole_y),
            *(n_x, m_x, step_x, shift_x, whole_x, stride_y, stride_x, WIDE, FAR, RY, RX),
        )
        likeness = tl.maximum(tl.minimum(likeness, 1.0, tl.PropagateNan.ALL), 0.0, tl.PropagateNan.ALL)
        if WEIGHT == OWN:
            gap = likeness
        else:
            of = tl.load(classes + offset(slot, classes_s, FAR)).to(tl.int64)
            distance = tl.abs(tl.where(label == of, 1.0, 0.0) - likeness)
            gap += tl.where(label * 0 + of >= 0, distance, 0.0)
            valid += (of >= 0).to(tl.int32)
        slot += 1
    if WEIGHT == OWN:
        return gap
    return 1.0 - tl.div_rn(gap, gap * 0 + tl.maximum(valid, 1).to(tl.float32))


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    cells,
    label,  # [RY,RX,CELLS], not in [0,K) where none
    sums,  # [RY,RX,CELLS], as of _bounded_sums or, where EXACT, of _exact_sums
    most,
    own_logit,
    weight,  # [RY,RX,CELLS]
    walk,
    points,
    TASK: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE_CELLS: tl.constexpr,
    FAR: tl.constexpr,
):
    """Loss of each pixel, 0 where there is none; adds to the gradient."""
    logits, num_classes, stride_k, upper, lower, left, right, fraction_y, fraction_x = cells
    exponent = (own_logit - most) * _LOG2_E if EXACT else tl.fma(own_logit, _LOG2_E, -most)
    kept = (label >= 0) & (label < num_classes)
    value = tl.where(kept, (tl.log2(sums) - exponent) * _LN_2 * weight, 0.0)
    if TASK == GRADIENT:
        at, before, piece, pieces_left, rows_left = walk
        cell, n_x, lane, counted, factor, carry, grad, grad_k, grad_y = points
        own_slope = tl.where(kept, -weight, 0.0)
        share = tl.where(kept, weight / sums, 0.0)
        k = 0
        while k < num_classes:
            plane = offset(k, stride_k, FAR)
            logit = upsample_cell(logits, plane + upper, plane + lower, left, right, fraction_y, fraction_x)
            exponent = (logit - most) * _LOG2_E if EXACT else tl.fma(logit, _LOG2_E, -most)
            # Finite, that a pixel which is not kept adds 0; one that is kept has its NaN in `share`.
            term = tl.minimum(tl.exp2(exponent), 1e30)
            slope = tl.fma(term, share, tl.where(label == k, own_slope, 0.0))
            above, beneath = corner_sums(slope, fraction_y, fraction_x, cell, n_x, lane)
            pass_on(
                above,
                beneath,
                carry + (at % 2 * num_classes + k) * lane.shape[0],
                carry + ((at + 1) % 2 * num_classes + k) * lane.shape[0],
                before,
                piece,
                pieces_left,
                rows_left,
                counted,
                factor,
                grad + (tl.cast(k, tl.int64) * grad_k + tl.cast(at, tl.int64) * grad_y),
                WHOLE_CELLS,
            )
            k += 1
    return value


@triton.jit(do_not_specialize=["min_kept"])
def select(  # type: ignore[no-untyped-def]
    histogram,  # [256,256] int64
    groups,  # [256] int64, its sums
    state,  # [3] int64, as of count_labels
    min_kept,
    threshold,
    # outputs
    search,  # [2] int64, leading digits and rank; read and written
    limit,  # [] float32, after the last digit
    WORD: tl.constexpr,
):
    """Find the digit in which the probability of that rank lies."""
    lane = tl.arange(0, 256)
    rank = tl.load(search + 1) if WORD > 0 else tl.load(state) * 0 + min_kept
    sizes = tl.load(groups + lane)
    up_to = tl.cumsum(sizes, 0)
    group = tl.minimum(tl.sum((up_to < rank).to(tl.int32), 0), 255)
    rank -= tl.sum(tl.where(lane < group, sizes, 0), 0)
    sizes = tl.load(histogram + group * 256 + lane)
    up_to = tl.cumsum(sizes, 0)
    digit = tl.minimum(tl.sum((up_to < rank).to(tl.int32), 0), 255)
    rank -= tl.sum(tl.where(lane < digit, sizes, 0), 0)
    digit = group * 256 + digit
    if WORD == 0:
        tl.store(search, digit.to(tl.int64))
        tl.store(search + 1, rank)
    else:
        smallest = ((tl.load(search).to(tl.int32) << 16) | digit).to(tl.float32, bitcast=True)
        least = tl.maximum(smallest, threshold, tl.PropagateNan.ALL)
        tl.store(limit, tl.where(tl.load(state) < min_kept, float("inf"), least))
