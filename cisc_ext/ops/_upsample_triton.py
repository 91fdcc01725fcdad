"""Bilinear upsampling inside Triton kernels: exact positions, and the cells between low-resolution points.

Cell c of an axis spans the output pixels that lie between the inputs c and c + 1; pixels in front of the
first input belong to cell 0, with fraction 0. A kernel gives each thread a cell, or a piece of at most
RY x RX of its pixels in a tile [RY,RX,CELLS]: the four corners are loaded once for all of them, and the
adjoint of the interpolation is a sum inside a thread. Pixels are loaded and stored [CELLS] at a time: a load
of a whole tile would have Triton spread a cell over threads, differently in each version.

Positions are those of `_bilinear`: output i lies at (i * step + shift) / whole, not below 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import _triton

MOST_PIXELS = 4
"""Of a piece of a cell along one dimension."""
_INT32 = 2**31
_BLOCK = 1024
_COUNTING_PROGRAMS = 1024
_CARRY_BYTES = 32 * 2**20

AXES = tuple(f"{name}_{axis}" for axis in "yx" for name in ("n", "m", "step", "shift", "whole"))
"""Names of a kernel's arguments for two axes."""


@dataclass(frozen=True)
class Axis:
    """An axis that brings n inputs to m outputs, in numbers that a kernel takes."""

    n: int
    m: int
    step: int
    shift: int
    whole: int
    longest: int
    """No cell has more pixels."""

    @staticmethod
    def of(n: int, m: int, align_corners: bool) -> Axis:
        """n >= 1."""
        if align_corners:
            step, whole = max(n - 1, 1), max(m - 1, 1)
            return Axis(n, m, step, 0, whole, -(-whole // step) if n > 1 else m)
        return Axis(n, m, 2 * n, n - m, 2 * m, m if n == 1 else -(-3 * m // (2 * n)) + 1)

    @property
    def arguments(self) -> tuple[int, int, int, int, int]:
        """n, m, step, shift, whole."""
        return self.n, self.m, self.step, self.shift, self.whole

    @property
    def piece(self) -> int:
        """Pixels of a piece: a power of two that holds nearly all cells, if they are small."""
        # A cell in 64 may take two pieces.
        usual = -(-(64 * self.whole - self.step) // (64 * self.step))
        return min(MOST_PIXELS, _triton.next_power_of_2(usual))

    @property
    def whole_cells(self) -> bool:
        """Whether a piece holds any cell."""
        return self.longest <= self.piece

    @property
    def wide(self) -> bool:
        """Whether positions pass 32 bits."""
        return (self.m + MOST_PIXELS) * self.step + abs(self.shift) + (self.n + 1024) * self.whole >= _INT32


def far(images: Tensor) -> bool:
    """Whether offsets in an image of [B,...] may pass 32 bits."""
    sizes = zip(images.shape[1:], images.stride()[1:], strict=True)
    return sum((size + MOST_PIXELS) * stride for size, stride in sizes) >= _INT32


@triton.jit
def first_pixel(cell, n, m, step, shift, whole, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """First output pixel of cells, of any integer: 0 up to cell 0, m from cell n."""
    at = cell.to(tl.int64) if WIDE else cell
    start = (tl.maximum(at * whole - shift, 0) + (step - 1)) // step
    start = tl.where(cell <= 0, 0, start)
    return tl.where(cell >= n, m, start).to(tl.int32)


@triton.jit
def fraction_in(pixel, cell, n, step, shift, whole, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weight of input cell + 1 at an output pixel of that cell."""
    if WIDE:
        pixel = pixel.to(tl.int64)
        cell = cell.to(tl.int64)
    part = tl.maximum(pixel * step + shift, 0) - cell * whole
    fraction = tl.div_rn(part.to(tl.float32), (part * 0 + whole).to(tl.float32))
    return tl.where(cell >= n - 1, 0.0, fraction)


@triton.jit
def low_of(pixel, n, step, shift, whole, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The cell of output pixels."""
    if WIDE:
        pixel = pixel.to(tl.int64)
    return tl.minimum(tl.maximum(pixel * step + shift, 0) // whole, n - 1).to(tl.int32)


@triton.jit
def blend(low, high, fraction):  # type: ignore[no-untyped-def]
    """low * (1 - fraction) + high * fraction, with both products: 0 * inf is NaN."""
    return tl.fma(high, fraction, low * (1.0 - fraction))


@triton.jit
def load_corners(image, upper, lower, left, right):  # type: ignore[no-untyped-def]
    """The four corners of cells, float32 [CELLS] each.

    `upper`, `lower` are the offsets of the two rows in the image, `left`, `right` [CELLS] those in a row.
    """
    a = tl.load(image + (upper + left)).to(tl.float32)
    b = tl.load(image + (upper + right)).to(tl.float32)
    c = tl.load(image + (lower + left)).to(tl.float32)
    d = tl.load(image + (lower + right)).to(tl.float32)
    return a, b, c, d


@triton.jit
def between(a, b, c, d, fraction_y, fraction_x):  # type: ignore[no-untyped-def]
    """Values [RY,RX,CELLS] in cells of these corners [CELLS]; fraction_y: [RY,1]; fraction_x: [1,RX,CELLS].

    No -0 comes out.
    """
    west = blend(a[None, :], c[None, :], fraction_y)
    east = blend(b[None, :], d[None, :], fraction_y)
    return tl.fma(east[:, None, :], fraction_x, tl.fma(west[:, None, :], 1.0 - fraction_x, 0.0))


@triton.jit
def upsample_cell(image, upper, lower, left, right, fraction_y, fraction_x):  # type: ignore[no-untyped-def]
    """`between` the `load_corners`."""
    a, b, c, d = load_corners(image, upper, lower, left, right)
    return between(a, b, c, d, fraction_y, fraction_x)


@triton.jit
def offset(index, stride, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """index * stride, in 64 bits where WIDE."""
    return tl.cast(index, tl.int64) * stride if WIDE else index * stride


@triton.jit
def load_labels(  # type: ignore[no-untyped-def]
    labels,  # [H,W]
    row,
    stop,
    column,  # [CELLS]
    last,  # [CELLS]
    stride_y,
    stride_x,
    ignore_index,
    FAR: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
):
    """Labels [RY,RX,CELLS] at rows row... below `stop` and columns column... below `last`: -1 for any that is
    negative, -2 outside and where ignored.

    One load for each pixel of a cell, so that all that is made of them has a cell for each thread.
    """
    y = tl.arange(0, RY)[:, None, None]
    x = tl.arange(0, RX)[:, None]
    narrow: tl.constexpr = labels.dtype.element_ty.primitive_bitwidth < 64
    dtype: tl.constexpr = tl.int32 if narrow else tl.int64
    found = tl.full([RY, RX, column.shape[0]], -2, dtype)
    i = 0
    while i < RY:
        line = tl.full([RX, column.shape[0]], -2, dtype)
        for j in tl.static_range(RX):
            inside = (column + j < last) & (column * 0 + row + i < stop)
            place = offset(row + i, stride_y, FAR) + offset(column + j, stride_x, FAR)
            label = tl.load(labels + place, mask=inside, other=0).to(tl.int64)
            label = tl.where(inside & (label != ignore_index), tl.maximum(label, -1), -2)
            line = tl.where(x == j, label.to(dtype)[None, :], line)
        found = tl.where(y == i, line[None, :, :], found)
        i += 1
    return found


@triton.jit
def load_pixels(  # type: ignore[no-untyped-def]
    image,  # [H,W]
    row,
    stop,
    column,  # [CELLS]
    last,  # [CELLS]
    stride_y,
    stride_x,
    FAR: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
):
    """float32 [RY,RX,CELLS] at the pixels of `load_labels`, 0 outside."""
    y = tl.arange(0, RY)[:, None, None]
    x = tl.arange(0, RX)[:, None]
    found = tl.zeros([RY, RX, column.shape[0]], tl.float32)
    i = 0
    while i < RY:
        line = tl.zeros([RX, column.shape[0]], tl.float32)
        for j in tl.static_range(RX):
            inside = (column + j < last) & (column * 0 + row + i < stop)
            place = offset(row + i, stride_y, FAR) + offset(column + j, stride_x, FAR)
            line = tl.where(
                x == j, tl.load(image + place, mask=inside, other=0).to(tl.float32)[None, :], line
            )
        found = tl.where(y == i, line[None, :, :], found)
        i += 1
    return found


@triton.jit
def upsample_pixels(  # type: ignore[no-untyped-def]
    image,  # [h',w']
    row,
    column,  # [CELLS]
    n_y,
    m_y,
    step_y,
    shift_y,
    whole_y,
    n_x,
    m_x,
    step_x,
    shift_x,
    whole_x,
    stride_y,
    stride_x,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
):
    """Values [RY,RX,CELLS] of another grid than that of the cells, at the pixels of `load_labels`."""
    y = tl.arange(0, RY)[:, None, None]
    x = tl.arange(0, RX)[:, None]
    found = tl.zeros([RY, RX, column.shape[0]], tl.float32)
    i = 0
    while i < RY:
        at_y = tl.minimum(row + i, m_y - 1)
        low_y = low_of(at_y, n_y, step_y, shift_y, whole_y, WIDE)
        fraction_y = fraction_in(at_y, low_y, n_y, step_y, shift_y, whole_y, WIDE)
        upper = offset(low_y, stride_y, FAR)
        lower = offset(tl.minimum(low_y + 1, n_y - 1), stride_y, FAR)
        line = tl.zeros([RX, column.shape[0]], tl.float32)
        for j in tl.static_range(RX):
            at_x = tl.minimum(tl.maximum(column + j, 0), m_x - 1)
            low_x = low_of(at_x, n_x, step_x, shift_x, whole_x, WIDE)
            fraction_x = fraction_in(at_x, low_x, n_x, step_x, shift_x, whole_x, WIDE)
            left = offset(low_x, stride_x, FAR)
            right = offset(tl.minimum(low_x + 1, n_x - 1), stride_x, FAR)
            a, b, c, d = load_corners(image, upper, lower, left, right)
            value = blend(blend(a, c, fraction_y), blend(b, d, fraction_y), fraction_x)
            line = tl.where(x == j, value[None, :], line)
        found = tl.where(y == i, line[None, :, :], found)
        i += 1
    return found


@triton.jit
def pick(tile, i):  # type: ignore[no-untyped-def]
    """tile[i], of integers or finite numbers: nothing moves where a thread has the whole first dimension."""
    index = tl.arange(0, tile.shape[0])
    index = index[:, None, None] if len(tile.shape) == 3 else index[:, None]
    return tl.sum(tl.where(index == i, tile, 0), 0)


@triton.jit
def from_left(value, lane):  # type: ignore[no-untyped-def]
    """[CELLS] moved by one: each cell gets its left neighbour's, the first one 0."""
    return tl.where(lane > 0, tl.gather(value, tl.maximum(lane - 1, 0), 0), 0.0)


@triton.jit
def corner_sums(slope, fraction_y, fraction_x, cell, n_x, lane):  # type: ignore[no-untyped-def]
    """Adjoint of `upsample_cell` for slopes [RY,RX,CELLS]: sums for the points above and below, [CELLS].

    Point c takes the left corners of cell c and the right ones of the cell before it, which must be the
    thread before it, so the first thread's sums are not complete.
    """
    west = tl.sum(slope * (1.0 - fraction_x), 1)
    east = tl.sum(slope * fraction_x, 1)
    upper_east = tl.sum(east * (1.0 - fraction_y), 0)
    lower_east = tl.sum(east * fraction_y, 0)
    upper = tl.sum(west * (1.0 - fraction_y), 0) + from_left(upper_east, lane)
    lower = tl.sum(west * fraction_y, 0) + from_left(lower_east, lane)
    # The last cell has one point for both corners.
    upper += tl.where(cell == n_x - 1, upper_east, 0.0)
    lower += tl.where(cell == n_x - 1, lower_east, 0.0)
    return upper, lower


@triton.jit
def pass_on(  # type: ignore[no-untyped-def]
    upper,  # [CELLS], of a piece of a cell
    lower,
    carry_upper,  # pointers [CELLS] to what the program has summed for these points before
    carry_lower,
    before,  # more than 0 if there is something for the upper points
    piece,  # number of the piece in its row of cells: if 0, there is nothing for the lower points
    pieces_left,  # in the row: if 0, the upper points are complete
    rows_left,  # below this row of points: if 0, the lower points are the upper ones
    mask,  # [CELLS], points to be written
    factor,
    # outputs
    gradient,  # pointers [CELLS] to the upper points
    WHOLE_CELLS: tl.constexpr,  # every piece is the first and the last
):
    """Add the sums of a piece to those before it: to `gradient`, times `factor`, where they are complete.

    Each thread reads again what it wrote itself.
    """
    zero = mask.to(tl.int32) * 0
    upper += tl.load(carry_upper, mask=zero + before > 0, other=0.0)
    upper += tl.where(zero + rows_left == 0, lower, 0.0)
    if not WHOLE_CELLS:
        lower += tl.load(carry_lower, mask=zero + piece > 0, other=0.0)
        tl.store(carry_upper, upper, mask=zero + pieces_left > 0)
    tl.store(carry_lower, lower)
    tl.store(gradient, upper * factor, mask=mask & (zero + pieces_left == 0))


@dataclass(frozen=True)
class Plan:
    """How a kernel with a carry walks over the points [B,h,w]: bands of rows x tiles of columns, and its
    workspaces. With `halo` a program goes over the row and the column of cells before its points too."""

    batch: int
    bands: int
    tiles: int
    chunk: int
    """Programs of a launch."""
    carry: int
    """Elements of the carry of a launch."""

    @staticmethod
    def of(batch: int, h: int, w: int, planes: int, rows: int, cells: int, halo: bool) -> Plan:
        """For `planes` maps of an image, and programs of `rows` x `cells` threads."""
        bands, tiles = triton.cdiv(h, rows), triton.cdiv(w, cells - 1 if halo else cells)
        each = 2 * planes * cells
        programs = batch * bands * tiles
        chunk = min(programs, max(1, _CARRY_BYTES // (4 * max(each, 1)))) if halo else programs
        return Plan(batch, bands, tiles, chunk, chunk * each if halo else 0)

    @property
    def programs(self) -> int:
        """In all launches."""
        return self.batch * self.bands * self.tiles

    def starts(self) -> range:
        """First program of each launch."""
        return range(0, self.programs, max(1, self.chunk))


@triton.jit(
    do_not_specialize=["height", "width", "stride_b", "stride_y", "stride_x", "ignore_index", "limit"]
)
def count_labels(  # type: ignore[no-untyped-def]
    labels,  # [B,H,W] uint8, int32 or int64
    classes,  # [B,S] int32 or int64, or anything where SLOTS == 0
    pixels,  # B * H * W
    height,
    width,
    stride_b,
    stride_y,
    stride_x,
    ignore_index,
    limit,  # labels and classes are below; 0: no limit, and no label is wrong
    num_slots,  # B * S
    slots,  # S
    classes_stride_b,
    classes_stride_s,
    # outputs
    state,  # [2] int64, added to: pixels that are not ignored; more than 0 if a label or class is wrong
    FLAT: tl.constexpr,  # labels are contiguous
    LIMITED: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    kept = tl.zeros([BLOCK], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    start = program * BLOCK
    while start < pixels:
        pixel = start + lane
        inside = pixel < pixels
        if FLAT:
            offset = pixel
        else:
            row = pixel // width
            offset = (row // height) * stride_b + (row % height) * stride_y + (pixel % width) * stride_x
        label = tl.load(labels + offset, mask=inside, other=0).to(tl.int64)
        counted = inside & (label != ignore_index)
        kept += counted.to(tl.int32)
        if LIMITED:
            wrong += (counted & ((label < 0) | (label >= limit))).to(tl.int32)
        start += programs * BLOCK
    if CLASSES:
        slot = program * BLOCK
        while slot < num_slots:
            at = slot + lane
            inside = at < num_slots
            offset = (at // slots) * classes_stride_b + (at % slots) * classes_stride_s
            of = tl.load(classes + offset, mask=inside, other=-1).to(tl.int64)
            wrong += (of < -1).to(tl.int32)
            if LIMITED:
                wrong += (of >= limit).to(tl.int32)
            slot += programs * BLOCK
    tl.atomic_add(state, tl.sum(kept.to(tl.int64), 0), sem="relaxed")
    any_wrong = tl.sum(wrong, 0)
    tl.atomic_add(state + 1, any_wrong.to(tl.int64), mask=any_wrong > 0, sem="relaxed")


@triton.jit(do_not_specialize=["programs", "pixels"])
def finish_loss(  # type: ignore[no-untyped-def]
    partial,  # [programs] float64
    state,  # [2] or [3] int64, as of count_labels; COUNT is where the divisor is
    programs,
    pixels,
    # outputs
    loss,  # [] float32
    COUNT: tl.constexpr,  # divide by: -1, `pixels`; else an element of `state`, but at least 1
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < programs:
        total += tl.load(partial + start + lane, mask=start + lane < programs, other=0.0)
        start += BLOCK
    divisor = divisor_of(state, pixels, COUNT)
    tl.store(loss, (tl.sum(total, 0) / divisor).to(tl.float32))


@triton.jit
def divisor_of(state, pixels, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """float64; NaN if a label or class is wrong."""
    divisor = tl.load(state + 1) * 0 + pixels if COUNT < 0 else tl.load(state + COUNT)
    wrong = tl.load(state + 1) > 0
    return tl.where(wrong, float("nan"), tl.maximum(divisor, 1).to(tl.float64))


def launch_count(
    labels: Tensor,  # [B,H,W]
    classes: Tensor | None,  # [B,S]
    ignore_index: int,
    limit: int | None,
    state: Tensor,  # [2] or more, int64
) -> None:
    """Count the pixels that are not ignored into state[0], and wrong labels and classes into state[1].

    Labels are in [0, limit) or `ignore_index`, classes -1 or in [0, limit); without a limit only a class
    below -1 is wrong.
    """
    pixels = labels.numel()
    slots = 0 if classes is None else classes.shape[1]
    stride_b, stride_s = (0, 0) if classes is None else classes.stride()
    blocks = triton.cdiv(max(pixels, labels.shape[0] * slots), _BLOCK)
    _triton.launch(
        count_labels,
        min(blocks, _COUNTING_PROGRAMS),
        labels,
        labels if classes is None else classes,
        pixels,
        *labels.shape[1:],
        *labels.stride(),
        ignore_index,
        limit or 0,
        labels.shape[0] * slots,
        slots,
        stride_b,
        stride_s,
        state,
        FLAT=labels.is_contiguous(),
        LIMITED=limit is not None,
        CLASSES=classes is not None and slots > 0,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def launch_finish(partial: Tensor, state: Tensor, pixels: int, count: int, loss: Tensor) -> None:
    """loss = sum of `partial` [programs] float64, in a fixed order, over state[count] or (-1) `pixels`."""
    _triton.launch(
        finish_loss, 1, partial, state, partial.numel(), pixels, loss, COUNT=count, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit
def count_equal(counts, place):  # type: ignore[no-untyped-def]
    """Add 1 to counts[place] for each place [RY,RX,CELLS] that is not negative.

    Equal ones lie in regions: a thread adds up what is equal, and a tile of one place is one addition.
    """
    most = tl.max(tl.max(place, 0), 0)
    top = tl.max(most, 0)
    if tl.min(tl.min(tl.min(tl.where(place < 0, top, place), 0), 0), 0) == top:
        total = tl.sum(tl.sum(tl.sum((place >= 0).to(tl.int32), 0), 0), 0)
        tl.atomic_add(counts + tl.maximum(top, 0), total.to(tl.int64), mask=top >= 0, sem="relaxed")
    else:
        while top >= 0:
            same = place == most[None, None]
            number = tl.sum(tl.sum(same.to(tl.int32), 0), 0)
            tl.atomic_add(counts + most, number.to(tl.int64), mask=most >= 0, sem="relaxed")
            place = tl.where(same, -1, place)
            most = tl.max(tl.max(place, 0), 0)
            top = tl.max(most, 0)
