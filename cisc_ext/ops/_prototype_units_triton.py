"""Norms and unit vectors of `prototype_similarity`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton


@triton.jit
def inverse_norm(square, eps):  # type: ignore[no-untyped-def]
    """1 / norm; 0 where the norm is below `eps`; NaN stays NaN. square: any shape"""
    norm = tl.sqrt_rn(square)
    short = norm < eps
    return tl.where(short, 0.0, tl.div_rn(1.0, tl.where(short, 1.0, norm)))


@triton.jit
def inverse_of_row(row, stride, channels, eps, VB: tl.constexpr):  # type: ignore[no-untyped-def]
    """`inverse_norm` of a vector."""
    square = tl.zeros([VB], tl.float32)
    for first in range(0, channels, VB):
        channel = first + tl.arange(0, VB)
        value = tl.load(row + channel.to(tl.int64) * stride, mask=channel < channels, other=0.0)
        square += value.to(tl.float32) * value.to(tl.float32)
    return inverse_norm(tl.sum(square, 0), eps)


@triton.jit
def _units(  # type: ignore[no-untyped-def]
    prototypes,  # [B,S,C]
    # outputs
    units,  # [B,S,C], contiguous
    stride_b,
    stride_s,
    stride_c,
    slots,
    channels,
    eps,
    VB: tl.constexpr,
):
    pid = tl.program_id(0)
    image = (pid // slots).to(tl.int64)
    prototypes += image * stride_b + (pid % slots).to(tl.int64) * stride_s
    units += pid.to(tl.int64) * channels
    inverse = inverse_of_row(prototypes, stride_c, channels, eps, VB)
    for first in range(0, channels, VB):
        channel = first + tl.arange(0, VB)
        value = tl.load(prototypes + channel.to(tl.int64) * stride_c, mask=channel < channels, other=0.0)
        tl.store(units + channel, value.to(tl.float32) * inverse, mask=channel < channels)


def norm_limit(eps: float) -> float:
    # The root of a sum of squares is 0 or far above that: with it, 0 is below any eps.
    return max(eps, torch.finfo(torch.float32).tiny)


def make_units(prototypes: Tensor, eps: float) -> Tensor:
    """Prototypes [B,S,C] as unit vectors."""
    batch, slots, channels = prototypes.shape
    units = prototypes.new_empty(prototypes.shape, dtype=torch.float32)
    _triton.launch(
        _units,
        batch * slots,
        prototypes,
        units,
        *prototypes.stride(),
        slots,
        channels,
        eps,
        VB=_triton.block(channels, 1024, 1),
        num_warps=4,
    )
    return units
