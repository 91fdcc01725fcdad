"""Gradients of `cross_similarity` that follow winners: gathered for the query, sums of segments for the
guide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cross_sums_triton as sums
from . import _triton
from ._cross_pack_triton import Form, Rows, tensor_or

WINNER_BYTES = 40
"""For each winner, while they are sorted."""
_ROWS = 16
_UNROLLED = 2


def gather(
    made: Form,
    table: Rows | Tensor,
    idx: Tensor | tuple[Tensor, Tensor],  # [B,S,n*k] int64, or expanded to it; or each slot's pixels
    weight: Tensor,  # [B,S,n] float32, or expanded to it
    winners: int,
    own: Rows,
    output: Tensor,  # [B,C,h,w]
    *,
    accumulate: bool = False,
) -> None:
    """Gradient to each pixel of `own`: its rows of a table, weighted; added to the output's where told.

    Instead of rows, where the pixels of each slot start and stop can be given [B,S]: a slot's row is theirs.
    """
    by_ranges = isinstance(idx, tuple)
    first, stops = idx if isinstance(idx, tuple) else (idx, idx)
    batch, channels = output.shape[:2]
    blocks = -(-own.pixels // _ROWS)
    packed = isinstance(table, Rows)
    values = table.packed if isinstance(table, Rows) else table
    _triton.launch(
        sums.gather_gradients,
        batch * blocks,
        values,
        table.scale if isinstance(table, Rows) else own.scale,
        first,
        stops,
        weight,
        own.packed,
        own.scale,
        own.inverse,
        tensor_or(own.order, first),
        *((0, 0, 0) if by_ranges else (first.stride(0), first.stride(1), first.stride(2) * winners)),
        *weight.stride(),
        *output.stride(),
        output.shape[3],
        own.pixels,
        values.shape[1],
        first.shape[1],
        winners,
        channels,
        blocks,
        output,
        ROWS=_ROWS,
        CHUNK=made.chunk,
        PADDED=made.padded,
        SPLIT=made.split,
        PACKED=packed,
        ORDERED=own.order is not None,
        RANGES=by_ranges,
        ACCUMULATE=accumulate,
        WIDEN=_triton.INTERPRETED,
        num_warps=4,
    )


def winners_backward(
    made: Form,
    query: Rows,
    guide: Rows,
    grad: Tensor,  # [B,S,n]
    winners: Tensor,  # [B,S,n,k]
    at_once: list[slice],  # slots whose winners are sorted together
    # outputs
    grad_query: Tensor | None,
    grad_guide: Tensor | None,
) -> None:
    k = winners.shape[3]
    share = grad
    if k > 1:
        share = grad / (winners >= 0).sum(3).clamp_(min=1)
    winners = winners.flatten(2)
    if grad_query is not None:
        gather(made, guide, winners, share, k, query, grad_query)
    if grad_guide is not None:
        for slots in at_once:
            some = winners[:, slots], share[:, slots].contiguous()
            _to_guide(made, query, guide, *some, k, slots.start > 0, grad_guide)


def _to_guide(
    made: Form,
    query: Rows,
    guide: Rows,
    winners: Tensor,  # [B,S,n*k] int64, -1 for none
    share: Tensor,  # [B,S,n]
    k: int,
    accumulate: bool,
    # outputs
    grad_guide: Tensor,
) -> None:
    """Of some slots. Those of different classes have no guide pixel in common."""
    batch, _, pixels = share.shape
    # Of an image, sorted by winner; those without one come last.
    keys = torch.where(winners < 0, guide.pixels, winners).to(torch.int32).flatten(1)
    keys, perm = keys.sort(dim=1, stable=True)
    targets = torch.arange(guide.pixels + 1, dtype=torch.int32, device=keys.device)
    bounds = torch.searchsorted(keys, targets.expand(batch, -1).contiguous())
    entries = keys.shape[1]
    chunks = -(-entries // sums.ENTRIES)
    channels = guide.image.shape[1]
    totals = torch.empty(batch, chunks, channels, dtype=torch.float32, device=keys.device)
    chunk = made.piece
    slices = -(-channels // chunk)
    _triton.launch(
        sums.chunk_totals,
        batch * chunks * slices,
        query.packed,
        query.scale,
        keys,
        perm,
        share,
        pixels,
        entries,
        k,
        channels,
        chunks,
        slices,
        totals,
        ENTRIES=sums.ENTRIES,
        CHUNK=chunk,
        PADDED=made.padded,
        SPLIT=made.split,
        LISTED=True,
        num_warps=4,
    )
    blocks = -(-guide.pixels // _ROWS)
    _triton.launch(
        sums.segment_gradients,
        batch * blocks,
        query.packed,
        query.scale,
        perm,
        share,
        totals,
        bounds,
        guide.packed,
        guide.scale,
        guide.inverse,
        *grad_guide.stride(),
        grad_guide.shape[3],
        pixels,
        guide.pixels,
        entries,
        k,
        channels,
        chunks,
        blocks,
        grad_guide,
        ROWS=_ROWS,
        UNROLLED=_UNROLLED,
        ENTRIES=sums.ENTRIES,
        CHUNK=made.chunk,
        PADDED=made.padded,
        SPLIT=made.split,
        ACCUMULATE=accumulate,
        WIDEN=_triton.INTERPRETED,
        num_warps=8,
    )
