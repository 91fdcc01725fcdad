"""`cross_similarity` in Triton: which kernels run, on how many images at a time.

The guide is sorted by class, so that a class is a range of its rows, and packed for tensor cores
(`_cross_pack_triton`). 2 C N M operations at the rate of 16-bit products, or a third of it for float32;
the packed rows are 2 C (N + M) bytes a pair, or twice that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _cross_max_triton as by_max
from . import _cross_softmax_triton as by_softmax
from . import _cross_topk_triton as by_topk
from . import _triton
from ._cross_means_triton import few_labels, mean, mean_backward
from ._cross_pack_triton import Form, Ranges, Rows, first_alike, form, pack, ranges, tensor_or
from ._cross_winners_triton import WINNER_BYTES, winners_backward
from ._tiles import Row, Tile, Tiles

_IN_FLIGHT_BYTES = 2**28
"""Of the packed rows of several pairs."""
_WORKSPACE_BYTES = 2**25
_PIXEL_BYTES = 64
"""For each pixel of a pair, beside its packed row: labels while they are sorted, orders, ranges, scales."""
_STATE_BYTES = 32
"""For each query pixel and slot, where there are so many that the guide is not split."""
_WAVES = 2
"""Blocks for each multiprocessor below which the guide is split."""
_MOST_SPLITS = 16
_SUMMED_TILES = 64
"""Tiles of the guide that one float32 sum of "softmax" takes; such sums are summed again."""
_MOST_WINNERS = 16
"""Winners that a pass of "topk" finds."""
_RESOLVED_ROWS = 8
_COMBINED = 256
_LOG2_E = 1.4426950408889634
_REGISTERS = {"maxnreg": 255}
"""Without it ptxas may spill some registers to run more blocks at a time, which shared memory does not let it
do; with it, it may unroll loops over channels, and spill for that."""


def _tile(query: int, guide: int, warps: int, stages: int, registers: Tile = _REGISTERS) -> Tile:
    shape = {"BLOCK_QUERY": query, "BLOCK_GUIDE": guide, "num_warps": warps, "num_stages": stages}
    return {**shape, **registers}


def _gradient_tile(rows: int, columns: int, channels: int, warps: int, stages: int) -> Tile:
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "OUT": channels,
        "num_warps": warps,
        "num_stages": stages,
        **_REGISTERS,
    }


def _rows(hopper: tuple[Tile, ...], ampere: tuple[Tile, ...], small: tuple[Tile, ...]) -> tuple[Row, ...]:
    """Tiles for rows of which up to 256, 512 and 1024 bytes are held: of chips with 227 KiB of shared memory,
    with 99 (8.6 and 8.9), and with 163; only the first hold 1024."""
    chips = (((9, 0), hopper), ((8, 6), small), ((8, 0), ampere))
    return tuple(
        Row(tile, chip, {"row_bytes": size})
        for chip, tiles in chips
        for size, tile in zip((256, 512, 1024), tiles, strict=False)
    )


_MAX = Tiles(
    "cross_similarity.max",
    _rows(
        (_tile(128, 128, 8, 3), _tile(128, 128, 8, 2), _tile(64, 64, 4, 2)),
        (_tile(128, 64, 8, 3, {}), _tile(128, 64, 8, 2)),
        (_tile(128, 32, 8, 3, {}), _tile(64, 64, 8, 2)),
    ),
    (
        _tile(128, 64, 8, 3),
        _tile(128, 64, 4, 3),
        _tile(64, 128, 4, 2),
        _tile(64, 64, 4, 3),
        _tile(64, 32, 4, 3),
    ),
)


_SOFTMAX = Tiles(
    "cross_similarity.softmax",
    _rows(
        (_tile(128, 64, 8, 3), _tile(128, 64, 8, 3), _tile(64, 32, 4, 2)),
        (_tile(128, 32, 8, 2), _tile(128, 32, 8, 2)),
        (_tile(64, 32, 8, 3, {}), _tile(64, 32, 8, 2)),
    ),
    (_tile(128, 128, 8, 2), _tile(64, 64, 4, 3), _tile(64, 32, 4, 3)),
)


_TOPK = Tiles(
    "cross_similarity.topk",
    _rows(
        (_tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(64, 32, 4, 2)),
        (_tile(64, 32, 8, 2), _tile(64, 32, 8, 2)),
        (_tile(64, 32, 8, 2), _tile(64, 32, 8, 2)),
    ),
    (_tile(64, 32, 4, 2), _tile(32, 64, 8, 2), _tile(64, 64, 8, 2)),
)


_GRADIENT = Tiles(
    "cross_similarity.softmax_backward",
    _rows(
        (
            _gradient_tile(64, 32, 128, 8, 2),
            _gradient_tile(64, 32, 128, 8, 2),
            _gradient_tile(32, 32, 128, 8, 1),
        ),
        (_gradient_tile(32, 32, 128, 8, 2), _gradient_tile(32, 32, 128, 8, 2)),
        (_gradient_tile(32, 32, 128, 8, 2), _gradient_tile(32, 32, 128, 8, 2)),
    ),
    (_gradient_tile(32, 32, 64, 8, 2), _gradient_tile(32, 32, 64, 4, 2), _gradient_tile(32, 16, 64, 4, 2)),
)


def _source(rows: Rows, block: int, made: Form) -> Any:
    """Packed rows as the kernels read their tiles: by a descriptor where the chip copies tiles itself."""
    matrix = rows.packed.flatten(0, 1)
    if _triton.capability(matrix.device) < (9, 0):
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [block, made.chunk])


def _constants(made: Form, device: torch.device) -> dict[str, Any]:
    return {**made.constants(), "DESCRIPTOR": _triton.capability(device) >= (9, 0)}


def _row_bytes(made: Form) -> int:
    return made.chunk * made.dtype.itemsize * (2 if made.split else 1)


def _groups(query: Tensor, guide: Tensor, made: Form, workspace_bytes: int = 0) -> list[slice]:
    """Images whose packed rows, what belongs to their pixels, and so much workspace each are held at once."""
    pixels = query.shape[2] * query.shape[3] + guide.shape[2] * guide.shape[3]
    packed = pixels * made.width * made.dtype.itemsize
    beside = max(pixels * _PIXEL_BYTES, workspace_bytes)
    each = max(packed, beside * (_IN_FLIGHT_BYTES // _WORKSPACE_BYTES))
    return _triton.parts(query.shape[0], each, _IN_FLIGHT_BYTES)


def _by_class(
    made: Form, tensors: tuple[Any, ...], images: slice, ignore_index: int, eps: float, digests: bool = False
) -> tuple[Ranges, tuple[Rows, Rows]]:
    """Which rows of some images are compared, and those of both sides, sorted."""
    parts: Any = (None if one is None else one[images] for one in tensors)
    query, guide, guide_labels, classes, query_labels = parts
    found = ranges(query, guide, guide_labels, classes, query_labels, ignore_index)
    theirs = pack(guide, found.guide_order, made, eps, digests=digests)
    return found, (pack(query, found.query_order, made, eps), theirs)


def forward(
    query: Tensor,  # [B,C,h,w]
    guide: Tensor,  # [B,C,h',w']
    guide_labels: Tensor,  # [B,H,W]
    classes: Tensor | None,  # [B,S]
    query_labels: Tensor | None,  # [B,H,W]
    reduction: str,
    k: int,
    temperature: float,
    ignore_index: int,
    eps: float,
    return_index: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity [B,S,h,w], index [B,S,h,w] or [0], and what backward needs of "topk" and "softmax"."""
    invalid = None if classes is None else checks.class_values("cross_similarity", classes)
    batch, _, h, w = query.shape
    pixels = guide.shape[2] * guide.shape[3]
    shape = (batch, 1 if classes is None else classes.shape[1], h, w)
    similarity = torch.zeros(shape, dtype=torch.float32, device=query.device)
    indexed = return_index or reduction == "max"
    index = torch.full(shape if indexed else (0,), -1, dtype=torch.int64, device=query.device)
    saved = similarity.new_empty(0)
    if reduction == "topk":
        saved = index.new_full((*shape, max(1, min(k, pixels))), -1)
    elif reduction == "softmax":
        saved = torch.full_like(similarity, -torch.inf)
    made = form(query, guide)
    tensors = (query, guide, guide_labels, classes, query_labels)

    def compare(images: slice) -> None:
        resolved = indexed and reduction != "topk"
        found, sides = _by_class(made, tensors, images, ignore_index, eps, digests=resolved)
        special = _special_rows(sides[1], found) if resolved else None
        if reduction == "mean":
            mean(made, *sides, found, few_labels(guide_labels), similarity[images])
            if not indexed:
                return
        each = _STATE_BYTES * sides[0].scale.numel()
        for slots in _triton.parts(shape[1], each, _WORKSPACE_BYTES):
            some = found.of(slots)
            here, saved_here = similarity[images, slots], saved[images, slots] if saved.dim() > 1 else saved
            index_here = index[images, slots] if indexed else None
            if reduction == "topk":
                _topk(made, *sides, some, here, index_here, saved_here)
            elif reduction == "softmax":
                _softmax(made, *sides, some, temperature, here, saved_here)
            if index_here is not None and special is not None:
                _max(made, *sides, some, special, here if reduction == "max" else None, index_here)

    # What a group needs is let go with its call, before the next one is packed.
    for images in _groups(query, guide, made) if similarity.numel() and pixels else ():
        compare(images)
    if invalid is not None:
        similarity.masked_fill_(invalid, torch.nan)
    return similarity, index, saved


