"""Backward of `prototype_similarity`.

Backward reads a tile of the query twice, the second time from a cache, and writes the gradient: 2 KiB a
pixel. One class takes about 12 instructions a channel, with the sum over a tile's pixels for the gradient of
its prototype; another kernel adds these in order. Of several classes the sum over pixels is a kernel of its
own, which reads the query once more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton
from ._prototype_units_triton import inverse_norm, inverse_of_row, make_units, norm_limit
from ._tiles import Row, Tile, Tiles
from ._triton import image_offsets, rounded

_PARTIAL_BYTES = 16 * 2**20
_PROGRAMS = 2048
_MOST_CHUNKS = 128
_SUMMED_SLOTS = 64
"""Classes of a program's sums, which are in registers."""
_ADDED_SLOTS = 32
"""Classes of one product, where it goes over the classes."""
_LEAST_PIXELS = 64
"""Of the tiles of `BACKWARD_ONE`, each of which leaves partial sums."""
BACKWARD_ONE = Tiles(
    "prototype_similarity backward of one",
    (Row({"CB": 32, "PB": 64, "num_warps": 8, "num_stages": 1}),),
    (
        {"CB": 16, "PB": 64, "num_warps": 4, "num_stages": 1},
        {"CB": 64, "PB": 64, "num_warps": 8, "num_stages": 1},
        {"CB": 32, "PB": 128, "num_warps": 8, "num_stages": 1},
    ),
)
GRAD_QUERY = Tiles(
    "prototype_similarity backward to the query",
    (Row({"CB": 32, "PB": 64, "num_warps": 8, "num_stages": 1}),),
    (
        {"CB": 64, "PB": 64, "num_warps": 8, "num_stages": 1},
        {"CB": 64, "PB": 32, "num_warps": 4, "num_stages": 1},
    ),
)
GRAD_UNITS = Tiles(
    "prototype_similarity backward to the prototypes",
    (
        Row({"CB": 128, "PB": 32, "num_warps": 8, "num_stages": 3}, capability=(9, 0)),
        Row({"CB": 64, "PB": 32, "num_warps": 4, "num_stages": 3}, at_most={"S": 32}),
        Row({"CB": 64, "PB": 32, "num_warps": 8, "num_stages": 3}),
    ),
    (
        {"CB": 64, "PB": 64, "num_warps": 4, "num_stages": 1},
        {"CB": 256, "PB": 32, "num_warps": 8, "num_stages": 3},
    ),
)


