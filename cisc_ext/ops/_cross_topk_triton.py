"""Top-k of `cross_similarity`: the next best guide rows of each query row, a few in a pass through the
guide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._cross_products_triton import column_sizes, decode, load_tile, products


@triton.jit
def _scan_topk(  # type: ignore[no-untyped-def]
    values,  # [BLOCK_QUERY,WINNERS], of which the least is replaced
    places,
    rows_in,
    not_finite,  # [BLOCK_QUERY], query rows
    bound_value,
    bound_place,
    found_before,
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
    BLOCK_QUERY: tl.constexpr,
    BLOCK_GUIDE: tl.constexpr,
    WINNERS: tl.constexpr,
    BOUNDED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    if BOUNDED:
        # All of them were found.
        stop = tl.where(stop - start > found_before, stop, start)
    base = (b * guide_pixels).to(tl.int32)
    lane, winner = tl.arange(0, BLOCK_GUIDE)[None, :], tl.arange(0, WINNERS)[None, :]
    nothing = float("-inf")
    for first in range(start, stop, BLOCK_GUIDE):
        cosine = products(
            query, high, low, query_first, query_limit, guide, base + first, guide_limit,
            BLOCK_QUERY, BLOCK_GUIDE, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, False, WIDEN,
        )  # fmt: skip
        column = first + tl.arange(0, BLOCK_GUIDE)
        size = column_sizes(guide_scale, b, guide_pixels, first, stop, BLOCK_GUIDE, False)
        # A guide vector that is not finite is ranked first; to such a query vector all are alike.
        cosine = tl.where((size != size)[None, :], float("inf"), cosine * size[None, :])
        cosine = tl.where(not_finite[:, None], 0.0, cosine)
        cosine = tl.where(rows_in[:, None] & (column < stop)[None, :], cosine, nothing)
        if BOUNDED:
            later = (cosine == bound_value[:, None]) & (column[None, :] > bound_place[:, None])
            cosine = tl.where((cosine < bound_value[:, None]) | later, cosine, nothing)
        least, top = tl.min(values, 1), tl.max(cosine, 1)
        while tl.max((top > least).to(tl.int32), 0) > 0:
            taken = tl.argmax(cosine, 1)
            out = tl.argmax(tl.where(values == least[:, None], places, -2), 1)
            replaced = (winner == out[:, None]) & (top > least)[:, None]
            values = tl.where(replaced, top[:, None], values)
            places = tl.where(replaced, (first + taken)[:, None], places)
            cosine = tl.where(lane == taken[:, None], nothing, cosine)
            least, top = tl.min(values, 1), tl.max(cosine, 1)
    return values, places


@triton.jit
def sweep_topk(  # type: ignore[no-untyped-def]
    query,  # [B*n,width]
    query_scale,  # [B,n]
    query_order,  # [B,n] int64 where OWN
    guide,  # [B*m,width], or a descriptor of it
    guide_scale,  # [B,m]
    guide_order,  # [B,m] int64
    starts,
    stops,
    ends,
    state,  # [4,B,S,n] float32: last value and place (bits of an int32), sum and number, of the passes before
    query_pixels,
    guide_pixels,
    images,
    slots,
    query_tiles,
    stride_b,
    stride_s,
    wanted,  # how many this pass is to find
    found_before,  # places of `saved` that are filled
    k,
    # outputs
    state_after,  # [4,B,S,n]
    similarity,  # [B,S,n]
    index,  # [B,S,n] int64
    saved,  # [B,S,n,k] int64
    BLOCK_QUERY: tl.constexpr,
    BLOCK_GUIDE: tl.constexpr,
    WINNERS: tl.constexpr,
    BOUNDED: tl.constexpr,
    INDEXED: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The next best guide rows of each query row, at most WINNERS, behind those of the passes before."""
    tile, _, slot, b = decode(tl.program_id(0), query_tiles, slots, 1)
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
    here = (b * slots + slot) * query_pixels + row
    plane = (b * 0 + images) * slots * query_pixels
    bound_value = tl.zeros([BLOCK_QUERY], tl.float32)
    bound_place = tl.zeros([BLOCK_QUERY], tl.int32)
    total = tl.zeros([BLOCK_QUERY], tl.float32)
    count = tl.zeros([BLOCK_QUERY], tl.float32)
    if BOUNDED:
        bound_value = tl.load(state + here, mask=inside, other=0.0)
        bound_place = tl.load(state + plane + here, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        total = tl.load(state + 2 * plane + here, mask=inside, other=0.0)
        count = tl.load(state + 3 * plane + here, mask=inside, other=0.0)
    values = tl.full([BLOCK_QUERY, WINNERS], float("-inf"), tl.float32)
    places = tl.full([BLOCK_QUERY, WINNERS], -1, tl.int32)
    # Places that are not wanted are never the least: nothing is put there.
    winner = tl.arange(0, WINNERS)[None, :]
    unwanted = (winner >= wanted) & (row >= 0)[:, None]
    values = tl.where(unwanted, float("inf"), values)
    if OWN:
        last = tl.minimum(first_row + BLOCK_QUERY, query_pixels)
        run = first_row
        while run < last:
            end = tl.minimum(tl.load(ends + b * query_pixels + run), last)
            start = tl.load(starts + b * query_pixels + run)
            stop = tl.load(stops + b * query_pixels + run)
            values, places = _scan_topk(
                values, places, (row >= run) & (row < end), size != size, bound_value, bound_place,
                found_before, query, high, low, query_first, query_limit, guide, guide_scale, b, guide_pixels,
                guide_limit, start, stop,
                BLOCK_QUERY, BLOCK_GUIDE, WINNERS, BOUNDED, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
            )  # fmt: skip
            run = end
    else:
        start, stop = tl.load(starts + b * slots + slot), tl.load(stops + b * slots + slot)
        values, places = _scan_topk(
            values, places, inside, size != size, bound_value, bound_place, found_before, query, high,
            low, query_first, query_limit, guide, guide_scale, b, guide_pixels, guide_limit, start, stop,
            BLOCK_QUERY, BLOCK_GUIDE, WINNERS, BOUNDED, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
    got = places >= 0
    total += tl.sum(tl.where(got, values, 0.0), 1)
    count += tl.sum(got.to(tl.float32), 1)
    least = tl.min(tl.where(unwanted, float("inf"), values), 1)
    last_place = tl.max(tl.where((values == least[:, None]) & got, places, -1), 1)
    tl.store(state_after + here, least, mask=inside)
    tl.store(state_after + plane + here, last_place.to(tl.float32, bitcast=True), mask=inside)
    tl.store(state_after + 2 * plane + here, total, mask=inside)
    tl.store(state_after + 3 * plane + here, count, mask=inside)
    pixel = row.to(tl.int64)
    if OWN:
        pixel = tl.load(query_order + b * query_pixels + row, mask=inside, other=0)
    out = b * stride_b + slot * stride_s + pixel
    # A guide vector that is not finite was ranked as infinite.
    mean = tl.where(total == float("inf"), float("nan"), tl.div_rn(total * size, tl.maximum(count, 1.0)))
    tl.store(similarity + out, tl.where(count == 0.0, 0.0, mean), mask=inside)
    pixels = tl.load(guide_order + b * guide_pixels + places, mask=got & inside[:, None], other=-1)
    fits = inside[:, None] & (winner < wanted)
    tl.store(saved + out[:, None] * k + found_before + winner, tl.where(got, pixels, -1), mask=fits)
    if INDEXED:
        top = tl.max(tl.where(got, values, float("-inf")), 1)
        first = tl.min(tl.where(got & (values == top[:, None]), places, 0x7FFFFFFF), 1)
        first_pixel = tl.load(guide_order + b * guide_pixels + first, mask=inside & (count > 0.0), other=-1)
        tl.store(index + out, first_pixel, mask=inside)
