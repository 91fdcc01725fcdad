"""Softmax of `cross_similarity`, forward and backward.

Forward goes through the guide as the row maximum does, with a running maximum for each of eight running
sums of a row, which are put together every few tiles. Backward compares all pairs again, once with the
query's tiles staying and once with the guide's.

A small temperature magnifies what two cosines differ by, so those of a pair must have the same bits wherever
they are computed: multiplications and additions are not fused here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._cross_products_triton import (
    column_sizes,
    decode,
    load_tile,
    products,
    store_through_norm,
    tile_share,
    unit_vectors,
)
from ._triton import dot, image_offsets


@triton.jit
def _step_softmax(  # type: ignore[no-untyped-def]
    top,
    total,
    weighted,
    t,
    rows_in,
    query_size,
    query,
    high,
    low,
    query_first,
    query_limit,
    guide,
    guide_scale,
    b,
    guide_pixels,
    guide_limit,
    start,
    stop,
    sharpness,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_GUIDE: tl.constexpr,
    LANES: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    first = start + t * BLOCK_GUIDE
    base = (b * guide_pixels).to(tl.int32)
    size = column_sizes(guide_scale, b, guide_pixels, first, stop, BLOCK_GUIDE, WHOLE)
    product = products(
        query, high, low, query_first, query_limit, guide, base + first, guide_limit,
        BLOCK_QUERY, BLOCK_GUIDE, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, False, WIDEN,
    )  # fmt: skip
    # Where one pixel outweighs the others, its cosine is the mean to the last bit.
    product *= size[None, :] * query_size[:, None]
    cosine = product
    if not WHOLE:
        inside = first + tl.arange(0, BLOCK_GUIDE) < stop
        cosine = tl.where(inside[None, :], cosine, float("-inf"))
    cosine = tl.reshape(cosine, [BLOCK_QUERY, BLOCK_GUIDE // LANES, LANES])
    product = tl.reshape(product, [BLOCK_QUERY, BLOCK_GUIDE // LANES, LANES])
    new = tl.maximum(top, tl.where(rows_in[:, None], tl.max(cosine, 1), float("-inf")))
    # Nothing yet: any shift will do.
    safe = tl.where(new == float("-inf"), 0.0, new)
    old = tl.exp2((top - safe) * sharpness)
    total, weighted, top = total * old, weighted * old, new
    # The difference is exact where it matters, and multiplied only then.
    weight = tl.exp2((cosine - safe[:, None, :]) * sharpness)
    total += tl.where(rows_in[:, None], tl.sum(weight, 1), 0.0)
    weighted += tl.where(rows_in[:, None], tl.sum(weight * product, 1), 0.0)
    return top, total, weighted


@triton.jit
def _scan_softmax(  # type: ignore[no-untyped-def]
    top,  # [BLOCK_QUERY]
    total,
    weighted,
    rows_in,
    query_size,
    query,
    high,
    low,
    query_first,
    query_limit,
    guide,
    guide_scale,
    b,
    guide_pixels,
    guide_limit,
    start,
    stop,
    split,
    splits,
    sharpness,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_GUIDE: tl.constexpr,
    LANES: tl.constexpr,
    SUMMED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    begin, whole, end = tile_share(start, stop, split, splits, BLOCK_GUIDE)
    for first in range(begin, end, SUMMED):
        lane_top = tl.full([BLOCK_QUERY, LANES], float("-inf"), tl.float32)
        lane_total = tl.zeros([BLOCK_QUERY, LANES], tl.float32)
        lane_weighted = tl.zeros([BLOCK_QUERY, LANES], tl.float32)
        for t in range(first, tl.minimum(first + SUMMED, whole)):
            lane_top, lane_total, lane_weighted = _step_softmax(
                lane_top, lane_total, lane_weighted, t, rows_in, query_size, query, high, low, query_first,
                query_limit, guide, guide_scale, b, guide_pixels, guide_limit, start, stop, sharpness,
                BLOCK_QUERY, BLOCK_GUIDE, LANES, True, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
            )  # fmt: skip
        if (whole < end) & (first + SUMMED >= end):
            lane_top, lane_total, lane_weighted = _step_softmax(
                lane_top, lane_total, lane_weighted, whole, rows_in, query_size, query, high, low,
                query_first, query_limit, guide, guide_scale, b, guide_pixels, guide_limit, start, stop,
                sharpness,
                BLOCK_QUERY, BLOCK_GUIDE, LANES, False, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
            )  # fmt: skip
        new = tl.maximum(top, tl.max(lane_top, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        old, lane_old = tl.exp2((top - safe) * sharpness), tl.exp2((lane_top - safe[:, None]) * sharpness)
        total = total * old + tl.sum(lane_total * lane_old, 1)
        weighted = weighted * old + tl.sum(lane_weighted * lane_old, 1)
        top = new
    return top, total, weighted


@triton.jit
def sweep_softmax(  # type: ignore[no-untyped-def]
    query,  # [B*n,width]
    query_scale,  # [B,n]
    guide,  # [B*m,width], or a descriptor of it
    guide_scale,  # [B,m]
    starts,
    stops,
    ends,
    query_pixels,
    guide_pixels,
    images,
    slots,
    query_tiles,
    splits,
    sharpness,  # log2(e) / temperature
    # outputs
    tops,  # [splits,B,S,n] float32: the largest cosine, to which the weights are relative
    totals,  # [splits,B,S,n]: sum of the weights
    sums,  # [splits,B,S,n]: sum of weight times cosine
    BLOCK_QUERY: tl.constexpr,
    BLOCK_GUIDE: tl.constexpr,
    LANES: tl.constexpr,
    SUMMED: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Sums for the mean of cosines weighted by exp(cosine / temperature)."""
    tile, split, slot, b = decode(tl.program_id(0), query_tiles, slots, splits)
    first_row = tile * BLOCK_QUERY
    row = first_row + tl.arange(0, BLOCK_QUERY)
    inside = row < query_pixels
    query_first = (b * query_pixels).to(tl.int32) + first_row
    query_limit, guide_limit = images * query_pixels, images * guide_pixels
    WIDTH: tl.constexpr = CHUNK * CHUNKS * (2 if SPLIT else 1)
    high = load_tile(query, query_first, 0, query_limit, BLOCK_QUERY, CHUNK, WIDTH, False)
    low = high
    if SPLIT:
        low = load_tile(query, query_first, CHUNK * CHUNKS, query_limit, BLOCK_QUERY, CHUNK, WIDTH, False)
    size = tl.load(query_scale + b * query_pixels + row, mask=inside, other=0.0)
    top = tl.full([BLOCK_QUERY], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERY], tl.float32)
    weighted = tl.zeros([BLOCK_QUERY], tl.float32)
    if OWN:
        last = tl.minimum(first_row + BLOCK_QUERY, query_pixels)
        run = first_row
        while run < last:
            end = tl.minimum(tl.load(ends + b * query_pixels + run), last)
            start = tl.load(starts + b * query_pixels + run)
            stop = tl.load(stops + b * query_pixels + run)
            top, total, weighted = _scan_softmax(
                top, total, weighted, (row >= run) & (row < end), size, query, high, low, query_first,
                query_limit, guide, guide_scale, b, guide_pixels, guide_limit, start, stop, split, splits,
                sharpness, BLOCK_QUERY, BLOCK_GUIDE, LANES, SUMMED, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
            )  # fmt: skip
            run = end
    else:
        start, stop = tl.load(starts + b * slots + slot), tl.load(stops + b * slots + slot)
        top, total, weighted = _scan_softmax(
            top, total, weighted, inside, size, query, high, low, query_first,
            query_limit, guide, guide_scale, b, guide_pixels, guide_limit, start, stop, split, splits,
            sharpness, BLOCK_QUERY, BLOCK_GUIDE, LANES, SUMMED, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
    out = ((split * images + b) * slots + slot) * query_pixels + row
    tl.store(tops + out, top, mask=inside)
    tl.store(totals + out, total, mask=inside)
    tl.store(sums + out, weighted, mask=inside)


@triton.jit
def combine_softmax(  # type: ignore[no-untyped-def]
    query_order,  # [B,n] int64 where OWN
    tops,  # [splits,B,S,n]
    totals,
    sums,
    query_pixels,
    rows,  # B * S * n
    slots,
    blocks,
    splits,
    sharpness,  # log2(e) / temperature
    stride_b,
    stride_s,
    # outputs
    similarity,  # [B,S,n]
    log_total,  # [B,S,n]: log sum_j exp((cosine_j - similarity) / temperature), -inf where there is none
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
):
    """Put the splits together."""
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = row < query_pixels
    place = plane * query_pixels + row
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(tops + split * rows + place, mask=inside, other=float("-inf")))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        top = tl.load(tops + split * rows + place, mask=inside, other=float("-inf"))
        factor = tl.exp2((top - safe) * sharpness)
        total += tl.load(totals + split * rows + place, mask=inside, other=0.0) * factor
        weighted += tl.load(sums + split * rows + place, mask=inside, other=0.0) * factor
    empty = total == 0.0
    slot, b = plane % slots, plane // slots
    pixel = row.to(tl.int64)
    if OWN:
        pixel = tl.load(query_order + b * query_pixels + row, mask=inside, other=0)
    out = b * stride_b + slot * stride_s + pixel
    mean = tl.where(empty, 0.0, tl.div_rn(weighted, tl.where(empty, 1.0, total)))
    tl.store(similarity + out, mean, mask=inside)
    # Around the mean a logarithm is small, and rounded little; float64 keeps its two large parts apart.
    shift = (safe.to(tl.float64) - mean.to(tl.float64)) * sharpness
    log = tl.log(total.to(tl.float64)) + shift * 0.6931471805599453
    tl.store(log_total + out, log.to(tl.float32), mask=inside)


