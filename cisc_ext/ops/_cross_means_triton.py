"""The mean of `cross_similarity`: products with means of unit vectors, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _cross_sums_triton as sums
from . import _triton
from ._cross_pack_triton import Form, Ranges, Rows, tensor_or
from ._cross_winners_triton import gather

_ROWS = 16
_UNROLLED = 32
_TABLE_BYTES = 2**23
"""Of means that are held at once; the next ones are made before these are let go."""


def few_labels(labels: Tensor) -> int | None:
    """How many different labels there can be, where the dtype tells."""
    return 256 if labels.dtype == torch.uint8 else None


class Means:
    """Means of the guide's unit vectors, and which of them each query row is compared with."""

    def __init__(self, made: Form, guide: Rows, found: Ranges, labels: int | None, slots: int) -> None:
        self.found = found
        if found.own:
            self.starts, self.stops, rank = runs(found.guide_end, labels)
            paired = found.start < found.stop
            first = found.start.clamp(max=guide.pixels - 1).to(torch.int64)
            self.idx = torch.where(paired, rank.gather(1, first), -1)[:, None]  # [B,1,n]
        else:
            self.starts, self.stops = found.start, found.stop
            one = torch.arange(slots, device=guide.scale.device).expand_as(found.start)
            self.idx = torch.where(found.start < found.stop, one, -1)[:, :, None]  # [B,S,1]
        self.counts = (self.stops - self.starts).to(torch.float32)
        self.rows = made, guide, torch.ones_like(guide.scale)

    def tables(self) -> Iterator[tuple[int, Tensor]]:
        """The means in parts, each with the number of its first."""
        return tables(*self.rows, self.starts, self.stops, self.counts)

    def strides(self) -> tuple[int, int, int]:
        """Of `idx`, for a kernel that goes through all rows."""
        stride_b, stride_s, stride_n = self.idx.stride()
        return stride_b, stride_s, stride_n if self.found.own else 0


def runs(ends: Tensor, labels: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Start and stop of each run of sorted rows [B,T], and the number of the run of each row [B,n]."""
    begins = torch.ones_like(ends, dtype=torch.int64)
    begins[:, 1:] = ends[:, 1:] != ends[:, :-1]
    rank = begins.cumsum(1) - 1
    most = min(ends.shape[1], labels or ends.shape[1])
    numbers = torch.arange(most, device=ends.device).expand(ends.shape[0], -1).contiguous()
    starts = torch.searchsorted(rank, numbers).to(torch.int32)
    stops = torch.searchsorted(rank, numbers, right=True).to(torch.int32)
    return starts, stops, rank


def tables(
    made: Form, rows: Rows, share: Tensor, starts: Tensor, stops: Tensor, divisor: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """`segment_means` of as many ranges as may be held at once, with the number of the first one."""
    batch, channels = rows.image.shape[:2]
    for some in _triton.parts(starts.shape[1], batch * channels * 4, _TABLE_BYTES):
        ends = (each[:, some].contiguous() for each in (starts, stops, divisor))
        yield some.start, segment_means(made, rows, share, *ends)


def segment_means(
    made: Form, rows: Rows, share: Tensor, starts: Tensor, stops: Tensor, divisor: Tensor
) -> Tensor:  # [B,T,C]
    """Sum of share times unit vector over ranges of rows, divided."""
    batch, targets = starts.shape
    channels, device = rows.image.shape[1], share.device
    chunks = -(-rows.pixels // sums.ENTRIES)
    totals = torch.empty(batch, chunks, channels, dtype=torch.float32, device=device)
    means = torch.empty(batch, targets, channels, dtype=torch.float32, device=device)
    if channels == 0:
        return means
    chunk = made.piece
    slices = -(-channels // chunk)
    shape = {"ENTRIES": sums.ENTRIES, "CHUNK": chunk, "PADDED": made.padded, "SPLIT": made.split}
    _triton.launch(
        sums.chunk_totals,
        batch * chunks * slices,
        rows.packed,
        rows.scale,
        share,
        share,
        share,
        rows.pixels,
        rows.pixels,
        1,
        channels,
        chunks,
        slices,
        totals,
        LISTED=False,
        num_warps=4,
        **shape,
    )
    _triton.launch(
        sums.segment_means,
        batch * targets * slices,
        rows.packed,
        rows.scale,
        share,
        totals,
        starts,
        stops,
        divisor,
        rows.pixels,
        targets,
        channels,
        chunks,
        slices,
        means,
        UNROLLED=_UNROLLED,
        num_warps=4,
        **shape,
    )
    return means


def mean(
    made: Form,
    query: Rows,
    guide: Rows,
    found: Ranges,
    labels: int | None,
    # outputs
    similarity: Tensor,  # [B,S,h,w], zeros
) -> None:
    batch, slots = similarity.shape[:2]
    means = Means(made, guide, found, labels, slots)
    blocks = -(-query.pixels // _ROWS)
    for first, table in means.tables():
        _triton.launch(
            sums.mean_cosines,
            batch * slots * blocks,
            query.packed,
            query.scale,
            table,
            means.idx - first,
            tensor_or(query.order, found.guide_order),
            *means.strides(),
            query.pixels,
            table.shape[1],
            slots,
            query.image.shape[1],
            blocks,
            similarity,
            ROWS=_ROWS,
            CHUNK=made.piece,
            PADDED=made.padded,
            SPLIT=made.split,
            ORDERED=found.own,
            num_warps=4,
        )


def mean_backward(
    made: Form,
    query: Rows,
    guide: Rows,
    found: Ranges,
    labels: tuple[int | None, int | None],  # how many the guide and the query can have
    grad: Tensor,  # [B,S,n]
    # outputs
    grad_query: Tensor | None,
    grad_guide: Tensor | None,
) -> None:
    slots, pixels = grad.shape[1:]
    means = Means(made, guide, found, labels[0], slots)
    if found.query_order is not None:
        grad = grad.gather(2, found.query_order[:, None])
    if grad_query is not None:
        for first, table in means.tables():
            idx = (means.idx - first).expand(-1, -1, pixels)
            gather(made, table, idx, grad, 1, query, grad_query, accumulate=first > 0)
    if grad_guide is None:
        return
    if found.own:
        starts, stops, rank = runs(found.query_end, labels[1])
        ones = torch.ones_like(starts, dtype=torch.float32)
        run = found.back_start.clamp(max=pixels - 1).to(torch.int64)
        idx = torch.where(found.back_start < found.back_stop, rank.gather(1, run), -1)[:, None]
        _, _, guide_rank = runs(found.guide_end, labels[0])
        weight = (1 / means.counts.clamp(min=1)).gather(1, guide_rank)[:, None]
        for number, sums_here in tables(made, query, grad[:, 0], starts, stops, ones):
            there = idx - number
            gather(made, sums_here, there, weight, 1, guide, grad_guide, accumulate=number > 0)
    else:
        start, stop = (torch.full_like(found.start[:, :1], end) for end in (0, pixels))
        one = torch.ones_like(start, dtype=torch.float32)
        back = [segment_means(made, query, grad[:, s].contiguous(), start, stop, one) for s in range(slots)]
        weight = (1 / means.counts.clamp(min=1))[..., None].expand(-1, -1, guide.pixels)
        gather(made, torch.cat(back, 1), (found.start, found.stop), weight, 1, guide, grad_guide)
