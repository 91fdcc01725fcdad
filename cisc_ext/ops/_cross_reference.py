"""Reference arithmetic of `cross_similarity`: tiles of the affinity, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._bilinear import nearest_rows
from ._reference import accumulator, part, pixel_ranges, set_part, through_norm, unit_rows

REDUCTIONS = ("max", "topk", "softmax", "mean")

_QUERY_PIXELS = 1024
_GUIDE_PIXELS = 1024
_OPERAND_BYTES = 4 * 2**20
_TOTAL_BYTES = 24 * 2**20
_TOPK_CANDIDATES = 2**18
_COLUMNS = 64


@dataclass(frozen=True)
class _Pair:
    """One query image and its guide."""

    query: Tensor  # [C,h,w]
    guide: Tensor  # [C,h',w']
    labels: Tensor  # [m] int64, of the guide's pixels
    own: Tensor | None  # [n] int64, of the query's pixels; None outside own-label mode
    classes: Tensor | None  # [S] int64; None in own-label mode
    byte_labels: bool  # own-label mode: whether all labels are of uint8
    ignore_index: int
    eps: float
    dtype: torch.dtype

    def class_values(self) -> Tensor:
        """The classes, outside own-label mode."""
        assert self.classes is not None
        return self.classes

    @property
    def slots(self) -> int:
        return 1 if self.classes is None else len(self.classes)

    def ranges(self, image: Tensor, most: int) -> list[tuple[int, int]]:
        """First and last pixel of each tile of at most about `most`: whole rows, or parts of one row."""
        channels, height, width = image.shape
        return pixel_ranges(
            height, width, min(most, _OPERAND_BYTES // max(1, channels * self.dtype.itemsize))
        )

    def query_ranges(self, winners: int = 0) -> list[tuple[int, int]]:
        """The query's tiles, smaller where each pixel has many winners."""
        most = _TOPK_CANDIDATES // (winners + _GUIDE_PIXELS) if winners else _QUERY_PIXELS
        return self.ranges(self.query, max(1, min(_QUERY_PIXELS, most)))

    def guide_ranges(self) -> list[tuple[int, int]]:
        return self.ranges(self.guide, _GUIDE_PIXELS)

    def guide_blocks(self) -> list[list[tuple[int, int]]]:
        """The guide's tiles in groups whose sums for the backward pass are held at once."""
        blocks: list[list[tuple[int, int]]] = []
        most = _TOTAL_BYTES // max(1, self.guide.shape[0] * self.dtype.itemsize)
        for first, last in self.guide_ranges():
            if not blocks or last - blocks[-1][0][0] > most:
                blocks.append([])
            blocks[-1].append((first, last))
        return blocks

    def tiles(
        self, image: Tensor, ranges: list[tuple[int, int]]
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """First and last pixel of each tile, its unit vectors [t,C] and 1 / norm [t]."""
        for first, last in ranges:
            units, inverse = unit_rows(part(image, first, last), self.eps, self.dtype)
            yield first, last, units, inverse

    def cosines(self, units: Tensor, guide_units: Tensor) -> Tensor:
        """Cosines [t,u] of a tile of the query [t,C] and one of the guide [u,C].

        A matrix product sums its last columns in another order than the others. They are spare ones here, of
        zeros, and every tile of the guide is brought to the same width: equal guide pixels get equal cosines
        wherever they stand, so that ties are ties.
        """
        widest = max(last - first for first, last in self.guide_ranges())
        width = (-(-widest // _COLUMNS) + 1) * _COLUMNS
        padded = functional.pad(guide_units, (0, 0, 0, width - len(guide_units)))
        return (units @ padded.t())[:, : len(guide_units)]

    def member(self, s: int, q0: int, q1: int, g0: int, g1: int) -> Tensor:
        """Whether a guide pixel of a tile is of the class compared: [t,u], or [1,u] where all query pixels
        agree."""
        labels = self.labels[None, g0:g1]
        if self.classes is not None:
            return (labels == self.classes[s]) & (self.classes[s] >= 0)
        assert self.own is not None
        own = self.own[q0:q1, None]
        return (labels == own) & (own != self.ignore_index)


def _pairs(
    query: Tensor,
    guide: Tensor,
    guide_labels: Tensor,
    classes: Tensor | None,
    query_labels: Tensor | None,
    ignore_index: int,
    eps: float,
) -> Iterator[_Pair]:
    def low(labels: Tensor, image: Tensor) -> Tensor:
        rows = nearest_rows(labels.shape[0], image.shape[1], labels.device)
        columns = nearest_rows(labels.shape[1], image.shape[2], labels.device)
        return labels[rows[:, None], columns].flatten().to(torch.int64)

    for b in range(query.shape[0]):
        yield _Pair(
            query[b],
            guide[b],
            low(guide_labels[b], guide[b]),
            None if query_labels is None else low(query_labels[b], query[b]),
            None if classes is None else classes[b].to(torch.int64),
            query_labels is not None and query_labels.dtype == guide_labels.dtype == torch.uint8,
            ignore_index,
            eps,
            accumulator(query, guide),
        )


class _Best:
    """The best guide pixel so far of each query pixel: the running maximum and its index."""

    def __init__(self, pixels: int, like: Tensor) -> None:
        self.value = torch.full((pixels,), -torch.inf, dtype=like.dtype, device=like.device)
        self.index = torch.full((pixels,), -1, dtype=torch.int64, device=like.device)

    def add(self, cosine: Tensor, first: int) -> None:
        """Take in a tile [t,u] with -inf outside the class, whose pixels start at `first`; NaN wins."""
        value, index = cosine.max(1)
        better = (value > self.value) | (value.isnan() & ~self.value.isnan())
        self.value = torch.where(better, value, self.value)
        self.index = torch.where(better, index + first, self.index)

    def result(self) -> Tensor:
        return torch.where(self.index < 0, 0, self.value)


class _TopK:
    """The k best guide pixels so far of each query pixel, in the order of their indices."""

    def __init__(self, pixels: int, k: int, like: Tensor) -> None:
        self.k = k
        self.value = torch.full((pixels, k), -torch.inf, dtype=like.dtype, device=like.device)
        self.index = torch.full((pixels, k), -1, dtype=torch.int64, device=like.device)

    def add(self, cosine: Tensor, first: int) -> None:
        """Take in a tile [t,u]; of equal cosines the lower index stays."""
        here = torch.arange(first, first + cosine.shape[1], device=cosine.device).expand_as(cosine)
        value = torch.cat([self.value, cosine], 1)
        index = torch.cat([self.index, here.where(cosine > -torch.inf, -1).where(~cosine.isnan(), here)], 1)
        rank = value.nan_to_num(nan=torch.inf, neginf=-torch.inf)
        least = rank.topk(self.k, 1).values[:, -1:]
        above, equal = rank > least, rank == least
        room = self.k - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1) <= room))
        place = torch.arange(value.shape[1], 0, -1, dtype=torch.int32, device=value.device)
        position = value.shape[1] - (chosen * place).topk(self.k, 1).values.to(torch.int64)
        self.value, self.index = value.gather(1, position), index.gather(1, position)

    def result(self) -> Tensor:
        found = self.index >= 0
        return torch.where(found, self.value, 0).sum(1) / found.sum(1).clamp(min=1)


