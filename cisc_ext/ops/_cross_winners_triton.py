"""Gradients of `cross_similarity` that follow winners: gathered for the query, sums of segments for the
guide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cross_sums_triton as sums
from . import _triton
from ._cross_pack_triton import Form, Rows, tensor_or

_ROWS = 16
_UNROLLED = 2


def gather(
    made: Form,
    table: Rows | Tensor,
    idx: Tensor,  # [B,S,n*k] int64, or expanded to it
    weight: Tensor,  # [B,S,n] float32, or expanded to it
    winners: int,
    own: Rows,
    output: Tensor,  # [B,C,h,w]
) -> None:
    """Gradient to each pixel of `own`: its rows of a table, weighted."""
    batch, channels = output.shape[:2]
    blocks = -(-own.pixels // _ROWS)
    packed = isinstance(table, Rows)
    values = table.packed if isinstance(table, Rows) else table
    _triton.launch(
        sums.gather_gradients,
        batch * blocks,
        values,
        table.scale if isinstance(table, Rows) else own.scale,
        idx,
        weight,
        own.packed,
        own.scale,
        own.inverse,
        tensor_or(own.order, idx),
        idx.stride(0),
        idx.stride(1),
        idx.stride(2) * winners,
        *weight.stride(),
        *output.stride(),
        output.shape[3],
        own.pixels,
        values.shape[1],
        idx.shape[1],
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
        WIDEN=_triton.INTERPRETED,
        num_warps=4,
    )


def winners_backward(
    made: Form,
    query: Rows,
    guide: Rows,
    grad: Tensor,  # [B,S,n]
    winners: Tensor,  # [B,S,n,k] or, flattened, [B,S,n*k]
    # outputs
    grad_query: Tensor | None,
    grad_guide: Tensor | None,
) -> None:
    batch, slots, pixels = grad.shape
    winners = winners.reshape(batch, slots, pixels, -1)
    k = winners.shape[3]
    share = grad
    if k > 1:
        share = grad / (winners >= 0).sum(3).clamp_(min=1)
    winners = winners.flatten(2)
    if grad_query is not None:
        gather(made, guide, winners, share, k, query, grad_query)
    if grad_guide is None:
        return
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
        WIDEN=_triton.INTERPRETED,
        num_warps=8,
    )
