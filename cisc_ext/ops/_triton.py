"""What the Triton kernels share: launching, the chip that they are for, and the precision of products.

Only the operators' `_triton` files import this, when they are called for the first time: Triton need not be
there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._implementations import interprets

INTERPRETED = interprets(os.environ)
_INTERPRETED_MULTIPROCESSORS = 4

pretended: tuple[int, int] | None = None
"""Compute capability to prepare launches for instead of that of the device: for tests and for compiling ahead
of time."""
launcher: Callable[..., None] | None = None
"""Takes the launches instead of the device, where set."""


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability that tiles and kernels are chosen for.

    The interpreter stands for 8.0; 12.0 counts as 8.9, whose shared memory it has.
    """
    real = pretended
    if real is None:
        real = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return (8, 9) if real >= (12, 0) else real


def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side at the least."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if pretended is not None else _INTERPRETED_MULTIPROCESSORS


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on a grid of one dimension; nothing where that is empty.

    Multiply-adds are fused unless `enable_fp_fusion=False` says otherwise: Triton's default depends on its
    version and on the environment.
    """
    if programs <= 0:
        return
    constants = {"enable_fp_fusion": True, **constants}
    if launcher is not None:
        launcher(kernel, programs, arguments, constants)
        return
    kernel[(programs,)](*arguments, **constants)


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """The strides of all, one after another, in elements."""
    return tuple(stride for tensor in tensors for stride in tensor.stride())


def next_power_of_2(size: int) -> int:
    """At least 1."""
    return int(triton.next_power_of_2(max(1, size)))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ b in float32.

    WIDEN is for Triton's interpreter, which multiplies bfloat16 wrongly, and whose matrix products sum equal
    columns in different orders: in float64 they are equal again.
    """
    if WIDEN:
        acc += tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


def precision() -> str:
    """Of products of float32, as torch is told."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def flat(image: Tensor) -> bool:
    """Whether the pixels of an image [B,C,h,w] lie at even distances."""
    return image.shape[2] == 1 or image.stride(2) == image.shape[3] * image.stride(3)


def block(size: int, most: int, least: int) -> int:
    """A power of 2 that covers `size`, from `least` to `most`."""
    return min(most, max(next_power_of_2(size), least))


def chunks(blocks: int, most: int) -> tuple[int, int]:
    """How many chunks of `blocks` blocks, `most` or one at the most, and of how many blocks each."""
    each = -(-blocks // max(1, min(blocks, most)))
    return -(-blocks // each), each


def parts(count: int, bytes_each: int, most: int) -> list[slice]:
    """Ranges that take `most` bytes together, or of one that takes more."""
    step = max(1, most // max(1, bytes_each))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


@triton.jit
def image_offsets(pixel, width, stride_y, stride_x, FLAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where pixels of an image lie; FLAT: all `stride_x` apart."""
    if FLAT:
        offset = pixel.to(tl.int64) * stride_x
    else:
        offset = (pixel // width).to(tl.int64) * stride_y + (pixel % width).to(tl.int64) * stride_x
    return offset


@triton.jit
def rounded(value, DTYPE: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 in another type. Triton's interpreter gets bfloat16 below the normal range wrong: WIDEN."""
    if WIDEN and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where(value == value, upper, 0x7FC0)
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)