class _Softmax:
    """Running softmax-weighted mean of cosines."""

    def __init__(self, pixels: int, temperature: float, like: Tensor) -> None:
        self.temperature = temperature
        self.top = torch.full((pixels,), -torch.inf, dtype=like.dtype, device=like.device)
        self.total = torch.zeros(pixels, dtype=like.dtype, device=like.device)
        self.weighted = torch.zeros_like(self.total)

    def add(self, cosine: Tensor, first: int) -> None:
        """Take in a tile [t,u] with -inf outside the class."""
        top = torch.maximum(self.top, cosine.amax(1))
        shift = torch.where(top == -torch.inf, 0, top)
        weight = ((cosine - shift[:, None]) / self.temperature).exp()
        old = ((self.top - shift) / self.temperature).exp()
        self.total = self.total * old + weight.sum(1)
        self.weighted = self.weighted * old + torch.where(cosine == -torch.inf, 0, weight * cosine).sum(1)
        self.top = top

    def result(self) -> Tensor:
        return torch.where(self.total == 0, 0, self.weighted / self.total)

    def log_total(self) -> Tensor:
        """log sum_j exp(cosine_j / temperature), -inf for an empty class."""
        return self.total.log() + torch.where(self.total == 0, 0, self.top) / self.temperature


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
    # outputs
    similarity: Tensor,  # [B,S,h,w]
    index: Tensor,  # [B,S,h,w], or [0] where not needed
    saved: Tensor,  # winners [B,S,h,w,k] of "topk", log totals [B,S,h,w] of "softmax", else [0]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the outputs, one tile of the affinity at a time."""
    for b, pair in enumerate(_pairs(query, guide, guide_labels, classes, query_labels, ignore_index, eps)):
        if reduction == "mean":
            similarity[b] = _mean_forward(pair).view_as(similarity[b])
            if not return_index:
                continue
        flat = similarity[b].flatten(1)
        ranges = pair.query_ranges(saved.shape[-1] if reduction == "topk" else 0)
        for q0, q1, units, _ in pair.tiles(pair.query, ranges):
            for s in range(pair.slots):
                best = _Best(q1 - q0, units) if index.dim() > 1 else None
                rest: _TopK | _Softmax | None = None
                if reduction == "topk":
                    rest = _TopK(q1 - q0, saved.shape[-1], units)
                elif reduction == "softmax":
                    rest = _Softmax(q1 - q0, temperature, units)
                for g0, g1, guide_units, _ in pair.tiles(pair.guide, pair.guide_ranges()):
                    cosine = pair.cosines(units, guide_units)
                    cosine.masked_fill_(~pair.member(s, q0, q1, g0, g1), -torch.inf)
                    for state in (best, rest):
                        if state is not None:
                            state.add(cosine, g0)
                if best is not None:
                    index[b, s].view(-1)[q0:q1] = best.index
                if isinstance(rest, _TopK):
                    saved[b, s].flatten(0, 1)[q0:q1] = rest.index
                elif isinstance(rest, _Softmax):
                    saved[b, s].view(-1)[q0:q1] = rest.log_total()
                outcome = best if rest is None else rest
                if reduction != "mean" and outcome is not None:
                    flat[s, q0:q1] = outcome.result()
    return similarity, index, saved


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
) -> tuple[Tensor, Tensor]:  # like query and guide, or [0] where not needed
    """Gradients to the features: sums over winners, or the tiles once more.

    The guide's sums are held for a block of its pixels at a time; with one block, one pass makes both
    gradients.
    """
    grad_query = torch.empty_like(query) if need_query else query.new_empty(0)
    grad_guide = torch.empty_like(guide) if need_guide else guide.new_empty(0)
    for b, pair in enumerate(_pairs(query, guide, guide_labels, classes, query_labels, ignore_index, eps)):
        grads = grad[b].flatten(1)
        if reduction == "mean":
            _mean_backward(
                pair, grads, grad_query[b] if need_query else None, grad_guide[b] if need_guide else None
            )
            continue
        winners = index[b].flatten(1)[..., None] if reduction == "max" else saved[b].flatten(1, 2)
        value = similarity[b].flatten(1)

        def rows(
            q0: int,
            q1: int,
            units: Tensor,  # [t,C]
            block: list[tuple[int, int]],
            total: Tensor | None,
            pair: _Pair = pair,
            grads: Tensor = grads,
            winners: Tensor = winners,
            value: Tensor = value,
        ) -> Tensor:  # [t,C]
            if reduction == "softmax":
                log_total = winners.flatten(1)[:, q0:q1]
                slots = grads[:, q0:q1], value[:, q0:q1], log_total
                return _softmax_backward(pair, q0, q1, units, *slots, temperature, block, total)
            return _winners_backward(pair, units, grads[:, q0:q1], winners[:, q0:q1], block, total)

        ranges = pair.query_ranges(saved.shape[-1] if reduction == "topk" else 0)
        blocks = pair.guide_blocks() if need_guide else []
        if need_query and len(blocks) != 1:
            for q0, q1, units, inverse in pair.tiles(pair.query, ranges):
                back = rows(q0, q1, units, pair.guide_ranges(), None)
                set_part(grad_query[b], q0, q1, through_norm(back, units, inverse).t())
        for block in blocks:
            pixels = block[-1][1] - block[0][0]
            total = torch.zeros(pixels, query.shape[1], dtype=pair.dtype, device=query.device)
            for q0, q1, units, inverse in pair.tiles(pair.query, ranges):
                back = rows(q0, q1, units, block, total)
                if need_query and len(blocks) == 1:
                    set_part(grad_query[b], q0, q1, through_norm(back, units, inverse).t())
            for g0, g1, units, inverse in pair.tiles(pair.guide, block):
                back = through_norm(total[g0 - block[0][0] : g1 - block[0][0]], units, inverse)
                set_part(grad_guide[b], g0, g1, back.t())
    return grad_query, grad_guide