def _splits(programs: int, guide_pixels: int, block: int, device: torch.device) -> int:
    """How many parts of the guide are gone through side by side, for few query tiles."""
    wanted = -(-_WAVES * _triton.multiprocessors(device) // max(1, programs))
    return max(1, min(wanted, _MOST_SPLITS, guide_pixels // (4 * block)))


def _special_rows(guide: Rows, found: Ranges) -> tuple[Tensor, Tensor]:
    """What the winner among guide rows depends on beside products: how many rows before each one, and all,
    are not finite [B,m+1], and the first row that each is like [B,m]."""
    bad = torch.zeros(guide.scale.shape[0], guide.pixels + 1, dtype=torch.int32, device=guide.scale.device)
    torch.cumsum(guide.scale.isnan(), 1, dtype=torch.int32, out=bad[:, 1:])
    return bad, first_alike(guide, found)


def _max(
    made: Form,
    query: Rows,
    guide: Rows,
    found: Ranges,
    special: tuple[Tensor, Tensor],
    # outputs
    similarity: Tensor | None,  # [B,S,h,w]
    index: Tensor,  # [B,S,h,w]
) -> None:
    batch, slots = index.shape[:2]
    device = index.device
    bad, alike = special

    def launch(tile: Tile) -> None:
        tiles = -(-query.pixels // tile["BLOCK_QUERY"])
        splits = _splits(tiles * slots * batch, guide.pixels, tile["BLOCK_GUIDE"], device)
        value = torch.empty(splits, batch, slots, query.pixels, dtype=torch.float32, device=device)
        code = torch.empty_like(value, dtype=torch.int32)
        common = {"LANES": by_max.LANES, "OWN": found.own}
        _triton.launch(
            by_max.sweep_max,
            tiles * splits * slots * batch,
            query.packed,
            _source(guide, tile["BLOCK_GUIDE"], made),
            guide.scale,
            found.start,
            found.stop,
            found.query_end,
            query.pixels,
            guide.pixels,
            batch,
            slots,
            tiles,
            splits,
            value,
            code,
            **_constants(made, device),
            **common,
            **tile,
        )
        blocks = -(-query.pixels // _RESOLVED_ROWS)
        _triton.launch(
            by_max.resolve,
            blocks * slots * batch,
            query.packed,
            query.scale,
            tensor_or(query.order, found.guide_order),
            guide.packed,
            guide.scale,
            found.guide_order,
            found.start,
            found.stop,
            bad,
            alike,
            value,
            code,
            query.pixels,
            guide.pixels,
            batch,
            slots,
            blocks,
            splits,
            *index.stride()[:2],
            value if similarity is None else similarity,
            index,
            **common,
            ROWS=_RESOLVED_ROWS,
            BLOCK_GUIDE=tile["BLOCK_GUIDE"],
            VALUES=similarity is not None,
            CHUNK=made.piece,
            PADDED=made.padded,
            SPLIT=made.split,
            num_warps=8,
            maxnreg=128,
        )

    shape = {"row_bytes": _row_bytes(made)}
    _MAX.run(launch, _triton.capability(device), device, shape)


def _softmax(
    made: Form,
    query: Rows,
    guide: Rows,
    found: Ranges,
    temperature: float,
    # outputs
    similarity: Tensor,  # [B,S,h,w]
    log_total: Tensor,  # [B,S,h,w]
) -> None:
    batch, slots = similarity.shape[:2]
    device = similarity.device

    def launch(tile: Tile) -> None:
        tiles = -(-query.pixels // tile["BLOCK_QUERY"])
        splits = _splits(tiles * slots * batch, guide.pixels, tile["BLOCK_GUIDE"], device)
        parts = torch.empty(3, splits, batch, slots, query.pixels, dtype=torch.float32, device=device)
        _triton.launch(
            by_softmax.sweep_softmax,
            tiles * splits * slots * batch,
            query.packed,
            query.scale,
            _source(guide, tile["BLOCK_GUIDE"], made),
            guide.scale,
            found.start,
            found.stop,
            found.query_end,
            query.pixels,
            guide.pixels,
            batch,
            slots,
            tiles,
            splits,
            _LOG2_E / temperature,
            *parts.unbind(),
            LANES=by_max.LANES,
            SUMMED=_SUMMED_TILES,
            OWN=found.own,
            enable_fp_fusion=False,
            **_constants(made, device),
            **tile,
        )
        blocks = -(-query.pixels // _COMBINED)
        _triton.launch(
            by_softmax.combine_softmax,
            batch * slots * blocks,
            tensor_or(query.order, found.guide_order),
            *parts.unbind(),
            query.pixels,
            batch * slots * query.pixels,
            slots,
            blocks,
            splits,
            _LOG2_E / temperature,
            *similarity.stride()[:2],
            similarity,
            log_total,
            BLOCK=_COMBINED,
            OWN=found.own,
            num_warps=4,
        )

    _SOFTMAX.run(launch, _triton.capability(device), device, {"row_bytes": _row_bytes(made)})


def _topk(
    made: Form,
    query: Rows,
    guide: Rows,
    found: Ranges,
    # outputs
    similarity: Tensor,  # [B,S,h,w]
    index: Tensor | None,  # [B,S,h,w]
    saved: Tensor,  # [B,S,h,w,k]
) -> None:
    batch, slots = similarity.shape[:2]
    device, winners = similarity.device, saved.shape[-1]
    most = min(_MOST_WINNERS, max(2, _triton.next_power_of_2(winners)))

    def launch(tile: Tile) -> None:
        tiles = -(-query.pixels // tile["BLOCK_QUERY"])
        # Each pass reads what the one before wrote.
        states = torch.empty(2, 4, batch, slots, query.pixels, dtype=torch.float32, device=device)
        for number, before in enumerate(range(0, winners, most)):
            _triton.launch(
                by_topk.sweep_topk,
                tiles * slots * batch,
                query.packed,
                query.scale,
                tensor_or(query.order, found.guide_order),
                _source(guide, tile["BLOCK_GUIDE"], made),
                guide.scale,
                found.guide_order,
                found.start,
                found.stop,
                found.query_end,
                states[(number + 1) % 2],
                query.pixels,
                guide.pixels,
                batch,
                slots,
                tiles,
                *similarity.stride()[:2],
                min(most, winners - before),
                before,
                winners,
                states[number % 2],
                similarity,
                tensor_or(index, saved),
                saved,
                WINNERS=most,
                BOUNDED=before > 0,
                INDEXED=index is not None and before == 0,
                OWN=found.own,
                **_constants(made, device),
                **tile,
            )

    _TOPK.run(launch, _triton.capability(device), device, {"row_bytes": _row_bytes(made)})


def backward(
    grad: Tensor,  # [B,S,h,w]
    similarity: Tensor,  # [B,S,h,w]
    index: Tensor,  # [B,S,h,w]
    saved: Tensor,
    query: Tensor,
    guide: Tensor,
    guide_labels: Tensor,
    classes: Tensor | None,
    query_labels: Tensor | None,
    reduction: str,
    k: int,
    temperature: float,
    ignore_index: int,
    eps: float,
    need_query: bool,
    need_guide: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients like query and guide, or [0] where not needed."""
    grad_query = torch.empty_like(query) if need_query else query.new_empty(0)
    grad_guide = torch.empty_like(guide) if need_guide else guide.new_empty(0)
    slots = grad.shape[1]
    if 0 in (grad.numel(), guide.numel(), slots):
        return grad_query.zero_(), grad_guide.zero_()
    made = form(query, guide)
    tensors = (query, guide, guide_labels, classes, query_labels)
    grad = grad.to(torch.float32).contiguous()
    by_winners = reduction in ("max", "topk")
    # Of an image and slot.
    sorted_bytes = WINNER_BYTES * grad[0, 0].numel() * (max(saved.shape[-1], 1) if reduction == "topk" else 1)

    def go_back(images: slice) -> None:
        outputs = (grad_query[images] if need_query else None, grad_guide[images] if need_guide else None)
        if by_winners:
            winners = index[images][..., None] if reduction == "max" else saved[images]
            sides = (pack(query[images], None, made, eps), pack(guide[images], None, made, eps))
            at_once = _triton.parts(slots, sorted_bytes * (images.stop - images.start), _WORKSPACE_BYTES)
            winners_backward(made, *sides, grad[images].flatten(2), winners.flatten(2, 3), at_once, *outputs)
            return
        found, sides = _by_class(made, tensors, images, ignore_index, eps)
        if reduction == "softmax":
            state = (grad[images], similarity[images].contiguous(), saved[images].contiguous())
            for there, output in enumerate(outputs):
                if output is not None:
                    _softmax_backward(made, *sides, found, temperature, bool(there), *state, output)
        else:
            few = (few_labels(guide_labels), None if query_labels is None else few_labels(query_labels))
            mean_backward(made, *sides, found, few, grad[images].flatten(2), *outputs)

    for images in _groups(query, guide, made, sorted_bytes if by_winners else 0):
        go_back(images)
    return grad_query, grad_guide


def _softmax_backward(
    made: Form,
    query: Rows,
    guide: Rows,
    found: Ranges,
    temperature: float,
    to_guide: bool,
    grad: Tensor,  # [B,S,h,w]
    similarity: Tensor,
    log_total: Tensor,
    # outputs
    output: Tensor,
) -> None:
    here, there = (guide, query) if to_guide else (query, guide)
    starts, stops, ends = found.start, found.stop, found.query_end
    if to_guide and found.own:
        starts, stops, ends = found.back_start, found.back_stop, found.guide_end
    batch, slots = grad.shape[:2]
    device = grad.device

    def launch(tile: Tile) -> None:
        tiles = -(-here.pixels // tile["ROWS"])
        out = math.gcd(made.padded, tile["OUT"])
        _triton.launch(
            by_softmax.sweep_gradient,
            batch * tiles * (made.padded // out),
            here.packed,
            here.scale,
            here.inverse,
            tensor_or(here.order, found.guide_order),
            _source(there, tile["COLUMNS"], made),
            there.packed,
            there.scale,
            tensor_or(there.order, found.guide_order),
            starts,
            stops,
            ends,
            grad,
            similarity,
            log_total,
            *output.stride(),
            output.shape[3],
            here.pixels,
            there.pixels,
            batch,
            slots,
            tiles,
            output.shape[1],
            temperature,
            output,
            TO_GUIDE=to_guide,
            OWN=found.own,
            ORDERED=here.order is not None,
            PRECISION=made.precision,
            enable_fp_fusion=False,
            **_constants(made, device),
            **{**tile, "OUT": out},
        )

    _GRADIENT.run(launch, _triton.capability(device), device, {"row_bytes": _row_bytes(made)})
