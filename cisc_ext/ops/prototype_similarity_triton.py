"""Triton kernels of prototype_similarity.

Forward reads the query once for norms and dot products. With 256 channels of float32 a pixel is 1 KiB,
which takes an H200 as long as 7 000 float32 instructions; one class takes 2 multiply-adds a channel, 512;
more go to the tensor cores, 32 x 256 x 3 multiply-adds a pixel for up to 32 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton
from ._prototype_gradient_triton import backward
from ._prototype_units_triton import inverse_norm, inverse_of_row, make_units, norm_limit
from ._tiles import Row, Tile, Tiles
from ._triton import image_offsets

__all__ = ["backward", "forward"]

_SUMMED_SLOTS = 64
"""Classes of a program's sums, which are in registers."""
_UNIT_BYTES = 16 * 2**20
FORWARD_PLANES = Tiles(
    "prototype_similarity planes",
    (
        Row({"CB": 32, "PB": 64, "num_warps": 4, "num_stages": 1}, at_most={"S": 1}),
        Row({"CB": 32, "PB": 64, "num_warps": 4, "num_stages": 3}, at_most={"S": 32}),
        Row({"CB": 32, "PB": 64, "num_warps": 8, "num_stages": 3}),
    ),
    (
        {"CB": 16, "PB": 128, "num_warps": 4, "num_stages": 1},
        {"CB": 32, "PB": 128, "num_warps": 8, "num_stages": 3},
        {"CB": 64, "PB": 64, "num_warps": 8, "num_stages": 3},
    ),
)
FORWARD_PIXELS = Tiles(
    "prototype_similarity pixels",
    (
        Row({"CB": 128, "PB": 32, "num_warps": 4, "num_stages": 1}, at_most={"S": 1}),
        Row({"CB": 32, "PB": 64, "num_warps": 4, "num_stages": 3}, at_most={"S": 32}),
        Row({"CB": 32, "PB": 64, "num_warps": 8, "num_stages": 3}),
    ),
    (
        {"CB": 64, "PB": 64, "num_warps": 4, "num_stages": 1},
        {"CB": 64, "PB": 64, "num_warps": 8, "num_stages": 3},
        {"CB": 256, "PB": 16, "num_warps": 4, "num_stages": 1},
    ),
)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    query,  # [B,C,h,w]
    prototypes,  # [B,S,C]; as unit vectors unless there is one
    # outputs
    similarity,  # [B,S,h,w], contiguous
    query_b,
    query_c,
    query_y,
    query_x,
    proto_b,
    proto_s,
    proto_c,
    channels,
    slots,
    pixels,
    width,
    slot_tiles,
    pixel_tiles,
    eps,
    FLAT: tl.constexpr,
    ONE: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    SB: tl.constexpr,
    VB: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    first_slot = pid % slot_tiles * SB
    pixel = pid // slot_tiles % pixel_tiles * PB + tl.arange(0, PB)
    image = (pid // slot_tiles // pixel_tiles).to(tl.int64)
    inside = pixel < pixels
    query += image * query_b + image_offsets(pixel, width, query_y, query_x, FLAT)[None, :]
    prototypes += image * proto_b
    similarity += (image * slots + first_slot) * pixels
    lane = tl.arange(0, CB)
    square = tl.zeros([CB, PB], tl.float32)
    if ONE:
        length = inverse_of_row(prototypes, proto_c, channels, eps, VB)
        sums = tl.zeros([CB, PB], tl.float32)
        for first in range(0, channels, CB):
            channel = first + lane[:, None]
            value = tl.load(
                query + channel.to(tl.int64) * query_c, mask=(channel < channels) & inside[None, :], other=0.0
            ).to(tl.float32)
            unit = tl.load(
                prototypes + channel.to(tl.int64) * proto_c, mask=channel < channels, other=0.0
            ).to(tl.float32)
            sums += value * (unit * length)
            square += value * value
        inverse = inverse_norm(tl.sum(square, 0), eps)
        tl.store(similarity + pixel, tl.sum(sums, 0) * inverse, mask=inside)
    else:
        slot = first_slot + tl.arange(0, SB)
        rows = prototypes + slot.to(tl.int64)[:, None] * proto_s
        some = (slot < slots)[:, None]
        dots = tl.zeros([SB, PB], tl.float32)
        for first in range(0, channels, CB):
            channel = first + lane
            value = tl.load(
                query + channel.to(tl.int64)[:, None] * query_c,
                mask=(channel < channels)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            unit = tl.load(
                rows + channel.to(tl.int64)[None, :] * proto_c,
                mask=some & (channel < channels)[None, :],
                other=0.0,
            )
            dots = _triton.dot(unit, value, dots, PRECISION, WIDEN)
            square += value * value
        inverse = inverse_norm(tl.sum(square, 0), eps)
        at = tl.arange(0, SB).to(tl.int64)[:, None] * pixels + pixel[None, :]
        tl.store(similarity + at, dots * inverse[None, :], mask=some & inside[None, :])


def forward(
    query: Tensor,  # [B,C,h,w]
    prototypes: Tensor,  # [B,S,C]
    eps: float,
) -> Tensor:  # [B,S,h,w]
    """See `prototype_similarity._reference`."""
    batch, channels, h, w = query.shape
    slots = prototypes.shape[1]
    similarity = query.new_empty((batch, slots, h, w), dtype=torch.float32)
    if similarity.numel() == 0:
        return similarity
    eps, device, one = norm_limit(eps), query.device, slots == 1
    least = 1 if one else 16
    tiles = FORWARD_PIXELS if query.stride(1) == 1 and query.stride(3) != 1 else FORWARD_PLANES
    shape = {"C": channels, "S": slots, "P": h * w, "bytes": query.itemsize}
    for images in _triton.parts(batch, slots * channels * 4, _UNIT_BYTES):
        rows = prototypes[images] if one else make_units(prototypes[images], eps)

        def launch(tile: Tile, images: slice = images, rows: Tensor = rows) -> None:
            pixel_block = _triton.block(h * w, tile["PB"], least)
            slot_block = _triton.block(slots, _SUMMED_SLOTS, least)
            pixel_tiles, slot_tiles = -(-h * w // pixel_block), -(-slots // slot_block)
            _triton.launch(
                _forward,
                len(rows) * pixel_tiles * slot_tiles,
                query[images],
                rows,
                similarity[images],
                *_triton.strides(query, rows),
                channels,
                slots,
                h * w,
                w,
                slot_tiles,
                pixel_tiles,
                eps,
                FLAT=_triton.flat(query),
                ONE=one,
                CB=_triton.block(channels, tile["CB"], least),
                PB=pixel_block,
                SB=slot_block,
                VB=_triton.block(channels, 1024, 1),
                PRECISION=_triton.precision(),
                WIDEN=_triton.INTERPRETED,
                num_warps=tile["num_warps"],
                num_stages=tile["num_stages"],
            )

        tiles.run(launch, _triton.capability(device), device, shape)
    return similarity
