"""Products of a tile of packed rows with tiles of others, as the kernels of `cross_similarity` share them."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import dot, rounded


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
    SWAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Products of rows [ROWS,COLUMNS]; those with what rounding took away come first.

    SWAPPED: the sides have changed places, and a sum must have the bits that it has when they have not.
    """
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
            if SWAPPED:
                total = dot(low, tl.trans(other), total, "tf32", WIDEN)
                total = dot(high, tl.trans(rest), total, "tf32", WIDEN)
            else:
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
                if SWAPPED:
                    total = dot(own_rest, tl.trans(other), total, "tf32", WIDEN)
                    total = dot(own, tl.trans(rest), total, "tf32", WIDEN)
                else:
                    total = dot(own, tl.trans(rest), total, "tf32", WIDEN)
                    total = dot(own_rest, tl.trans(other), total, "tf32", WIDEN)
            total = dot(own, tl.trans(other), total, "tf32", WIDEN)
    return total


@triton.jit
def column_sizes(scale, b, pixels, first, stop, BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of a tile of guide rows; a WHOLE tile ends at `stop` or before."""
    place = scale + b * pixels + first + tl.arange(0, BLOCK)
    inside = first + tl.arange(0, BLOCK) < stop
    return tl.load(place) if WHOLE else tl.load(place, mask=inside, other=0.0)


@triton.jit
def tile_share(start, stop, split, splits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tiles of start..stop that are this split's: the first, the end of the whole ones, the end.

    A split that is left without a tile gets 0 for both ends.
    """
    tiles = (stop - start + BLOCK - 1) // BLOCK
    each = (tiles + splits - 1) // splits
    first = split * each
    end = tl.where(first < tiles, tl.minimum(first + each, tiles), 0)
    return first, tl.minimum(end, (stop - start) // BLOCK), end


@triton.jit
def decode(program, query_tiles, slots, splits):  # type: ignore[no-untyped-def]
    """Query tile, split, slot and image; neighbours pass over the same part of the guide."""
    tile = program % query_tiles
    rest = program // query_tiles
    return tile, rest % splits, rest // splits % slots, (rest // splits // slots).to(tl.int64)


@triton.jit
def unit_vectors(packed, scale, row, mask, channel, WIDTH: tl.constexpr, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unit vectors of rows, at channels that `channel` holds along one more dimension, in float32."""
    place = packed + row * WIDTH + channel
    vector = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if SPLIT:
        vector += tl.load(place + WIDTH // 2, mask=mask, other=0.0).to(tl.float32)
    return vector * tl.load(scale + row, mask=mask, other=0.0)


@triton.jit
def store_through_norm(  # type: ignore[no-untyped-def]
    gradient,  # of the unit vectors, [ROWS,CHUNK]
    along,  # [ROWS]
    unit,  # [ROWS,CHUNK]
    inverse,  # [ROWS]
    target,  # [ROWS], pointers to the pixels
    channel,
    stride_c,
    mask,
    ACCUMULATE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    value = (gradient - along[:, None] * unit) * inverse[:, None]
    place = target[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
    if ACCUMULATE:
        value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, rounded(value, target.dtype.element_ty, WIDEN), mask=mask)
