"""Sums over the pixels that belong to a target (a winner, a class), for `cross_similarity`, without atomics.

Such a sum is one over a segment of a sorted list. Totals of 64 entries at a time are made first, so that
a target with many entries reads few rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._cross_products_triton import store_through_norm, unit_vectors
from ._triton import image_offsets

ENTRIES = 64
"""Entries whose total is made first."""


@triton.jit
def _entries(perm, share, entry, inside, b, entries, pixels, winners, LISTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and weight of entries of an image: those of a sorted list of winners, or each row once."""
    if LISTED:
        flat = tl.load(perm + b * entries + entry, mask=inside, other=0)
        per_slot = (b * 0 + pixels) * winners
        row = flat % per_slot // winners
        place = (b * (entries // per_slot) + flat // per_slot) * pixels + row
    else:
        row = entry.to(tl.int64)
        place = b * entries + row
    return b * pixels + row, tl.load(share + place, mask=inside, other=0.0)


@triton.jit
def chunk_totals(  # type: ignore[no-untyped-def]
    packed,  # [B,n,width]
    scale,  # [B,n]
    keys,  # [B,entries], sorted, where LISTED
    perm,  # [B,entries] int64, where LISTED
    share,  # [B,S,n] float32; [B,n] where not LISTED
    pixels,
    entries,
    winners,
    channels,
    chunks,
    slices,
    # outputs
    totals,  # [B,chunks,channels]; of chunks of several targets: not written, where LISTED
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Sum of weight times unit vector of 64 entries."""
    program = tl.program_id(0)
    channel = program % slices * CHUNK + tl.arange(0, CHUNK)
    chunk = program // slices % chunks
    b = (program // slices // chunks).to(tl.int64)
    entry = chunk.to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < entries
    alone = True
    if LISTED:
        first = tl.load(keys + b * entries + chunk.to(tl.int64) * ENTRIES)
        last = tl.load(keys + b * entries + tl.minimum((chunk + 1).to(tl.int64) * ENTRIES, entries) - 1)
        alone = first == last
    if alone:
        row, weight = _entries(perm, share, entry, inside, b, entries, pixels, winners, LISTED)
        WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
        mask = inside[:, None] & (channel < channels)[None, :]
        vector = unit_vectors(packed, scale, row[:, None], mask, channel[None, :], WIDTH, SPLIT)
        total = tl.sum(tl.where(inside[:, None], vector * weight[:, None], 0.0), 0)
        tl.store(totals + (b * chunks + chunk) * channels + channel, total, mask=channel < channels)


@triton.jit
def _segment(  # type: ignore[no-untyped-def]
    packed,
    scale,
    perm,
    share,
    totals,
    b,
    begin,  # [ROWS] int64
    end,
    channel,  # [CHUNK]
    pixels,
    entries,
    winners,
    channels,
    chunks,
    ROWS: tl.constexpr,
    UNROLLED: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Sum over the entries begin..end of each row: those in front of whole chunks, chunks, those behind."""
    first_chunk = (begin + ENTRIES - 1) // ENTRIES
    head = tl.minimum(first_chunk * ENTRIES, end) - begin
    whole = tl.maximum(end // ENTRIES - first_chunk, 0)
    tail_begin = tl.maximum(begin + head, (first_chunk + whole) * ENTRIES)
    items = head + whole + tl.maximum(end - tail_begin, 0)
    most = tl.max(items, 0)
    result = tl.zeros([ROWS, CHUNK], tl.float32)
    done = most * 0
    able = (channel < channels)[None, None, :]
    while done < most:
        item = done + tl.arange(0, UNROLLED).to(tl.int64)[None, :] + tl.zeros([ROWS, 1], tl.int64)
        chunk = item - head[:, None]
        in_chunk = (chunk >= 0) & (chunk < whole[:, None])
        behind = tail_begin[:, None] + chunk - whole[:, None]
        entry = tl.where(chunk < 0, begin[:, None] + item, behind)
        single = (item < items[:, None]) & (in_chunk == 0)
        row, weight = _entries(perm, share, entry, single, b, entries, pixels, winners, LISTED)
        row = tl.where(single, row, 0)
        vector = unit_vectors(
            packed, scale, row[:, :, None], single[:, :, None] & able, channel[None, None, :], WIDTH, SPLIT
        )
        result += tl.sum(tl.where(single[:, :, None], vector * weight[:, :, None], 0.0), 1)
        place = (
            totals
            + (b * chunks + first_chunk[:, None] + chunk)[:, :, None] * channels
            + channel[None, None, :]
        )
        result += tl.sum(tl.load(place, mask=in_chunk[:, :, None] & able, other=0.0), 1)
        done += UNROLLED
    return result


@triton.jit
def segment_gradients(  # type: ignore[no-untyped-def]
    packed,  # [B,n,width], of the entries
    scale,  # [B,n]
    perm,  # [B,entries] int64
    share,  # [B,S,n]
    totals,  # [B,chunks,channels]
    bounds,  # [B,m+1] int64: where the entries of a target start in the sorted list
    target_packed,  # [B,m,width]
    target_scale,  # [B,m]
    target_inverse,  # [B,m]
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    columns,
    pixels,
    targets,
    entries,
    winners,
    channels,
    chunks,
    blocks,
    # outputs
    out,  # [B,C,h',w']
    ROWS: tl.constexpr,
    UNROLLED: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradient to each target: the sum over its entries, through the norm of its vector."""
    program = tl.program_id(0)
    target = program % blocks * ROWS + tl.arange(0, ROWS)
    b = (program // blocks).to(tl.int64)
    inside = target < targets
    begin = tl.load(bounds + b * (targets + 1) + target, mask=inside, other=0)
    end = tl.load(bounds + b * (targets + 1) + target + 1, mask=inside, other=0)
    inverse = tl.load(target_inverse + b * targets + target, mask=inside, other=0.0)
    pointer = out + b * stride_b + image_offsets(target, columns, stride_h, stride_w, False)
    own = (b * targets + target)[:, None]
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    along = tl.zeros([ROWS], tl.float32)
    PASSES: tl.constexpr = 1 if CHUNK == PADDED else 2
    for p in tl.static_range(PASSES):
        for c in range(0, PADDED, CHUNK):
            channel = c + tl.arange(0, CHUNK)
            mask = inside[:, None] & (channel < channels)[None, :]
            total = _segment(
                packed, scale, perm, share, totals, b, begin, end, channel, pixels, entries, winners,
                channels, chunks, ROWS, UNROLLED, ENTRIES, CHUNK, WIDTH, SPLIT, True,
            )  # fmt: skip
            unit = unit_vectors(target_packed, target_scale, own, mask, channel[None, :], WIDTH, SPLIT)
            if p == 0:
                along += tl.sum(total * unit, 1)
            if p == PASSES - 1:
                store_through_norm(
                    total, along, unit, inverse, pointer, channel, stride_c, mask, ACCUMULATE, WIDEN
                )


@triton.jit
def segment_means(  # type: ignore[no-untyped-def]
    packed,  # [B,n,width], sorted
    scale,  # [B,n]
    share,  # [B,n] float32, weight of each row
    totals,  # [B,chunks,channels]
    starts,  # [B,T] int32
    stops,  # [B,T]
    divisor,  # [B,T] float32
    pixels,
    targets,
    channels,
    chunks,
    slices,
    # outputs
    means,  # [B,T,channels]
    UNROLLED: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Sum of weight times unit vector over a range of sorted rows, divided."""
    program = tl.program_id(0)
    channel = program % slices * CHUNK + tl.arange(0, CHUNK)
    target = program // slices % targets + tl.arange(0, 1)
    b = (program // slices // targets).to(tl.int64)
    begin = tl.load(starts + b * targets + target).to(tl.int64)
    end = tl.load(stops + b * targets + target).to(tl.int64)
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    total = _segment(
        packed, scale, share, share, totals, b, begin, end, channel, pixels, pixels, 1, channels, chunks,
        1, UNROLLED, ENTRIES, CHUNK, WIDTH, SPLIT, False,
    )  # fmt: skip
    by = tl.load(divisor + b * targets + target)
    mean = tl.where((end > begin)[:, None], tl.div_rn(total, tl.maximum(by, 1.0)[:, None]), 0.0)
    place = means + (b * targets + target)[:, None] * channels + channel[None, :]
    tl.store(place, mean, mask=(channel < channels)[None, :])


@triton.jit
def _table(  # type: ignore[no-untyped-def]
    table,
    scale,
    b,
    rows,
    idx,
    mask,
    channel,
    channels,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Rows `idx` of a table of the image, [ROWS,CHUNK]: packed ones as unit vectors, float32 as they are."""
    row = (b * rows + idx)[:, None]
    if PACKED:
        vector = unit_vectors(table, scale, row, mask, channel[None, :], WIDTH, SPLIT)
    else:
        vector = tl.load(table + row * channels + channel[None, :], mask=mask, other=0.0)
    return vector


@triton.jit
def gather_gradients(  # type: ignore[no-untyped-def]
    table,  # [B,T,width] packed, or [B,T,channels] float32
    table_scale,  # [B,T] where PACKED
    idx,  # int64 rows of the table, those outside it for none; where RANGES int32 [B,S], a slot's first pixel
    stops,  # [B,S] int32, the end of a slot's pixels, where RANGES
    weight,  # float32
    own_packed,  # [B,n,width]
    own_scale,  # [B,n]
    own_inverse,  # [B,n]
    order,  # [B,n] int64 where ORDERED
    idx_stride_b,
    idx_stride_s,
    idx_stride_n,
    weight_stride_b,
    weight_stride_s,
    weight_stride_n,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    columns,
    pixels,
    rows,  # T
    slots,
    winners,
    channels,
    blocks,
    # outputs
    out,  # [B,C,h,w]
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    ORDERED: tl.constexpr,
    RANGES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradient to each pixel: the weighted sum of some rows of a table, through the norm of its vector.

    RANGES: row s of the table belongs to the pixels that slot s has.
    """
    program = tl.program_id(0)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    b = (program // blocks).to(tl.int64)
    inside = row < pixels
    inverse = tl.load(own_inverse + b * pixels + row, mask=inside, other=0.0)
    pixel = row
    if ORDERED:
        pixel = tl.load(order + b * pixels + row, mask=inside, other=0).to(tl.int32)
    pointer = out + b * stride_b + image_offsets(pixel, columns, stride_h, stride_w, False)
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    own = (b * pixels + row)[:, None]
    along = tl.zeros([ROWS], tl.float32)
    idx_row = idx + b * idx_stride_b + row.to(tl.int64) * idx_stride_n
    weight_row = weight + b * weight_stride_b + row.to(tl.int64) * weight_stride_n
    PASSES: tl.constexpr = 1 if CHUNK == PADDED else 2
    for p in tl.static_range(PASSES):
        for c in range(0, PADDED, CHUNK):
            channel = c + tl.arange(0, CHUNK)
            mask = inside[:, None] & (channel < channels)[None, :]
            total = tl.zeros([ROWS, CHUNK], tl.float32)
            for e in range(slots * winners):
                slot = (e // winners).to(tl.int64)
                if RANGES:
                    start, stop = tl.load(idx + b * slots + slot), tl.load(stops + b * slots + slot)
                    one = tl.where((row >= start) & (row < stop), slot, -1)
                else:
                    one = tl.load(idx_row + slot * idx_stride_s + e % winners, mask=inside, other=-1)
                by = tl.load(weight_row + slot * weight_stride_s, mask=inside, other=0.0)
                there = ((one >= 0) & (one < rows))[:, None]
                vector = _table(
                    table,
                    table_scale,
                    b,
                    rows,
                    tl.maximum(one, 0),
                    mask & there,
                    channel,
                    channels,
                    WIDTH,
                    PACKED,
                    SPLIT,
                )
                total += tl.where(there, vector * by[:, None], 0.0)
            unit = unit_vectors(own_packed, own_scale, own, mask, channel[None, :], WIDTH, SPLIT)
            if p == 0:
                along += tl.sum(total * unit, 1)
            if p == PASSES - 1:
                store_through_norm(
                    total, along, unit, inverse, pointer, channel, stride_c, mask, ACCUMULATE, WIDEN
                )


@triton.jit
def mean_cosines(  # type: ignore[no-untyped-def]
    packed,  # [B,n,width]
    scale,  # [B,n]
    means,  # [B,T,channels] float32
    idx,  # int64 rows of `means`, those outside it for none
    order,  # [B,n] int64 where ORDERED
    idx_stride_b,
    idx_stride_s,
    idx_stride_n,
    pixels,
    rows,
    slots,
    channels,
    blocks,
    # outputs
    similarity,  # [B,S,n]
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Product of each row's unit vector with a mean; nothing is written where there is none."""
    program = tl.program_id(0)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    slot = program // blocks % slots
    b = (program // blocks // slots).to(tl.int64)
    inside = row < pixels
    place = idx + b * idx_stride_b + slot * idx_stride_s + row.to(tl.int64) * idx_stride_n
    one = tl.load(place, mask=inside, other=-1)
    there = (one >= 0) & (one < rows)
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    total = tl.zeros([ROWS], tl.float32)
    for c in range(0, PADDED, CHUNK):
        channel = c + tl.arange(0, CHUNK)
        mask = there[:, None] & (channel < channels)[None, :]
        unit = unit_vectors(packed, scale, (b * pixels + row)[:, None], mask, channel[None, :], WIDTH, SPLIT)
        mean = _table(means, scale, b, rows, tl.maximum(one, 0), mask, channel, channels, WIDTH, False, SPLIT)
        total += tl.sum(unit * mean, 1)
    pixel = row.to(tl.int64)
    if ORDERED:
        pixel = tl.load(order + b * pixels + row, mask=inside, other=0)
    out = similarity + (b * slots + slot) * pixels + pixel
    tl.store(out, total, mask=there)
