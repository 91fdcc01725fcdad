"""Row maximum of `cross_similarity`: a tile of the query stays, tiles of the guide pass by.

A guide tile has one class, since the guide is sorted; only the last one of a class is masked. Rows keep
eight running results, of every eighth column, so that nothing crosses threads in the loop: an instruction
to scale a product and one to compare it. With C = 256 and tiles of 128 x 128, tensor cores take 1024
cycles of an SM of a Hopper chip, these two 256.

The maximum remembers only the tile and the eighth; `resolve` computes the few candidates again in
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._cross_products_triton import column_sizes, decode, load_tile, products, tile_share

LANES = 8
"""Running results of a row; also bits of a mask, so not more than eight."""


@triton.jit
def _step_max(  # type: ignore[no-untyped-def]
    best,
    place,
    t,
    rows_in,
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
    if DESCRIPTOR:  # on their way while the products are made; other chips have no registers left for it
        size = column_sizes(guide_scale, b, guide_pixels, first, stop, BLOCK_GUIDE, WHOLE)
    cosine = products(
        query, high, low, query_first, query_limit, guide, base + first, guide_limit,
        BLOCK_QUERY, BLOCK_GUIDE, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, False, WIDEN,
    )  # fmt: skip
    if not DESCRIPTOR:
        size = column_sizes(guide_scale, b, guide_pixels, first, stop, BLOCK_GUIDE, WHOLE)
    cosine *= size[None, :]
    if not WHOLE:
        inside = first + tl.arange(0, BLOCK_GUIDE) < stop
        cosine = tl.where(inside[None, :], cosine, float("-inf"))
    here = tl.max(tl.reshape(cosine, [BLOCK_QUERY, BLOCK_GUIDE // LANES, LANES]), 1)
    better = (here > best) & rows_in[:, None]
    return tl.where(better, here, best), tl.where(better, t, place)


@triton.jit
def _scan_max(  # type: ignore[no-untyped-def]
    best,
    place,
    rows_in,
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
    BLOCK_QUERY: tl.constexpr,
    BLOCK_GUIDE: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    begin, whole, end = tile_share(start, stop, split, splits, BLOCK_GUIDE)
    for t in range(begin, whole):
        best, place = _step_max(
            best, place, t, rows_in, query, high, low, query_first, query_limit, guide, guide_scale, b,
            guide_pixels, guide_limit, start, stop,
            BLOCK_QUERY, BLOCK_GUIDE, LANES, True, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
    if whole < end:
        best, place = _step_max(
            best, place, whole, rows_in, query, high, low, query_first, query_limit, guide, guide_scale, b,
            guide_pixels, guide_limit, start, stop,
            BLOCK_QUERY, BLOCK_GUIDE, LANES, False, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
    return best, place


@triton.jit
def sweep_max(  # type: ignore[no-untyped-def]
    query,  # [B*n,width]
    guide,  # [B*m,width], or a descriptor of it
    guide_scale,  # [B,m]
    starts,  # [B,S] int32, or [B,n] in own-label mode
    stops,
    ends,  # [B,n] int32
    query_pixels,
    guide_pixels,
    images,
    slots,
    query_tiles,
    splits,
    # outputs
    value,  # [splits,B,S,n] float32: best product of the row with a unit vector
    code,  # [splits,B,S,n] int32: 256 times its tile, and a bit for each eighth that has it; -1: none
    BLOCK_QUERY: tl.constexpr,
    BLOCK_GUIDE: tl.constexpr,
    LANES: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Row maximum: value, and where it is to be looked for."""
    tile, split, slot, b = decode(tl.program_id(0), query_tiles, slots, splits)
    first_row = tile * BLOCK_QUERY
    row = first_row + tl.arange(0, BLOCK_QUERY)
    query_first = (b * query_pixels).to(tl.int32) + first_row
    query_limit, guide_limit = images * query_pixels, images * guide_pixels
    WIDTH: tl.constexpr = CHUNK * CHUNKS * (2 if SPLIT else 1)
    high = load_tile(query, query_first, 0, query_limit, BLOCK_QUERY, CHUNK, WIDTH, False)
    low = high
    if SPLIT:
        low = load_tile(query, query_first, CHUNK * CHUNKS, query_limit, BLOCK_QUERY, CHUNK, WIDTH, False)
    best = tl.full([BLOCK_QUERY, LANES], float("-inf"), tl.float32)
    place = tl.full([BLOCK_QUERY, LANES], -1, tl.int32)
    if OWN:
        last = tl.minimum(first_row + BLOCK_QUERY, query_pixels)
        run = first_row
        while run < last:
            end = tl.minimum(tl.load(ends + b * query_pixels + run), last)
            start = tl.load(starts + b * query_pixels + run)
            stop = tl.load(stops + b * query_pixels + run)
            best, place = _scan_max(
                best, place, (row >= run) & (row < end), query, high, low, query_first, query_limit,
                guide, guide_scale, b, guide_pixels, guide_limit, start, stop, split, splits,
                BLOCK_QUERY, BLOCK_GUIDE, LANES, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
            )  # fmt: skip
            run = end
    else:
        start, stop = tl.load(starts + b * slots + slot), tl.load(stops + b * slots + slot)
        best, place = _scan_max(
            best, place, row < query_pixels, query, high, low, query_first, query_limit,
            guide, guide_scale, b, guide_pixels, guide_limit, start, stop, split, splits,
            BLOCK_QUERY, BLOCK_GUIDE, LANES, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
    top = tl.max(best, 1)
    equal = (best == top[:, None]) & (place >= 0)
    lowest = tl.min(tl.where(equal, place, 0x7FFFFF), 1)
    lane = tl.arange(0, LANES)[None, :]
    mask = tl.sum(tl.where(equal & (place == lowest[:, None]), 1 << lane, 0), 1)
    out = ((split * images + b) * slots + slot) * query_pixels + row
    tl.store(value + out, top, mask=row < query_pixels)
    tl.store(code + out, tl.where(mask > 0, lowest * 256 + mask, -1), mask=row < query_pixels)


@triton.jit
def resolve(  # type: ignore[no-untyped-def]
    query,  # [B*n,width]
    query_scale,  # [B,n]
    query_order,  # [B,n] int64 where OWN
    guide,  # [B*m,width]
    guide_scale,  # [B,m]
    guide_order,  # [B,m] int64
    starts,
    stops,
    bad,  # [B,m+1] int32: how many guide rows before this one are not finite
    alike,  # [B,m] int32: the first guide row of the class that has the same numbers
    value,  # [splits,B,S,n]
    code,  # [splits,B,S,n]
    query_pixels,
    guide_pixels,
    images,
    slots,
    blocks,
    splits,
    stride_b,
    stride_s,
    # outputs
    similarity,  # [B,S,n]
    index,  # [B,S,n] int64
    ROWS: tl.constexpr,
    BLOCK_GUIDE: tl.constexpr,
    LANES: tl.constexpr,
    OWN: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The winner among the candidates that `sweep_max` left, of equal ones the first, and its cosine."""
    program = tl.program_id(0)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    slot = program // blocks % slots
    b = (program // blocks // slots).to(tl.int64)
    inside = row < query_pixels
    bound = b * query_pixels + row if OWN else b * slots + slot + tl.zeros([ROWS], tl.int64)
    start = tl.load(starts + bound, mask=inside, other=0)
    stop = tl.load(stops + bound, mask=inside, other=0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    found = tl.full([ROWS], -1, tl.int32)
    for split in range(splits):
        from_split = ((split * images + b) * slots + slot) * query_pixels + row
        one = tl.load(value + from_split, mask=inside, other=0.0)
        where = tl.load(code + from_split, mask=inside, other=-1)
        better = (where >= 0) & ((one > best) | (found < 0))
        best, found = tl.where(better, one, best), tl.where(better, where, found)
    members = found >= 0
    mask = tl.where(members, found & 255, 0)
    first = start + tl.where(members, found >> 8, 0) * BLOCK_GUIDE
    size = tl.load(query_scale + b * query_pixels + row, mask=inside, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    position = tl.full([ROWS], 0x7FFFFFFF, tl.int32)
    lanes, channel = tl.arange(0, LANES)[None, :], tl.arange(0, CHUNK)
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    own_row = query + (b * query_pixels + row)[:, None] * WIDTH
    while tl.max(mask, 0) > 0:
        bit = mask & -mask
        lane = tl.sum(tl.where((bit[:, None] >> lanes) == 1, lanes, 0), 1)
        candidate = (first + lane)[:, None] + LANES * tl.arange(0, BLOCK_GUIDE // LANES)[None, :]
        able = (mask > 0)[:, None] & (candidate < stop[:, None])
        their_row = guide + (b * guide_pixels + candidate)[:, :, None] * WIDTH
        total = tl.zeros([ROWS, BLOCK_GUIDE // LANES], tl.float32)
        for c in range(0, PADDED, CHUNK):
            own = tl.load(own_row + (c + channel)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
            place = their_row + (c + channel)[None, None, :]
            theirs = tl.load(place, mask=able[:, :, None], other=0.0).to(tl.float32)
            if SPLIT:
                own += tl.load(own_row + PADDED + (c + channel)[None, :], mask=inside[:, None], other=0.0)
                theirs += tl.load(place + PADDED, mask=able[:, :, None], other=0.0)
            total += tl.sum(own[:, None, :] * theirs, 2)
        their_size = tl.load(guide_scale + b * guide_pixels + candidate, mask=able, other=0.0)
        cosine = total * their_size * size[:, None]
        rank = tl.where(able & (cosine == cosine), cosine, float("-inf"))
        here = tl.max(rank, 1)
        there = tl.min(tl.where(able & (rank == here[:, None]), candidate, 0x7FFFFFFF), 1)
        better = (mask > 0) & ((here > top) | ((here == top) & (there < position)))
        top, position = tl.where(better, here, top), tl.where(better, there, position)
        mask = mask & (mask - 1)
    # Where two rows differ by no more than rounding, another may be best here than in `sweep_max`: then one
    # with its numbers may come before it.
    position = tl.load(alike + b * guide_pixels + position, mask=inside & members, other=0)
    # A guide vector that is not finite makes its class NaN, and the first one is its index.
    bad_row = bad + b * (guide_pixels + 1)
    before = tl.load(bad_row + start, mask=inside, other=0)
    spoilt = (tl.load(bad_row + stop, mask=inside, other=0) > before) & inside
    below, above = start, tl.where(spoilt, stop, start)
    while tl.max(above - below, 0) > 1:
        middle = (below + above) // 2
        later = tl.load(bad_row + middle, mask=spoilt, other=0) == before
        below, above = tl.where(later, middle, below), tl.where(later, above, tl.maximum(middle, below))
    members = (found >= 0) | spoilt
    position = tl.where(spoilt, below, position)
    # To a query vector that is not finite all are alike.
    members |= (size != size) & (stop > start)
    position = tl.where(members, tl.where(size != size, start, position), 0)
    top = tl.where((size != size) | spoilt, float("nan"), top)
    pixel = row.to(tl.int64)
    if OWN:
        pixel = tl.load(query_order + b * query_pixels + row, mask=inside, other=0)
    winner = tl.load(guide_order + b * guide_pixels + position, mask=inside & members, other=0)
    out = b * stride_b + slot * stride_s + pixel
    if VALUES:
        tl.store(similarity + out, tl.where(members, top, 0.0), mask=inside)
    tl.store(index + out, tl.where(members, winner, -1), mask=inside)
