"""Triton kernels of the tests' own: a plain one, and two with what a kernel must not have."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double(source, target, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """target = 2 * source."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, 2 * tl.load(source + place, mask=place < size), mask=place < size)


@triton.jit
def sweep_without_products(source, target, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Named like a kernel that multiplies matrices, and does not."""
    place = tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < size), mask=place < size)


@triton.jit
def spilling(source, target, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """target = source + source^T of SIDE x SIDE, all of it in the registers of one block."""
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    value = tl.load(source + row * SIDE + column)
    total = tl.sum(tl.exp(value), 0)
    tl.store(target + row * SIDE + column, value * total[None, :] + tl.trans(value))
