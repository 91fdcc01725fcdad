"""Bilinear upsampling in pieces, and its adjoint.

Positions are exact rationals rounded once, so the weights are better than those of `F.interpolate` in
float32. With n inputs and m outputs, output i lies at `((2 i + 1) n - m) / (2 m)`, not below 0
(`align_corners=False`), or at `i (n - 1) / (m - 1)` (`align_corners=True`). Between two neighbours the
weights are 1 - fraction and fraction.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

PIECE_BYTES = 2 * 2**20
"""Size of one temporary of a piece; an operator holds a handful of them."""


class Axis(NamedTuple):
    """Where each of the outputs along one dimension takes its two inputs from."""

    low: Tensor  # [m] int64
    high: Tensor  # [m] int64
    fraction: Tensor  # [m], weight of `high`


class Adjoint(NamedTuple):
    """The outputs that each input of a piece of an axis goes to, padded with weight 0 to the longest list."""

    first: int
    output: Tensor  # [n', t] int64, relative to the piece
    weight: Tensor  # [n', t]
    used: Tensor  # [n'] bool, False where an input goes nowhere


def _positions(n: int, m: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.arange(m, dtype=torch.int64)
    if align_corners:
        numerator, denominator = out * (n - 1), max(m - 1, 1)
    else:
        numerator, denominator = ((2 * out + 1) * n - m).clamp_(min=0), 2 * m
    low = torch.div(numerator, denominator, rounding_mode="floor").clamp_(max=n - 1)
    high = (low + 1).clamp_(max=n - 1)
    fraction = (numerator - low * denominator).to(torch.float64) / denominator
    return low, high, fraction.masked_fill_(low == high, 0.0)


@lru_cache(maxsize=64)
def axis(n: int, m: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Axis:
    """The axis that brings n pixels to m."""
    low, high, fraction = _positions(n, m, align_corners)
    return Axis(low.to(device), high.to(device), fraction.to(device, dtype))


@lru_cache(maxsize=1024)
def adjoint_axis(
    n: int, m: int, align_corners: bool, start: int, stop: int, dtype: torch.dtype, device: torch.device
) -> Adjoint:
    """The adjoint of outputs start..stop of the axis, as a gather."""
    low, high, fraction = (t[start:stop] for t in _positions(n, m, align_corners))
    first, last = int(low[0]), int(high[-1])
    target = torch.cat([low, high]) - first
    source = torch.arange(stop - start).repeat(2)
    weight = torch.cat([1 - fraction, fraction])
    order = torch.argsort(target, stable=True)
    target, source, weight = target[order], source[order], weight[order]
    count = torch.bincount(target, minlength=last - first + 1)
    rank = torch.arange(len(target)) - (count.cumsum(0) - count)[target]
    index = torch.zeros(len(count), int(count.max()), dtype=torch.int64)
    index[:] = source[(count.cumsum(0) - count).clamp(max=len(source) - 1)][:, None]
    padded = torch.zeros(index.shape, dtype=torch.float64)
    index[target, rank], padded[target, rank] = source, weight
    return Adjoint(first, index.to(device), padded.to(device, dtype), (count > 0).to(device))


def in_a_piece(bytes_each: int) -> int:
    """How many rows, or pixels, make a temporary of about `PIECE_BYTES`."""
    return max(1, PIECE_BYTES // max(1, bytes_each))


def pieces(rows: int, bytes_per_row: int) -> list[tuple[int, int]]:
    """Cut `rows` into ranges whose temporaries have about `PIECE_BYTES`."""
    step = in_a_piece(bytes_per_row)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def upsample_rows(
    x: Tensor,  # [...,h,w]
    size: tuple[int, int],
    align_corners: bool,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:  # [...,stop-start,W]
    """Rows start..stop of `F.interpolate(x, size, mode="bilinear", align_corners=align_corners)`."""
    n = x.shape[-2]
    columns = axis(x.shape[-1], size[1], align_corners, dtype, x.device)
    rows = Axis(*(t[start:stop] for t in axis(n, size[0], align_corners, dtype, x.device)))
    first = _low(n, size[0], align_corners, start)
    last = min(_low(n, size[0], align_corners, stop - 1) + 1, n - 1)
    if last - first >= stop - start:
        return _blend(_blend(x, rows, -2), columns, -1)
    # Columns first: gathering along rows of memory is the slow part, and here there are fewer of them.
    strip = _blend(x[..., first : last + 1, :], columns, -1)
    return _blend(strip, Axis(rows.low - first, rows.high - first, rows.fraction), -2)


def outputs_of(n: int, m: int, align_corners: bool, start: int, stop: int) -> tuple[int, int]:
    """First and last of the m outputs that take anything from inputs start..stop."""

    def low(i: int) -> int:
        return _low(n, m, align_corners, i)

    return bisect_left(range(m), start - 1, key=low), bisect_left(range(m), stop, key=low)


def _low(n: int, m: int, align_corners: bool, i: int) -> int:
    """`_positions(n, m, align_corners)[0][i]`, known without asking the device."""
    numerator = i * (n - 1) if align_corners else max((2 * i + 1) * n - m, 0)
    return min(numerator // (max(m - 1, 1) if align_corners else 2 * m), n - 1)


def _blend(x: Tensor, along: Axis, dim: int) -> Tensor:
    fraction = along.fraction.view([-1] + [1] * (-1 - dim))
    low = x.index_select(dim, along.low).to(fraction.dtype)
    high = x.index_select(dim, along.high).to(fraction.dtype)
    return low.mul_(1 - fraction).add_(high.mul_(fraction))


def add_adjoint_rows(
    total: Tensor,  # [...,h,w], added to
    grad: Tensor,  # [...,stop-start,W]
    size: tuple[int, int],
    align_corners: bool,
    start: int,
    stop: int,
) -> None:
    """Add what rows start..stop of the upsampled tensor send back to its source.

    A gather in a fixed order: deterministic on every device, and a NaN reaches its neighbours only.
    """
    if grad.shape[-1] == 0 or grad.shape[-2] == 0:
        return
    h, w = total.shape[-2:]
    columns = adjoint_axis(w, size[1], align_corners, 0, size[1], grad.dtype, grad.device)
    rows = adjoint_axis(h, size[0], align_corners, start, stop, grad.dtype, grad.device)
    back = _gather(_gather(grad, rows, -2), columns, -1)
    total[..., rows.first : rows.first + back.shape[-2], columns.first : columns.first + back.shape[-1]] += (
        back
    )


def _gather(x: Tensor, adjoint: Adjoint, dim: int) -> Tensor:
    shape = [-1] + [1] * (-1 - dim)
    total = x.index_select(dim, adjoint.output[:, 0]).mul_(adjoint.weight[:, 0].view(shape))
    for t in range(1, adjoint.output.shape[1]):
        total.addcmul_(x.index_select(dim, adjoint.output[:, t]), adjoint.weight[:, t].view(shape))
    return total.masked_fill_(~adjoint.used.view(shape), 0)


def nearest_rows(n: int, m: int, device: torch.device) -> Tensor:
    """Indices that `F.interpolate(mode="nearest-exact")` takes to bring n pixels to m, [m] int64.

    Output i takes floor((i + 1/2) n / m), in integers: torch rounds the position first, differently for each
    dtype, and may be one pixel lower where it falls exactly on a border.
    """
    out = torch.arange(m, dtype=torch.int64, device=device)
    return torch.div((2 * out + 1) * n, 2 * m, rounding_mode="floor")