def _winners_backward(
    pair: _Pair,
    units: Tensor,  # [t,C]
    grad: Tensor,  # [S,t]
    winners: Tensor,  # [S,t,k], -1 = none
    block: list[tuple[int, int]],
    total: Tensor | None,  # [m',C], of the block's pixels, added to
) -> Tensor:  # [t,C]
    """Each query pixel gets the mean of its winners' unit vectors, each winner its share of the query's."""
    result = torch.zeros_like(units)
    width, channels = pair.guide.shape[2], units.shape[1]
    step = max(1, _OPERAND_BYTES // max(1, units.numel() * units.itemsize))
    for s in range(len(grad)):
        share = grad[s] / (winners[s] >= 0).sum(1).clamp(min=1)
        for j in range(0, winners.shape[2] if block else 0, step):
            winner = winners[s, :, j : j + step]
            found = winner >= 0
            if total is not None:
                inside = found & (winner >= block[0][0]) & (winner < block[-1][1])
                rows = torch.where(inside[..., None], (share[:, None] * units)[:, None], 0)
                place = torch.where(inside, winner - block[0][0], 0)
                _add_rows(total, place.flatten(), rows.flatten(0, 1))
            pixel = winner.clamp(min=0).flatten()
            best, _ = unit_rows(pair.guide[:, pixel // width, pixel % width], pair.eps, pair.dtype)
            best = best.view(*winner.shape, channels)
            result += torch.where(found[..., None], share[:, None, None] * best, 0).sum(1)
    return result


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, in a fixed order: CUDA's `index_add_` has none, its `index_put_` sorts."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)


def _softmax_backward(
    pair: _Pair,
    q0: int,
    q1: int,
    units: Tensor,  # [t,C]
    grad: Tensor,  # [S,t]
    value: Tensor,  # [S,t]
    log_total: Tensor,  # [S,t]
    temperature: float,
    block: list[tuple[int, int]],
    total: Tensor | None,  # [m',C], of the block's pixels, added to
) -> Tensor:  # [t,C], of the block's pixels only
    """d value / d cosine_j = p_j (1 + (cosine_j - value) / temperature)."""
    result = torch.zeros_like(units)
    # What is not finite is in the slopes of the pairs compared; in the others 0 times NaN must stay 0.
    finite = units.nan_to_num(0.0)
    for g0, g1, guide_units, _ in pair.tiles(pair.guide, block):
        cosine = pair.cosines(units, guide_units)
        slope = torch.zeros_like(cosine)
        for s in range(pair.slots):
            probability = (cosine / temperature - log_total[s, :, None]).exp()
            lift = 1 + (cosine - value[s, :, None]) / temperature
            member = pair.member(s, q0, q1, g0, g1)
            slope += torch.where(member, grad[s, :, None] * probability * lift, 0)
        result += slope @ guide_units.nan_to_num_(0.0)
        if total is not None:
            total[g0 - block[0][0] : g1 - block[0][0]] += slope.t() @ finite
    return result


class _OwnLabels(NamedTuple):
    """Rows of a table of labels."""

    query: Tensor  # [n] int64
    guide: Tensor  # [m] int64
    valid: Tensor  # [V] bool: not the label to ignore


def _own_labels(pair: _Pair, own: Tensor) -> _OwnLabels:
    if pair.byte_labels:
        return _OwnLabels(own, pair.labels, torch.arange(256, device=own.device) != pair.ignore_index)
    values, rows = torch.cat([own, pair.labels]).unique(return_inverse=True)  # synchronises on a GPU
    return _OwnLabels(rows[: len(own)], rows[len(own) :], values != pair.ignore_index)


class _Means(NamedTuple):
    """Mean unit vector of the guide's pixels of each label that is compared with."""

    units: Tensor  # [V,C], 0 where not found
    pixels: Tensor  # [V] int64, their number
    found: Tensor  # [V] bool: a class, and with pixels
    own: _OwnLabels | None  # None outside own-label mode, where V = S

    def share(self, grad: Tensor, q0: int, q1: int) -> Tensor:  # [S,t], or [t] in own-label mode
        """Gradient of the cosines with the means, 0 where there are none."""
        if self.own is None:
            return torch.where(self.found[:, None], grad[:, q0:q1], 0)
        return torch.where(self.found[self.own.query[q0:q1]], grad[0, q0:q1], 0)


def _means(pair: _Pair) -> _Means:
    own = None if pair.own is None else _own_labels(pair, pair.own)
    valid = pair.class_values() >= 0 if own is None else own.valid
    # In float64: own-label mode adds pixel after pixel, of which there may be 100 000.
    total = torch.zeros(len(valid), pair.guide.shape[0], dtype=torch.float64, device=valid.device)
    count = torch.zeros(len(valid), dtype=torch.int64, device=valid.device)
    for g0, g1, units, _ in pair.tiles(pair.guide, pair.guide_ranges()):
        if own is not None:
            _add_rows(total, own.guide[g0:g1], units.double())
            _add_rows(count, own.guide[g0:g1], torch.ones_like(own.guide[g0:g1]))
            continue
        for s in range(pair.slots):
            member = pair.labels[g0:g1] == pair.class_values()[s]
            total[s] += torch.where(member[:, None], units, 0).sum(0)
            count[s] += member.sum()
    found = valid & (count > 0)
    mean = torch.where(found[:, None], total / count.clamp(min=1)[:, None], 0)
    return _Means(mean.to(pair.dtype), count, found, own)


def _mean_forward(pair: _Pair) -> Tensor:  # [S,n]
    means = _means(pair)
    result = torch.zeros(pair.slots, pair.query.shape[1:].numel(), dtype=pair.dtype, device=pair.query.device)
    for q0, q1, units, _ in pair.tiles(pair.query, pair.query_ranges()):
        if means.own is None:
            result[:, q0:q1] = torch.where(means.found[:, None], means.units @ units.t(), 0)
        else:
            here = means.own.query[q0:q1]
            result[0, q0:q1] = torch.where(means.found[here], (means.units[here] * units).sum(1), 0)
    return result


def _mean_backward(
    pair: _Pair,
    grad: Tensor,  # [S,n]
    # outputs
    grad_query: Tensor | None,  # [C,h,w]
    grad_guide: Tensor | None,  # [C,h',w']
) -> None:
    means = _means(pair)
    back = torch.zeros_like(means.units, dtype=torch.float64)
    for q0, q1, units, inverse in pair.tiles(pair.query, pair.query_ranges()):
        share = means.share(grad, q0, q1)
        if means.own is None:
            rows = share.t() @ means.units
            back += share @ units
        else:
            here = means.own.query[q0:q1]
            rows = share[:, None] * means.units[here]
            found = means.found[here][:, None]
            _add_rows(back, here, torch.where(found, share[:, None] * units, 0).double())
        if grad_query is not None:
            set_part(grad_query, q0, q1, through_norm(rows, units, inverse).t())
    back = torch.where(means.found[:, None], back / means.pixels.clamp(min=1)[:, None], 0).to(pair.dtype)
    if grad_guide is None:
        return
    for g0, g1, units, inverse in pair.tiles(pair.guide, pair.guide_ranges()):
        if means.own is not None:
            rows = back[means.own.guide[g0:g1]]
        else:
            rows = torch.zeros_like(units)
            for s in range(pair.slots):
                member = pair.labels[g0:g1] == pair.class_values()[s]
                rows += torch.where(member[:, None], back[s], 0)
        set_part(grad_guide, g0, g1, through_norm(rows, units, inverse).t())
