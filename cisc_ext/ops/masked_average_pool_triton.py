"""Triton kernels of masked_average_pool.

The sum over upsampled features is that of the features times `weights`, the adjoint of the upsampling of
1[labels = class]. One kernel gathers the weights, exactly, in integers; one reads the features once for all
classes, without pixels that have no weight, and leaves partial sums; one adds these in order and divides.
Backward gathers the weights again and writes the gradient once.

Per pixel with 256 channels of float32, 1 KiB is read, which takes an H200 as long as 7 000 float32
instructions. One class takes 512 for the sums and, at a quarter of the labels' resolution, 64 taps of about
15 for the weights. Of several classes the sums go to the tensor cores, 32 x 256 x 3 multiply-adds for up to
32 of them, and the taps take 4 instructions more for each class that is there among a program's pixels.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks as checks
from . import _triton
from ._class_weights_triton import ClassWeights, Piece
from ._tiles import Row, Tile, Tiles
from ._triton import image_offsets, rounded

_NAME = "masked_average_pool"

_PARTIAL_BYTES = 16 * 2**20
_PROGRAMS = 4096
"""Of a launch, where there is as much to do: some for each of the blocks that run side by side."""
_MOST_CHUNKS = 128
_SUMMED_SLOTS = 64
"""Classes of a program's sums, which are in registers."""
_ADDED_SLOTS = 32
"""Classes of one product, where it goes over the classes."""
_FEW = 4
"""Classes whose gradient is not worth a matrix product."""

POOL_PLANES = Tiles(
    "masked_average_pool planes",
    (
        Row({"CB": 32, "PB": 128, "num_warps": 4, "num_stages": 1}, at_most={"S": 1}),
        Row({"CB": 128, "PB": 32, "num_warps": 8, "num_stages": 3}, capability=(9, 0)),
        Row({"CB": 64, "PB": 32, "num_warps": 4, "num_stages": 3}, at_most={"S": 32}),
        Row({"CB": 64, "PB": 32, "num_warps": 8, "num_stages": 3}),
    ),
    (
        {"CB": 16, "PB": 256, "num_warps": 4, "num_stages": 1},
        {"CB": 64, "PB": 64, "num_warps": 4, "num_stages": 1},
        {"CB": 128, "PB": 64, "num_warps": 8, "num_stages": 3},
        {"CB": 256, "PB": 32, "num_warps": 8, "num_stages": 3},
    ),
)
POOL_PIXELS = Tiles(
    "masked_average_pool pixels",
    (
        Row({"CB": 128, "PB": 32, "num_warps": 4, "num_stages": 1}, at_most={"S": 1}),
        Row({"CB": 128, "PB": 32, "num_warps": 8, "num_stages": 3}, capability=(9, 0)),
        Row({"CB": 64, "PB": 32, "num_warps": 4, "num_stages": 3}, at_most={"S": 32}),
        Row({"CB": 64, "PB": 32, "num_warps": 8, "num_stages": 3}),
    ),
    (
        {"CB": 256, "PB": 16, "num_warps": 4, "num_stages": 1},
        {"CB": 64, "PB": 64, "num_warps": 4, "num_stages": 1},
        {"CB": 256, "PB": 32, "num_warps": 8, "num_stages": 3},
    ),
)
SCATTER = Tiles(
    "masked_average_pool backward",
    (
        Row({"CB": 16, "PB": 256, "num_warps": 4, "num_stages": 1}, at_most={"S": _FEW}),
        Row({"CB": 64, "PB": 64, "num_warps": 8, "num_stages": 1}),
    ),
    (
        {"CB": 8, "PB": 512, "num_warps": 4, "num_stages": 1},
        {"CB": 32, "PB": 64, "num_warps": 4, "num_stages": 1},
        {"CB": 128, "PB": 64, "num_warps": 8, "num_stages": 1},
    ),
)


