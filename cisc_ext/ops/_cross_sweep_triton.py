"""Forward kernels of `cross_similarity`: a tile of the query stays, tiles of the guide pass by.

A guide tile has one class, since the guide is sorted; only the last one of a class is masked. Rows keep eight
running results, of every eighth column, so that nothing crosses threads in the loop: for the maximum, an
instruction to scale a product and one to compare it. With C = 256 and tiles of 128 x 128, tensor cores take
1024 cycles of an SM of a Hopper chip, these two 256.

The maximum remembers only the tile and the eighth; `resolve` computes the few candidates again in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import dot

LANES = 8
"""Running results of a row; also bits of a mask, so not more than eight."""


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    source,  # rows [limit,width], or a descriptor of them
    first,
    column,
    limit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Rows from `first` on, 0 from `limit` on: [ROWS,COLUMNS]."""
    if DESCRIPTOR:
        tile = source.load([first, column])
    else:
        row = first + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * WIDTH + column + tl.arange(0, COLUMNS)[None, :]
        tile = tl.load(source + place, mask=(row < limit)[:, None], other=0.0)
    return tile


@triton.jit
def products(  # type: ignore[no-untyped-def]
    here,  # rows of the tile that stays, to be read in chunks where CHUNKS > 1
    high,  # [ROWS,CHUNK] where CHUNKS = 1: its first half, and its second one
    low,
    here_first,
    here_limit,
    there,  # rows of the other side, or a descriptor of them
    there_first,
    there_limit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Products of rows [ROWS,COLUMNS]; those with what rounding took away come first."""
    PADDED: tl.constexpr = CHUNK * CHUNKS
    WIDTH: tl.constexpr = 2 * PADDED if SPLIT else PADDED
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if CHUNKS == 1:
        other = load_tile(there, there_first, 0, there_limit, COLUMNS, CHUNK, WIDTH, DESCRIPTOR)
        if SPLIT:
            rest = load_tile(there, there_first, PADDED, there_limit, COLUMNS, CHUNK, WIDTH, DESCRIPTOR)
            if PADDED <= 64:
                # With few channels the smallest products count too: errors average out less.
                total = dot(low, tl.trans(rest), total, "tf32", WIDEN)
            total = dot(high, tl.trans(rest), total, "tf32", WIDEN)
            total = dot(low, tl.trans(other), total, "tf32", WIDEN)
        total = dot(high, tl.trans(other), total, "tf32", WIDEN)
    else:
        for c in range(0, PADDED, CHUNK):
            own = load_tile(here, here_first, c, here_limit, ROWS, CHUNK, WIDTH, False)
            other = load_tile(there, there_first, c, there_limit, COLUMNS, CHUNK, WIDTH, DESCRIPTOR)
            if SPLIT:
                own_rest = load_tile(here, here_first, PADDED + c, here_limit, ROWS, CHUNK, WIDTH, False)
                rest = load_tile(
                    there, there_first, PADDED + c, there_limit, COLUMNS, CHUNK, WIDTH, DESCRIPTOR
                )
                total = dot(own, tl.trans(rest), total, "tf32", WIDEN)
                total = dot(own_rest, tl.trans(other), total, "tf32", WIDEN)
            total = dot(own, tl.trans(other), total, "tf32", WIDEN)
    return total


@triton.jit
def _sizes(scale, b, pixels, first, stop, BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of a tile of guide rows; a WHOLE tile ends at `stop` or before."""
    place = scale + b * pixels + first + tl.arange(0, BLOCK)
    inside = first + tl.arange(0, BLOCK) < stop
    return tl.load(place) if WHOLE else tl.load(place, mask=inside, other=0.0)


@triton.jit
def _share(start, stop, split, splits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """First and last tile of start..stop that are this split's."""
    tiles = (stop - start + BLOCK - 1) // BLOCK
    each = (tiles + splits - 1) // splits
    first = tl.minimum(split * each, tiles)
    return first, tl.minimum(first + each, tiles)


@triton.jit
def _whole(start, stop, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """End of the tiles that are whole, among those up to `end`."""
    return tl.minimum(end, (stop - start) // BLOCK)


@triton.jit
def _decode(program, query_tiles, slots, splits):  # type: ignore[no-untyped-def]
    """Query tile, split, slot and image; neighbours pass over the same part of the guide."""
    tile = program % query_tiles
    rest = program // query_tiles
    return tile, rest % splits, rest // splits % slots, (rest // splits // slots).to(tl.int64)


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
        size = _sizes(guide_scale, b, guide_pixels, first, stop, BLOCK_GUIDE, WHOLE)
    cosine = products(
        query, high, low, query_first, query_limit, guide, base + first, guide_limit,
        BLOCK_QUERY, BLOCK_GUIDE, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
    )  # fmt: skip
    if not DESCRIPTOR:
        size = _sizes(guide_scale, b, guide_pixels, first, stop, BLOCK_GUIDE, WHOLE)
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
    begin, end = _share(start, stop, split, splits, BLOCK_GUIDE)
    whole = _whole(start, stop, end, BLOCK_GUIDE)
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
    tile, split, slot, b = _decode(tl.program_id(0), query_tiles, slots, splits)
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
    size = _sizes(guide_scale, b, guide_pixels, first, stop, BLOCK_GUIDE, WHOLE)
    product = products(
        query, high, low, query_first, query_limit, guide, base + first, guide_limit,
        BLOCK_QUERY, BLOCK_GUIDE, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
    )  # fmt: skip
    # As backward computes it: where one pixel outweighs the others, its cosine is the mean, to the last bit.
    product *= size[None, :] * query_size[:, None]
    exponent = product * sharpness
    if not WHOLE:
        inside = first + tl.arange(0, BLOCK_GUIDE) < stop
        exponent = tl.where(inside[None, :], exponent, float("-inf"))
    exponent = tl.reshape(exponent, [BLOCK_QUERY, BLOCK_GUIDE // LANES, LANES])
    product = tl.reshape(product, [BLOCK_QUERY, BLOCK_GUIDE // LANES, LANES])
    new = tl.maximum(top, tl.where(rows_in[:, None], tl.max(exponent, 1), float("-inf")))
    # Nothing yet: any shift will do.
    safe = tl.where(new == float("-inf"), 0.0, new)
    old = tl.exp2(top - safe)
    total, weighted, top = total * old, weighted * old, new
    weight = tl.exp2(exponent - safe[:, None, :])
    total += tl.where(rows_in[:, None], tl.sum(weight, 1), 0.0)
    weighted += tl.where(rows_in[:, None], tl.sum(weight * product, 1), 0.0)
    return top, total, weighted


@triton.jit
def _scan_softmax(  # type: ignore[no-untyped-def]
    top,
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
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDEN: tl.constexpr,
):
    begin, end = _share(start, stop, split, splits, BLOCK_GUIDE)
    whole = _whole(start, stop, end, BLOCK_GUIDE)
    for t in range(begin, whole):
        top, total, weighted = _step_softmax(
            top, total, weighted, t, rows_in, query_size, query, high, low, query_first, query_limit, guide,
            guide_scale, b, guide_pixels, guide_limit, start, stop, sharpness,
            BLOCK_QUERY, BLOCK_GUIDE, LANES, True, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
    if whole < end:
        top, total, weighted = _step_softmax(
            top, total, weighted, whole, rows_in, query_size, query, high, low, query_first, query_limit,
            guide, guide_scale, b, guide_pixels, guide_limit, start, stop, sharpness,
            BLOCK_QUERY, BLOCK_GUIDE, LANES, False, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
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
    tops,  # [splits,B,S,n] float32: what was taken off the exponents, in powers of 2
    totals,  # [splits,B,S,n]: sum of the weights
    sums,  # [splits,B,S,n]: sum of weight times cosine
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
    """Sums for the mean of cosines weighted by exp(cosine / temperature)."""
    tile, split, slot, b = _decode(tl.program_id(0), query_tiles, slots, splits)
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
    top = tl.full([BLOCK_QUERY, LANES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERY, LANES], tl.float32)
    weighted = tl.zeros([BLOCK_QUERY, LANES], tl.float32)
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
                sharpness, BLOCK_QUERY, BLOCK_GUIDE, LANES, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
            )  # fmt: skip
            run = end
    else:
        start, stop = tl.load(starts + b * slots + slot), tl.load(stops + b * slots + slot)
        top, total, weighted = _scan_softmax(
            top, total, weighted, inside, size, query, high, low, query_first,
            query_limit, guide, guide_scale, b, guide_pixels, guide_limit, start, stop, split, splits,
            sharpness, BLOCK_QUERY, BLOCK_GUIDE, LANES, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
    taken = tl.max(top, 1)
    old = tl.exp2(top - tl.where(taken == float("-inf"), 0.0, taken)[:, None])
    total, weighted = total * old, weighted * old
    out = ((split * images + b) * slots + slot) * query_pixels + row
    tl.store(tops + out, taken, mask=inside)
    tl.store(totals + out, tl.sum(total, 1), mask=inside)
    tl.store(sums + out, tl.sum(weighted, 1), mask=inside)


@triton.jit
def combine_softmax(  # type: ignore[no-untyped-def]
    query_order,  # [B,n] int64 where OWN
    tops,  # [splits,B,S,n]
    totals,
    sums,
    query_pixels,
    rows,  # B * S * n
    slots,
    splits,
    sharpness,  # log2(e) / temperature
    # outputs
    similarity,  # [B,S,n]
    log_total,  # [B,S,n]: log sum_j exp((cosine_j - similarity) / temperature), -inf where there is none
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
):
    """Put the splits together."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < rows
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(tops + split * rows + place, mask=inside, other=float("-inf")))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        factor = tl.exp2(tl.load(tops + split * rows + place, mask=inside, other=float("-inf")) - safe)
        total += tl.load(totals + split * rows + place, mask=inside, other=0.0) * factor
        weighted += tl.load(sums + split * rows + place, mask=inside, other=0.0) * factor
    empty = total == 0.0
    out = place
    if OWN:
        image, row = place // query_pixels, place % query_pixels
        out = image * query_pixels + tl.load(query_order + image * query_pixels + row, mask=inside, other=0)
    mean = tl.where(empty, 0.0, tl.div_rn(weighted, tl.where(empty, 1.0, total)))
    tl.store(similarity + out, mean, mask=inside)
    # Around the mean a logarithm is small, and rounded little; float64 keeps its two large parts apart.
    shift = safe.to(tl.float64) - mean.to(tl.float64) * sharpness
    log = tl.log(total.to(tl.float64)) + shift * 0.6931471805599453
    tl.store(log_total + out, log.to(tl.float32), mask=inside)


@triton.jit
def _scan_topk(  # type: ignore[no-untyped-def]
    values,  # [BLOCK_QUERY,WINNERS], of which the least is replaced
    places,
    rows_in,
    not_finite,  # [BLOCK_QUERY], query rows
    bound_value,
    bound_place,
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
    base = (b * guide_pixels).to(tl.int32)
    lane, winner = tl.arange(0, BLOCK_GUIDE)[None, :], tl.arange(0, WINNERS)[None, :]
    nothing = float("-inf")
    for first in range(start, stop, BLOCK_GUIDE):
        cosine = products(
            query, high, low, query_first, query_limit, guide, base + first, guide_limit,
            BLOCK_QUERY, BLOCK_GUIDE, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
        )  # fmt: skip
        column = first + tl.arange(0, BLOCK_GUIDE)
        size = _sizes(guide_scale, b, guide_pixels, first, stop, BLOCK_GUIDE, False)
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
    tile, _, slot, b = _decode(tl.program_id(0), query_tiles, slots, 1)
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
                values, places, (row >= run) & (row < end), size != size, bound_value, bound_place, query,
                high, low, query_first, query_limit, guide, guide_scale, b, guide_pixels, guide_limit, start,
                stop, BLOCK_QUERY, BLOCK_GUIDE, WINNERS, BOUNDED, CHUNK, CHUNKS, SPLIT, DESCRIPTOR, WIDEN,
            )  # fmt: skip
            run = end
    else:
        start, stop = tl.load(starts + b * slots + slot), tl.load(stops + b * slots + slot)
        values, places = _scan_topk(
            values, places, inside, size != size, bound_value, bound_place, query, high,
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