@triton.jit
def _scan_slopes(  # type: ignore[no-untyped-def]
    result,  # [ROWS,OUT]
    along,  # [ROWS]
    rows_in,
    row_place,  # [ROWS] places in grad, similarity and log_total, where the query's tile stays
    here,
    high,
    low,
    here_size,
    here_first,
    here_limit,
    there,
    there_rows,  # the same, never a descriptor
    there_scale,
    there_order,  # [B,n] int64, where the guide's tile stays and OWN
    column_base,  # of grad, similarity and log_total, where the guide's tile stays
    grad,
    similarity,
    log_total,
    b,
    there_pixels,
    there_limit,
    start,
    stop,
    temperature,
    out_first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT: tl.constexpr,
    TO_GUIDE: tl.constexpr,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    base = (b * there_pixels).to(tl.int32)
    PADDED: tl.constexpr = CHUNK * CHUNKS
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    if not TO_GUIDE:
        row_grad = tl.load(grad + row_place, mask=rows_in, other=0.0)[:, None]
        row_value = tl.load(similarity + row_place, mask=rows_in, other=0.0)[:, None]
        row_log = tl.load(log_total + row_place, mask=rows_in, other=0.0)[:, None]
    for first in range(start, stop, COLUMNS):
        product = products(
            here, high, low, here_first, here_limit, there, base + first, there_limit,
            ROWS, COLUMNS, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, TO_GUIDE, WIDEN,
        )  # fmt: skip
        column = first + tl.arange(0, COLUMNS)
        inside = column < stop
        size = tl.load(there_scale + b * there_pixels + column, mask=inside, other=0.0)
        cosine = product * (size[None, :] * here_size[:, None])
        if TO_GUIDE:
            pixel = column.to(tl.int64)
            if OWN:
                pixel = tl.load(there_order + b * there_pixels + column, mask=inside, other=0)
            by = tl.load(grad + column_base + pixel, mask=inside, other=0.0)[None, :]
            value = tl.load(similarity + column_base + pixel, mask=inside, other=0.0)[None, :]
            log = tl.load(log_total + column_base + pixel, mask=inside, other=0.0)[None, :]
        else:
            by, value, log = row_grad, row_value, row_log
        # d value / d cosine = p (1 + (cosine - value) / temperature)
        lift = (cosine - value) / temperature
        slope = by * tl.exp(lift - log) * (1.0 + lift)
        compared = rows_in[:, None] & inside[None, :]
        along += tl.sum(tl.where(compared, slope * cosine, 0.0), 1)
        slope = tl.where(compared, slope, 0.0)
        finite = tl.where(size == size, size, 0.0)
        unit = load_tile(there_rows, base + first, out_first, there_limit, COLUMNS, OUT, WIDTH, False).to(
            tl.float32
        )
        if SPLIT:
            unit += load_tile(
                there_rows, base + first, PADDED + out_first, there_limit, COLUMNS, OUT, WIDTH, False
            )
        if PRECISION == "tf32":
            # The rows are exact in tf32, their unit vectors are not.
            result = dot(slope * finite[None, :], unit, result, PRECISION, WIDEN)
        else:
            result = dot(slope, unit * finite[:, None], result, PRECISION, WIDEN)
    return result, along


@triton.jit
def sweep_gradient(  # type: ignore[no-untyped-def]
    here,  # [B*n,width], of the side whose gradient is made
    here_scale,  # [B,n]
    here_inverse,  # [B,n]
    here_order,  # [B,n] int64 where ORDERED
    there,  # [B*m,width], or a descriptor of it
    there_rows,  # [B*m,width]
    there_scale,  # [B,m]
    there_order,  # [B,m] int64, where OWN
    starts,  # [B,S] int32 of the guide's rows, or [B,n] in own-label mode
    stops,
    ends,  # [B,n] int32
    grad,  # [B,S,query pixels] float32
    similarity,
    log_total,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    columns,
    here_pixels,
    there_pixels,
    images,
    slots,
    tiles,
    channels,
    temperature,
    # outputs
    out,  # [B,C,h,w]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT: tl.constexpr,
    TO_GUIDE: tl.constexpr,
    OWN: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradient of softmax to one side, OUT channels of it: slopes of all pairs, times the other side."""
    program = tl.program_id(0)
    PADDED: tl.constexpr = CHUNK * CHUNKS
    SLICES: tl.constexpr = (PADDED + OUT - 1) // OUT
    out_first = program % SLICES * OUT
    tile = program // SLICES % tiles
    b = (program // SLICES // tiles).to(tl.int64)
    first_row = tile * ROWS
    row = first_row + tl.arange(0, ROWS)
    inside = row < here_pixels
    here_first = (b * here_pixels).to(tl.int32) + first_row
    here_limit, there_limit = images * here_pixels, images * there_pixels
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    high = load_tile(here, here_first, 0, here_limit, ROWS, CHUNK, WIDTH, False)
    low = high
    if SPLIT:
        low = load_tile(here, here_first, PADDED, here_limit, ROWS, CHUNK, WIDTH, False)
    size = tl.load(here_scale + b * here_pixels + row, mask=inside, other=0.0)
    pixel = row
    if ORDERED:
        pixel = tl.load(here_order + b * here_pixels + row, mask=inside, other=0).to(tl.int32)
    result = tl.zeros([ROWS, OUT], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    last = tl.minimum(first_row + ROWS, here_pixels)
    if OWN:
        run = first_row
        while run < last:
            end = tl.minimum(tl.load(ends + b * here_pixels + run), last)
            start = tl.load(starts + b * here_pixels + run)
            stop = tl.load(stops + b * here_pixels + run)
            result, along = _scan_slopes(
                result, along, (row >= run) & (row < end), b * here_pixels + pixel, here, high, low, size,
                here_first, here_limit, there, there_rows, there_scale, there_order, b * there_pixels, grad,
                similarity, log_total, b, there_pixels, there_limit, start, stop, temperature, out_first,
                ROWS, COLUMNS, OUT, TO_GUIDE, OWN, PRECISION, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
            )  # fmt: skip
            run = end
    else:
        for slot in range(slots):
            start, stop = tl.load(starts + b * slots + slot), tl.load(stops + b * slots + slot)
            plane = b * slots + slot
            rows_in = inside
            if TO_GUIDE:
                rows_in = (row >= start) & (row < stop)
                touched = (stop > first_row) & (start < last) & (stop > start)
                start, stop = 0, tl.where(touched, there_pixels, 0)
            result, along = _scan_slopes(
                result, along, rows_in, plane * here_pixels + row, here, high, low, size,
                here_first, here_limit, there, there_rows, there_scale, there_order, plane * there_pixels,
                grad, similarity, log_total, b, there_pixels, there_limit, start, stop, temperature,
                out_first, ROWS, COLUMNS, OUT, TO_GUIDE, OWN, PRECISION, CHUNK, CHUNKS, SPLIT, DESCRIPTOR,
                WIDEN,
            )  # fmt: skip
    channel = out_first + tl.arange(0, OUT)
    mask = inside[:, None] & (channel < channels)[None, :]
    unit = unit_vectors(
        here, here_scale, (b * here_pixels + row)[:, None], mask, channel[None, :], WIDTH, SPLIT
    )
    inverse = tl.load(here_inverse + b * here_pixels + row, mask=inside, other=0.0)
    pointer = out + b * stride_b + image_offsets(pixel, columns, stride_h, stride_w, False)
    store_through_norm(result, along, unit, inverse, pointer, channel, stride_c, mask, False, WIDEN)