@triton.jit
def _sum_of_class(  # type: ignore[no-untyped-def]
    features,  # [CB,1] pointers to the channels of the first pixel of the image
    inside,  # [CB,1]
    weights,  # [rows*w], of one class
    first,
    blocks,
    pixels,
    first_pixel,
    width,
    stride_y,
    stride_x,
    FLAT: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
):
    """The sum [CB] over the pixels of `blocks` blocks; a pixel without weight is not read."""
    total = tl.zeros([CB, PB], tl.float32)
    lane = tl.arange(0, PB)[None, :]
    weight = tl.load(weights + first + lane, mask=first + lane < pixels, other=0.0)
    for _ in range(blocks):
        # The next weights arrive while the features do.
        following = first + PB + lane
        ahead = tl.load(weights + following, mask=following < pixels, other=0.0)
        at = image_offsets(first_pixel + first + lane, width, stride_y, stride_x, FLAT)
        value = tl.load(features + at, mask=inside & (weight > 0), other=0.0).to(tl.float32)
        total += value * weight
        first += PB
        weight = ahead
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["first_image", "first_chunk", "chunks", "all_chunks"])
def _pool(  # type: ignore[no-untyped-def]
    features,  # [B,C,h,w]
    weights,  # [images,S or S+1,rows*w]
    # outputs
    partial,  # [images,all_chunks,S,C]
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    channels,
    slots,
    pixels,  # rows * w
    any_class,  # slots * pixels
    image_weights,
    width,
    first_image,
    first_pixel,
    first_chunk,
    chunks,
    all_chunks,
    blocks,  # of a chunk
    channel_tiles,
    slot_tiles,
    FLAT: tl.constexpr,
    CB: tl.constexpr,
    PB: tl.constexpr,
    SB: tl.constexpr,
    ONE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    channel = pid % channel_tiles * CB + tl.arange(0, CB)
    pid = pid // channel_tiles
    first_slot = pid % slot_tiles * SB
    pid = pid // slot_tiles
    chunk = pid % chunks
    image = (pid // chunks).to(tl.int64)
    inside = (channel < channels)[:, None]
    features += (first_image + image) * stride_b + channel.to(tl.int64)[:, None] * stride_c
    weights += image * image_weights
    partial += ((image * all_chunks + first_chunk + chunk) * slots + first_slot) * channels
    first = chunk * blocks * PB
    if ONE:
        total = _sum_of_class(
            features,
            inside,
            weights,
            first,
            blocks,
            pixels,
            first_pixel,
            width,
            stride_y,
            stride_x,
            FLAT,
            CB,
            PB,
        )
        tl.store(partial + channel, total, mask=channel < channels)
    else:
        lane = tl.arange(0, PB)
        slot = tl.arange(0, SB)
        some = first_slot + slot < slots
        rows = weights + (first_slot + slot).to(tl.int64)[:, None] * pixels
        any_weights = weights + any_class
        sums = tl.zeros([CB, SB], tl.float32)
        place = first + lane
        used = tl.load(any_weights + place[None, :], mask=(place < pixels)[None, :], other=0.0)
        for block in range(blocks):
            place = first + block * PB + lane
            following = (place + PB)[None, :]
            ahead = tl.load(any_weights + following, mask=following < pixels, other=0.0)
            weight = tl.load(rows + place[None, :], mask=some[:, None] & (place < pixels)[None, :], other=0.0)
            at = image_offsets(first_pixel + place, width, stride_y, stride_x, FLAT)
            value = tl.load(features + at[None, :], mask=inside & (used > 0), other=0.0).to(tl.float32)
            sums = _triton.dot(value, tl.trans(weight), sums, PRECISION, WIDEN)
            used = ahead
        here = partial + slot[None, :].to(tl.int64) * channels + channel[:, None]
        # Nothing times infinity is NaN in a matrix product: then each class is summed by itself.
        if tl.max((tl.abs(sums) < float("inf")).to(tl.int32) ^ 1) == 0:
            tl.store(here, sums, mask=inside & some[None, :])
        else:
            weights += first_slot.to(tl.int64) * pixels
            for _ in range(tl.minimum(SB, slots - first_slot)):
                total = _sum_of_class(
                    features,
                    inside,
                    weights,
                    first,
                    blocks,
                    pixels,
                    first_pixel,
                    width,
                    stride_y,
                    stride_x,
                    FLAT,
                    CB,
                    PB,
                )
                tl.store(partial + channel, total, mask=channel < channels)
                weights += pixels
                partial += channels


@triton.jit(do_not_specialize=["chunks", "first_image", "whole"])
def _finish(  # type: ignore[no-untyped-def]
    partial,  # [images,chunks,S,C]; the prototypes themselves where chunks = 1
    totals,  # [B*S+1] int64
    # outputs
    prototypes,  # [B,S,C]
    batch,
    slots,
    channels,
    chunks,
    first_image,
    channel_tiles,
    whole,
    eps,
    CB: tl.constexpr,
    KB: tl.constexpr,
):
    pid = tl.program_id(0)
    channel = pid % channel_tiles * CB + tl.arange(0, CB)
    slot = pid // channel_tiles % slots
    image = (pid // channel_tiles // slots).to(tl.int64)
    row = (first_image + image) * slots + slot
    invalid = tl.load(totals + batch * slots) > 0
    count = (tl.load(totals + row) // whole).to(tl.float32) + eps
    total = tl.zeros([KB, CB], tl.float32)
    for k in range(0, chunks, KB):
        chunk = k + tl.arange(0, KB)
        total += tl.load(
            partial + ((image * chunks + chunk) * slots + slot)[:, None] * channels + channel[None, :],
            mask=(chunk < chunks)[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
    mean = tl.div_rn(tl.sum(total, 0), count + tl.zeros([CB], tl.float32))
    mean = tl.where(invalid, float("nan"), mean)
    tl.store(prototypes + row * channels + channel, mean, mask=channel < channels)


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    grad,  # [CB] pointers to the first class
    totals,  # of an image
    inside,  # [CB]
    grad_s,
    slots,
    first,
    whole,
    eps,
    CB: tl.constexpr,
    SB: tl.constexpr,
):
    """The gradients [CB,SB] of the sums from `first`; that of a class without pixels reaches none."""
    slot = first + tl.arange(0, SB)
    pixels = tl.load(totals + slot, mask=slot < slots, other=0) // whole
    some = inside[:, None] & (pixels > 0)[None, :]
    share = tl.load(grad[:, None] + slot.to(tl.int64)[None, :] * grad_s, mask=some, other=0.0)
    count = pixels.to(tl.float32) + eps
    return tl.div_rn(share, count[None, :] + tl.zeros([CB, SB], tl.float32))


@triton.jit(do_not_specialize=["first_image", "chunks", "blocks", "whole"])
def _scatter(  # type: ignore[no-untyped-def]
    grad,  # [B,S,C]
    weights,  # [images,S or S+1,rows*w]
    totals,  # [B*S+1] int64
    # outputs
    result,  # [B,C,h*w]
    grad_b,
    grad_s,
    grad_c,
    channels,
    slots,
    pixels,  # rows * w
    image_weights,
    all_pixels,  # h * w
    first_image,
    first_pixel,
    chunks,
    blocks,
    channel_tiles,
    whole,
    eps,
    CB: tl.constexpr,
    PB: tl.constexpr,
    SB: tl.constexpr,
    DOT: tl.constexpr,
    HOIST: tl.constexpr,  # slots <= SB
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    channel = pid % channel_tiles * CB + tl.arange(0, CB)
    chunk = pid // channel_tiles % chunks
    local_image = (pid // channel_tiles // chunks).to(tl.int64)
    image = first_image + local_image
    inside = channel < channels
    grad += image * grad_b + channel.to(tl.int64) * grad_c
    totals += image * slots
    weights += local_image * image_weights
    result += (image * channels + channel)[:, None] * all_pixels + first_pixel
    lane = tl.arange(0, PB)
    regular = 0
    if DOT:
        # All classes in products, unless something is not finite, or not far from it.
        regular = 1
        scaled = _scaled(grad, totals, inside, grad_s, slots, 0, whole, eps, CB, SB)
        for first in range(0, slots, SB):
            if not HOIST:
                scaled = _scaled(grad, totals, inside, grad_s, slots, first, whole, eps, CB, SB)
            regular = tl.minimum(regular, tl.min((tl.abs(scaled) < 1e36).to(tl.int32)))
    for block in range(blocks):
        place = chunk * blocks * PB + block * PB + lane
        there = place < pixels
        back = tl.zeros([CB, PB], tl.float32)
        if regular != 0:
            if DOT:
                for first in range(0, slots, SB):
                    slot = first + tl.arange(0, SB)
                    weight = tl.load(
                        weights + slot.to(tl.int64)[:, None] * pixels + place[None, :],
                        mask=(slot < slots)[:, None] & there[None, :],
                        other=0.0,
                    )
                    if not HOIST:
                        scaled = _scaled(grad, totals, inside, grad_s, slots, first, whole, eps, CB, SB)
                    back = _triton.dot(scaled, weight, back, PRECISION, WIDEN)
        else:
            row = weights
            of_class = grad
            for s in range(slots):
                weight = tl.load(row + place[None, :], mask=there[None, :], other=0.0)
                one = (tl.load(totals + s) // whole).to(tl.float32) + eps
                share = tl.load(of_class, mask=inside, other=0.0)
                share = tl.div_rn(share, one + tl.zeros([CB], tl.float32))[:, None]
                # Where a class has no weight its gradient is nothing, be it inf or NaN.
                back += tl.where(weight > 0, share * weight, 0.0)
                row += pixels
                of_class += grad_s
        tl.store(
            result + place[None, :],
            rounded(back, result.dtype.element_ty, WIDEN),
            mask=inside[:, None] & there[None, :],
        )


def forward(
    features: Tensor,  # [B,C,h,w]
    labels: Tensor,  # [B,H,W]
    classes: Tensor,  # [B,S]
    eps: float,
) -> Tensor:  # [B,S,C]
    """See `masked_average_pool._reference`."""
    device = features.device
    invalid = None
    if device.type == "cpu" or os.environ.get("CISC_CHECK") == "1" or labels.numel() == 0:
        invalid = checks.class_values(_NAME, classes)
    batch, channels, h, w = features.shape
    slots = classes.shape[1]
    prototypes = features.new_empty((batch, slots, channels), dtype=torch.float32)
    if prototypes.numel() == 0 or labels.numel() == 0:
        return checks.poison(prototypes.zero_(), invalid)
    weights = ClassWeights(labels, classes, h, w)
    tiles = POOL_PIXELS if features.stride(1) == 1 and features.stride(3) != 1 else POOL_PLANES
    shape = {"C": channels, "S": slots, "P": h * w, "bytes": features.itemsize}
    for pieces in weights.counted():

        def launch(tile: Tile, pieces: list[Piece] = pieces) -> None:
            _pool_images(features, weights, pieces, eps, tile, prototypes)

        tiles.run(launch, _triton.capability(device), device, shape)
    return prototypes


def _pool_images(
    features: Tensor,  # [B,C,h,w]
    weights: ClassWeights,
    pieces: list[Piece],
    eps: float,
    tile: Tile,
    # outputs
    prototypes: Tensor,  # [B,S,C]
) -> None:
    channels, h, w = features.shape[1:]
    slots, images = weights.slots, pieces[0].images
    one = slots == 1
    least = 1 if one else 16
    channel_block = _triton.block(channels, tile["CB"], least)
    pixel_block = _triton.block(h * w, tile["PB"], least)
    slot_block = _triton.block(slots, _SUMMED_SLOTS, least)
    channel_tiles, slot_tiles = -(-channels // channel_block), -(-slots // slot_block)
    others = images * channel_tiles * slot_tiles
    most = _PARTIAL_BYTES // (images * slots * channels * 4 * len(pieces))
    most = min(most, _MOST_CHUNKS, -(-_PROGRAMS // others))
    plans = [_triton.chunks(-(-piece.rows * w // pixel_block), most) for piece in pieces]
    all_chunks = sum(chunks for chunks, _ in plans)
    partial = prototypes[pieces[0].image :]
    if all_chunks > 1:
        partial = prototypes.new_empty(images * all_chunks * slots * channels)
    first_chunk = 0
    for piece, (chunks, blocks) in zip(pieces, plans, strict=True):
        weights.again(piece)
        _triton.launch(
            _pool,
            others * chunks,
            features,
            weights.values,
            partial,
            *features.stride(),
            channels,
            slots,
            piece.rows * w,
            slots * piece.rows * w,
            weights.lines * piece.rows * w,
            w,
            piece.image,
            piece.row * w,
            first_chunk,
            chunks,
            all_chunks,
            blocks,
            channel_tiles,
            slot_tiles,
            FLAT=_triton.flat(features),
            CB=channel_block,
            PB=pixel_block,
            SB=slot_block,
            ONE=one,
            PRECISION=_triton.precision(),
            WIDEN=_triton.INTERPRETED,
            num_warps=tile["num_warps"],
            num_stages=tile["num_stages"],
        )
        first_chunk += chunks
    finish_block = min(64, _triton.next_power_of_2(channels))
    finish_tiles = -(-channels // finish_block)
    _triton.launch(
        _finish,
        images * slots * finish_tiles,
        partial,
        weights.totals,
        prototypes,
        weights.batch,
        slots,
        channels,
        all_chunks,
        pieces[0].image,
        finish_tiles,
        weights.whole,
        eps,
        CB=finish_block,
        KB=min(64, _triton.next_power_of_2(all_chunks)),
        num_warps=4,
    )


def backward(
    grad: Tensor,  # [B,S,C]
    labels: Tensor,  # [B,H,W]
    classes: Tensor,  # [B,S]
    h: int,
    w: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:  # [B,C,h,w]
    """See `masked_average_pool._reference_backward`."""
    batch, slots, channels = grad.shape
    result = grad.new_empty((batch, channels, h, w), dtype=dtype)
    if grad.numel() == 0 or labels.numel() == 0:
        return result.zero_()
    weights = ClassWeights(labels, classes, h, w)
    shape = {"C": channels, "S": slots, "P": h * w, "bytes": result.itemsize}
    for pieces in weights.counted():

        def launch(tile: Tile, pieces: list[Piece] = pieces) -> None:
            for piece in pieces:
                weights.again(piece)
                _scatter_piece(grad, weights, piece, eps, tile, result)

        SCATTER.run(launch, _triton.capability(grad.device), grad.device, shape)
    return result


def _scatter_piece(
    grad: Tensor,  # [B,S,C]
    weights: ClassWeights,
    piece: Piece,
    eps: float,
    tile: Tile,
    # outputs
    result: Tensor,  # [B,C,h,w]
) -> None:
    channels, h, w = result.shape[1:]
    slots = weights.slots
    product = slots > _FEW
    least = 16 if product else 1
    channel_block = _triton.block(channels, tile["CB"], least)
    pixel_block = _triton.block(h * w, tile["PB"], least)
    slot_block = _triton.block(slots, _ADDED_SLOTS, least)
    channel_tiles = -(-channels // channel_block)
    others = piece.images * channel_tiles
    chunks, blocks = _triton.chunks(-(-piece.rows * w // pixel_block), -(-_PROGRAMS // others))
    _triton.launch(
        _scatter,
        others * chunks,
        grad,
        weights.values,
        weights.totals,
        result,
        *grad.stride(),
        channels,
        slots,
        piece.rows * w,
        weights.lines * piece.rows * w,
        h * w,
        piece.image,
        piece.row * w,
        chunks,
        blocks,
        channel_tiles,
        weights.whole,
        eps,
        CB=channel_block,
        PB=pixel_block,
        SB=slot_block,
        DOT=product,
        HOIST=slots <= slot_block,
        PRECISION=_triton.precision(),
        WIDEN=_triton.INTERPRETED,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