@triton.jit
def _backward_one(  # type: ignore[no-untyped-def]
    grad,  # [B,1,h,w]
    query,  # [B,C,h,w]
    prototypes,  # [B,1,C]
    # outputs
    grad_query,  # [B,C,h,w]
    partial,  # [B,pixel_tiles,1,C]
    grad_b,
    grad_y,
    grad_x,
    query_b,
    query_c,
    query_y,
    query_x,
    proto_b,
    proto_c,
    result_b,
    result_c,
    result_y,
    result_x,
    channels,
    pixels,
    width,
    pixel_tiles,
    eps,
    FLAT: tl.constexpr,  # query
    GRAD_FLAT: tl.constexpr,
    RESULT_FLAT: tl.constexpr,  # grad_query
    CB: tl.constexpr,
    PB: tl.constexpr,
    VB: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    image = (pid // pixel_tiles).to(tl.int64)
    pixel = pid % pixel_tiles * PB + tl.arange(0, PB)
    there = pixel < pixels
    query += image * query_b + image_offsets(pixel, width, query_y, query_x, FLAT)[None, :]
    grad_query += image * result_b + image_offsets(pixel, width, result_y, result_x, RESULT_FLAT)[None, :]
    grad += image * grad_b + image_offsets(pixel, width, grad_y, grad_x, GRAD_FLAT)
    prototypes += image * proto_b
    partial += pid.to(tl.int64) * channels
    length = inverse_of_row(prototypes, proto_c, channels, eps, VB)
    lane = tl.arange(0, CB)[:, None]
    sums = tl.zeros([CB, PB], tl.float32)
    square = tl.zeros([CB, PB], tl.float32)
    for first in range(0, channels, CB):
        channel = first + lane
        some = channel < channels
        value = tl.load(query + channel.to(tl.int64) * query_c, mask=some & there[None, :], other=0.0)
        value = value.to(tl.float32)
        vector = tl.load(prototypes + channel.to(tl.int64) * proto_c, mask=some, other=0.0).to(tl.float32)
        sums += value * (vector * length)
        square += value * value
    inverse = inverse_norm(tl.sum(square, 0), eps)
    share = tl.load(grad, mask=there, other=0.0)
    along = (share * (tl.sum(sums, 0) * inverse))[None, :]
    share = share[None, :]
    inverse = inverse[None, :]
    # The tile comes from a cache now.
    for first in range(0, channels, CB):
        channel = first + lane
        some = channel < channels
        value = tl.load(query + channel.to(tl.int64) * query_c, mask=some & there[None, :], other=0.0)
        value = value.to(tl.float32) * inverse
        vector = tl.load(prototypes + channel.to(tl.int64) * proto_c, mask=some, other=0.0).to(tl.float32)
        back = (share * (vector * length) - value * along) * inverse
        back = rounded(back, grad_query.dtype.element_ty, WIDEN)
        tl.store(grad_query + channel.to(tl.int64) * result_c, back, mask=some & there[None, :])
        tl.store(partial + channel, tl.sum(value * share, 1)[:, None], mask=some)


@triton.jit
def _product_with_units(  # type: ignore[no-untyped-def]
    grad,  # [1,PB] pointers to the first class
    units,  # [CB,1] pointers to the first class
    mask,  # [1,PB]
    some,  # [CB,1]
    grad_s,
    channels,
    slots,
    CB: tl.constexpr,
    PB: tl.constexpr,
    SB: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The sum [CB,PB] over classes of gradient times unit vector."""
    back = tl.zeros([CB, PB], tl.float32)
    for first in range(0, slots, SB):
        slot = first + tl.arange(0, SB)
        share = tl.load(
            grad + slot.to(tl.int64)[:, None] * grad_s, mask=(slot < slots)[:, None] & mask, other=0.0
        )
        unit = tl.load(
            units + slot.to(tl.int64)[None, :] * channels, mask=some & (slot < slots)[None, :], other=0.0
        )
        back = _triton.dot(unit, share, back, PRECISION, WIDEN)
    return back


@triton.jit
def _grad_query(  # type: ignore[no-untyped-def]
    grad,  # [B,S,h,w]
    query,  # [B,C,h,w]
    units,  # [B,S,C], contiguous
    # outputs
    grad_query,  # [B,C,h,w]
    inverses,  # [B,h*w], 1 / norm
    grad_b,
    grad_s,
    grad_y,
    grad_x,
    query_b,
    query_c,
    query_y,
    query_x,
    result_b,
    result_c,
    result_y,
    result_x,
    channels,
    slots,
    pixels,
    width,
    pixel_tiles,
    eps,
    FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    RESULT_FLAT: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    SB: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    pixel = pid % pixel_tiles * PB + tl.arange(0, PB)
    image = (pid // pixel_tiles).to(tl.int64)
    inside = (pixel < pixels)[None, :]
    query += image * query_b + image_offsets(pixel, width, query_y, query_x, FLAT)[None, :]
    grad_query += image * result_b + image_offsets(pixel, width, result_y, result_x, RESULT_FLAT)[None, :]
    grad += image * grad_b + image_offsets(pixel, width, grad_y, grad_x, GRAD_FLAT)[None, :]
    units += image * slots * channels
    lane = tl.arange(0, CB)[:, None]
    square = tl.zeros([CB, PB], tl.float32)
    along = tl.zeros([CB, PB], tl.float32)
    for first in range(0, channels, CB):
        channel = first + lane
        some = channel < channels
        value = tl.load(query + channel.to(tl.int64) * query_c, mask=some & inside, other=0.0).to(tl.float32)
        back = _product_with_units(
            grad, units + channel, inside, some, grad_s, channels, slots, CB, PB, SB, PRECISION, WIDEN
        )
        square += value * value
        along += back * value
    inverse = inverse_norm(tl.sum(square, 0), eps)
    tl.store(inverses + image * pixels + pixel, inverse, mask=pixel < pixels)
    inverse = inverse[None, :]
    share = tl.sum(along, 0)[None, :] * inverse
    for first in range(0, channels, CB):
        channel = first + lane
        some = channel < channels
        value = tl.load(query + channel.to(tl.int64) * query_c, mask=some & inside, other=0.0).to(tl.float32)
        back = _product_with_units(
            grad, units + channel, inside, some, grad_s, channels, slots, CB, PB, SB, PRECISION, WIDEN
        )
        back = (back - value * inverse * share) * inverse
        to = grad_query + channel.to(tl.int64) * result_c
        tl.store(to, rounded(back, grad_query.dtype.element_ty, WIDEN), mask=some & inside)


@triton.jit
def _grad_units(  # type: ignore[no-untyped-def]
    grad,  # [B,S,h,w]
    query,  # [B,C,h,w]
    inverses,  # [B,h*w]
    # outputs
    partial,  # [B,chunks,S,C]
    grad_b,
    grad_s,
    grad_y,
    grad_x,
    query_b,
    query_c,
    query_y,
    query_x,
    channels,
    slots,
    pixels,
    width,
    chunks,
    blocks,
    channel_tiles,
    slot_tiles,
    FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    SB: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    channel = pid % channel_tiles * CB + tl.arange(0, CB)
    pid = pid // channel_tiles
    slot = pid % slot_tiles * SB + tl.arange(0, SB)
    pid = pid // slot_tiles
    chunk = pid % chunks
    image = (pid // chunks).to(tl.int64)
    query += image * query_b + channel.to(tl.int64)[:, None] * query_c
    grad += image * grad_b + slot.to(tl.int64)[:, None] * grad_s
    inverses += image * pixels
    some = (channel < channels)[:, None]
    total = tl.zeros([CB, SB], tl.float32)
    for block in range(blocks):
        pixel = (chunk * blocks + block) * PB + tl.arange(0, PB)[None, :]
        there = pixel < pixels
        at = image_offsets(pixel, width, query_y, query_x, FLAT)
        value = tl.load(query + at, mask=some & there, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + pixel, mask=there, other=0.0)
        at = image_offsets(pixel, width, grad_y, grad_x, GRAD_FLAT)
        share = tl.load(grad + at, mask=(slot < slots)[:, None] & there, other=0.0)
        total = _triton.dot(value * inverse, tl.trans(share), total, PRECISION, WIDEN)
    at = ((image * chunks + chunk) * slots + slot)[None, :] * channels + channel[:, None]
    tl.store(partial + at, total, mask=some & (slot < slots)[None, :])


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    partial,  # [B,chunks,S,C]
    prototypes,  # [B,S,C]
    # outputs
    grad_prototypes,  # [B,S,C]
    proto_b,
    proto_s,
    proto_c,
    result_b,
    result_s,
    result_c,
    channels,
    slots,
    chunks,
    eps,
    CB: tl.constexpr,
    KB: tl.constexpr,
    WHOLE: tl.constexpr,  # all channels are one block
    WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    slot = pid % slots
    image = (pid // slots).to(tl.int64)
    prototypes += image * proto_b + slot.to(tl.int64) * proto_s
    grad_prototypes += image * result_b + slot.to(tl.int64) * result_s
    partial += (image * chunks * slots + slot) * channels
    inverse = inverse_of_row(prototypes, proto_c, channels, eps, CB)
    along = tl.zeros([CB], tl.float32)
    total = tl.zeros([CB], tl.float32)
    for first in range(0, channels, CB):
        channel = first + tl.arange(0, CB)
        some = channel < channels
        value = tl.load(prototypes + channel.to(tl.int64) * proto_c, mask=some, other=0.0).to(tl.float32)
        total = _sum_chunks(partial, channel, channels, slots, chunks, CB, KB)
        along += total * (value * inverse)
    share = tl.sum(along, 0)
    for first in range(0, channels, CB):
        channel = first + tl.arange(0, CB)
        some = channel < channels
        value = tl.load(prototypes + channel.to(tl.int64) * proto_c, mask=some, other=0.0).to(tl.float32)
        if not WHOLE:
            total = _sum_chunks(partial, channel, channels, slots, chunks, CB, KB)
        back = (total - share * (value * inverse)) * inverse
        to = grad_prototypes + channel.to(tl.int64) * result_c
        tl.store(to, rounded(back, grad_prototypes.dtype.element_ty, WIDEN), mask=some)


@triton.jit
def _sum_chunks(  # type: ignore[no-untyped-def]
    partial,  # one class's of the first chunk
    channel,  # [CB]
    channels,
    slots,
    chunks,
    CB: tl.constexpr,
    KB: tl.constexpr,
):
    """The sum [CB] over chunks, in order."""
    total = tl.zeros([KB, CB], tl.float32)
    for first in range(0, chunks, KB):
        chunk = first + tl.arange(0, KB)
        total += tl.load(
            partial + (chunk.to(tl.int64) * slots)[:, None] * channels + channel[None, :],
            mask=(chunk < chunks)[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
    return tl.sum(total, 0)


def backward(
    grad: Tensor,  # [B,S,h,w]
    query: Tensor,  # [B,C,h,w]
    prototypes: Tensor,  # [B,S,C]
    eps: float,
) -> tuple[Tensor, Tensor]:  # [B,C,h,w], [B,S,C]
    """See `prototype_similarity._reference_backward`."""
    batch, channels, h, w = query.shape
    slots = prototypes.shape[1]
    grad_query, grad_prototypes = torch.empty_like(query), torch.empty_like(prototypes)
    if grad.numel() == 0 or channels == 0:
        return grad_query.zero_(), grad_prototypes.zero_()
    eps = norm_limit(eps)
    part_bytes = -(-h * w // _LEAST_PIXELS) * channels * 4
    one = slots == 1 and part_bytes <= _PARTIAL_BYTES
    run = _backward_of_one if one else _backward_of_many
    bytes_each = part_bytes if one else slots * channels * 4 + h * w * 4
    for images in _triton.parts(batch, bytes_each, _PARTIAL_BYTES):
        run(grad[images], query[images], prototypes[images], grad_query[images], eps, grad_prototypes[images])
    return grad_query, grad_prototypes


def _most_chunks(others: int, partial_bytes: int) -> int:
    """Of which each has partial sums of so many bytes, and `others` programs."""
    return min(_MOST_CHUNKS, -(-_PROGRAMS // others), _PARTIAL_BYTES // partial_bytes)


def _backward_of_one(
    grad: Tensor,  # [B,1,h,w]
    query: Tensor,  # [B,C,h,w]
    prototypes: Tensor,  # [B,1,C]
    grad_query: Tensor,  # [B,C,h,w], filled
    eps: float,
    # outputs
    grad_prototypes: Tensor,  # [B,1,C]
) -> None:
    batch, channels, h, w = query.shape

    def launch(tile: Tile) -> None:
        pixel_block = _triton.block(h * w, tile["PB"], 1)
        pixel_tiles = -(-h * w // pixel_block)
        partial = query.new_empty((batch, pixel_tiles, 1, channels), dtype=torch.float32)
        _triton.launch(
            _backward_one,
            batch * pixel_tiles,
            grad,
            query,
            prototypes,
            grad_query,
            partial,
            grad.stride(0),
            grad.stride(2),
            grad.stride(3),
            *query.stride(),
            prototypes.stride(0),
            prototypes.stride(2),
            *grad_query.stride(),
            channels,
            h * w,
            w,
            pixel_tiles,
            eps,
            FLAT=_triton.flat(query),
            GRAD_FLAT=_triton.flat(grad),
            RESULT_FLAT=_triton.flat(grad_query),
            CB=_triton.block(channels, tile["CB"], 1),
            PB=pixel_block,
            VB=_triton.block(channels, 1024, 1),
            WIDEN=_triton.INTERPRETED,
            num_warps=tile["num_warps"],
            num_stages=tile["num_stages"],
        )
        _finish_prototypes(partial, prototypes, eps, grad_prototypes)

    shape = {"C": channels, "P": h * w, "bytes": query.itemsize}
    BACKWARD_ONE.run(launch, _triton.capability(query.device), query.device, shape)


def _backward_of_many(
    grad: Tensor,  # [B,S,h,w]
    query: Tensor,  # [B,C,h,w]
    prototypes: Tensor,  # [B,S,C]
    grad_query: Tensor,  # [B,C,h,w], filled
    eps: float,
    # outputs
    grad_prototypes: Tensor,  # [B,S,C]
) -> None:
    batch, channels, h, w = query.shape
    slots, device = prototypes.shape[1], query.device
    units = make_units(prototypes, eps)
    inverses = query.new_empty((batch, h * w), dtype=torch.float32)
    slot_block = _triton.block(slots, _SUMMED_SLOTS, 16)
    slot_tiles = -(-slots // slot_block)
    common: dict[str, Any] = {"PRECISION": _triton.precision(), "WIDEN": _triton.INTERPRETED}
    common |= {"FLAT": _triton.flat(query), "GRAD_FLAT": _triton.flat(grad)}

    def to_query(tile: Tile) -> None:
        pixel_block = _triton.block(h * w, tile["PB"], 16)
        pixel_tiles = -(-h * w // pixel_block)
        _triton.launch(
            _grad_query,
            batch * pixel_tiles,
            grad,
            query,
            units,
            grad_query,
            inverses,
            *_triton.strides(grad, query, grad_query),
            channels,
            slots,
            h * w,
            w,
            pixel_tiles,
            eps,
            RESULT_FLAT=_triton.flat(grad_query),
            CB=_triton.block(channels, tile["CB"], 16),
            PB=pixel_block,
            SB=_triton.block(slots, _ADDED_SLOTS, 16),
            num_warps=tile["num_warps"],
            num_stages=tile["num_stages"],
            maxnreg=200,
            **common,
        )

    def to_prototypes(tile: Tile) -> None:
        channel_block, pixel_block = (
            _triton.block(channels, tile["CB"], 16),
            _triton.block(h * w, tile["PB"], 16),
        )
        channel_tiles = -(-channels // channel_block)
        others = batch * channel_tiles * slot_tiles
        most = _most_chunks(others, batch * slots * channels * 4)
        chunks, blocks = _triton.chunks(-(-h * w // pixel_block), most)
        partial = query.new_empty((batch, chunks, slots, channels), dtype=torch.float32)
        _triton.launch(
            _grad_units,
            others * chunks,
            grad,
            query,
            inverses,
            partial,
            *_triton.strides(grad, query),
            channels,
            slots,
            h * w,
            w,
            chunks,
            blocks,
            channel_tiles,
            slot_tiles,
            CB=channel_block,
            PB=pixel_block,
            SB=slot_block,
            num_warps=tile["num_warps"],
            num_stages=tile["num_stages"],
            **common,
        )
        _finish_prototypes(partial, prototypes, eps, grad_prototypes)

    shape = {"C": channels, "S": slots, "P": h * w, "bytes": query.itemsize}
    GRAD_QUERY.run(to_query, _triton.capability(device), device, shape)
    GRAD_UNITS.run(to_prototypes, _triton.capability(device), device, shape)


def _finish_prototypes(
    partial: Tensor,  # [B,chunks,S,C]
    prototypes: Tensor,  # [B,S,C]
    eps: float,
    # outputs
    grad_prototypes: Tensor,  # [B,S,C]
) -> None:
    batch, chunks, slots, channels = partial.shape
    channel_block = _triton.block(channels, 512, 1)
    many = chunks * channels > 2**15  # too few programs for so much, unless each is large
    _triton.launch(
        _finish,
        batch * slots,
        partial,
        prototypes,
        grad_prototypes,
        *_triton.strides(prototypes, grad_prototypes),
        channels,
        slots,
        chunks,
        eps,
        CB=channel_block,
        KB=min(_triton.next_power_of_2(chunks), max(1, (32768 if many else 8192) // channel_block)),
        WHOLE=channel_block >= channels,
        WIDEN=_triton.INTERPRETED,
        num_warps=32 if many else 8,
        maxnreg=64 if many else 128,
    )
