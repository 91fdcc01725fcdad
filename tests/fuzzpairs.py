"""Calls of cross_similarity drawn at random, whose winners do not hang on a rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fuzzdraw import (
    FEATURE_KINDS,
    FLOATS,
    IGNORED,
    INF,
    SINGLE,
    Case,
    Draw,
    apart_from,
    convert,
    draw_classes,
    draw_features,
    draw_labels,
)
from numerics import NAIVE_SHARE, ROUNDINGS
from torch import Tensor

from benchmarks import naive

PAIR_KINDS = (
    *FEATURE_KINDS,
    "huge",
    "not finite",
    "repeated",
    "repeated",
    "exact",
    "exact",
    "opposed",
    "near",
)
TEMPERATURES = (0.07, 0.07, 0.07, 1, 0.02, 0.005, 100)


@dataclass
class Cosines:
    """The affinity of finite features in float64, and what single precision knows of it."""

    value: Tensor  # [B,n,m]
    size: Tensor  # [B,n,m], the same on absolute values
    limit: Tensor  # [B,n,m], of the error that numerics.py allows
    member: Tensor  # [B,S,n,m] bool, or [B,S,1,m]: whether the pair is compared
    spoilt: Tensor  # [B,n,m] bool: NaN
    exact: Tensor  # [B,n,m] bool: no order of summation rounds anything
    same: Tensor  # [B,m], the number of the first guide pixel that is equal


def low_labels(inputs: dict[str, Any], name: str, features: str) -> Tensor:
    """Labels at the resolution of the features, [B,pixels] int64."""
    image: Tensor = inputs[features]
    return naive.nearest(inputs[name], (image.shape[2], image.shape[3])).flatten(1)


def cosines(inputs: dict[str, Any]) -> Cosines:
    """Of a call of cross_similarity."""
    eps, parts = inputs["eps"], (inputs["query"].flatten(2), inputs["guide"].flatten(2))
    bad = [~part.isfinite().all(1) for part in parts]
    clean = [part.nan_to_num(0, 0, 0) for part in parts]
    query, guide = (naive.unit(part.double(), 1, eps) for part in clean)
    value, size = query.mT @ guide, query.abs().mT @ guide.abs()
    single = [naive.unit(part.float(), 1, eps) for part in clean]
    lost = (torch.einsum("bcn,bcm->bnm", *single).double() - value).abs()
    worst = float(lost.max()) if lost.numel() else 0.0
    # Unit vectors of few bits each, or products that are all 0.
    few = [
        (unit * 64 % 1 == 0).all(1) & _power_of_two(part)
        for unit, part in zip((query, guide), clean, strict=True)
    ]
    label = low_labels(inputs, "guide_labels", "guide")[:, None, None, :]
    if inputs.get("classes") is not None:
        wanted = inputs["classes"].long()[:, :, None, None]
        member = (label == wanted) & (wanted >= 0)
    else:
        own = low_labels(inputs, "query_labels", "query")[:, None, :, None]
        member = (label == own) & (own != inputs["ignore_index"])
    return Cosines(
        value,
        size,
        NAIVE_SHARE * worst + ROUNDINGS * SINGLE * size,
        member,
        bad[0][:, :, None] | bad[1][:, None, :],
        (few[0][:, :, None] & few[1][:, None, :]) | (size == 0),
        _first_equal(clean[1]),
    )


def _power_of_two(vectors: Tensor) -> Tensor:
    """Whether the norm of each column of [B,C,n] is one, or 0."""
    mantissa, _ = torch.linalg.vector_norm(vectors.double(), dim=1).frexp()
    return (mantissa == 0.5) | (mantissa == 0)


def _first_equal(vectors: Tensor) -> Tensor:
    """Of each column of [B,C,m], the first that is equal: [B,m]."""
    first = torch.zeros(len(vectors), vectors.shape[2], dtype=torch.int64)
    for image, place in zip(vectors, first, strict=True):
        seen: dict[bytes, int] = {}
        columns = (image.t().float() + 0.0).contiguous().numpy()  # -0 becomes 0
        for j, column in enumerate(columns):
            place[j] = seen.setdefault(column.tobytes(), j)
    return first


def unsettled(pairs: Cosines, k: int) -> Tensor:  # [B,S,n] bool
    """Where a rounding decides which guide pixels are the k best: neither far apart nor exactly tied."""
    if k >= pairs.value.shape[2] or 0 in pairs.value.shape:
        return torch.zeros(*pairs.member.shape[:2], pairs.value.shape[1], dtype=torch.bool)
    spoilt, exact = pairs.spoilt[:, None], pairs.exact[:, None]
    rank = torch.where(spoilt, INF, pairs.value[:, None]).where(pairs.member, -INF)
    last = rank.topk(k, -1).values[..., -1:]
    close = (rank - last).abs() <= 4 * float(pairs.limit.max())
    above = ((rank > last) & ~close).sum(-1)
    same = pairs.same[:, None, None, :]
    alike = torch.where(close, same, -1).amax(-1) == torch.where(close, same, same.numel()).amin(-1)
    spread = torch.where(close, rank, -INF).amax(-1) - torch.where(close, rank, INF).amin(-1)
    tied = alike | ((exact | ~close).all(-1) & (spread < EXACT_GAP))
    return (above + close.sum(-1) > k) & ~tied & last[..., 0].isfinite()


EXACT_GAP = 1e-9
"""Cosines that are computed without rounding are equal or further apart than this."""


def settle(draw: Draw, inputs: dict[str, Any]) -> None:
    """Query pixels whose winners hang on a rounding become copies of others, or 0."""
    query = inputs["query"].flatten(2)
    unclear = unsettled(cosines(inputs), inputs["k"]).any(1)  # [B,n]
    own = torch.zeros_like(unclear, dtype=torch.int64)
    if inputs.get("query_labels") is not None:
        own = low_labels(inputs, "query_labels", "query")
    for b, image in enumerate(query):
        for label in own[b][unclear[b]].unique():
            wrong, right = (
                (which & (own[b] == label)).nonzero()[:, 0] for which in (unclear[b], ~unclear[b])
            )
            if len(right):
                image[:, wrong] = image[:, right[draw.integers(0, len(right), len(wrong))]]
            else:
                image[:, wrong] = 0
    inputs["query"] = query.view(inputs["query"].shape)


def _pair_features(draw: Draw, kind: str, *shape: int, guide: bool) -> Tensor:
    channels, pixels = shape[1], shape[2] * shape[3]
    if kind == "exact":  # norms are powers of 2, entries such that nothing is ever rounded
        value = torch.zeros(shape)
        count = 4 if channels >= 4 and draw.chance(0.5) else 1
        first = draw.integers(0, max(channels, 1), shape[0], 1, *shape[2:])
        for step in range(count if channels else 0):
            sign = 2 * draw.integers(0, 2, *first.shape) - 1
            value.scatter_(1, (first + step) % channels, sign.float())
        return value * 2.0 ** draw.integers(-3, 4, *first.shape)
    if kind == "opposed":  # all cosines are negative
        return draw.normal(*shape).abs() * (-1 if guide else 1)
    if kind == "near":  # all pixels are almost equal
        return draw.normal(shape[0], channels, 1, 1) + draw.normal(*shape) * draw.one(1e-3, 1e-5)
    if kind == "repeated":
        value = draw.normal(*shape)
        if guide and pixels:
            few = draw.integers(0, min(pixels, draw.one(1, 2, 5)), pixels)
            value = value.flatten(2)[:, :, few].view(shape)
        return value
    return draw_features(draw, kind, *shape, huge=1e15)


def _few_pairs(draw: Draw, channels: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Batch and the sizes of query and guide: a bounded number of pairs, now and then more."""
    most = (10_000_000 if draw.chance(0.01) else 1_000_000) // max(channels, 8)
    batch = draw.batch()
    sizes = [draw.size(), draw.size(), draw.size(), draw.size()]
    shape = draw.random.random()
    if shape < 0.1:
        sizes = [1, draw.one(1, draw.size()), draw.size(), draw.between(1, 200)]
    elif shape < 0.15:
        sizes = [draw.size(), draw.between(1, 200), 1, draw.one(1, draw.size())]
    while max(batch, 1) * sizes[0] * sizes[1] * sizes[2] * sizes[3] > most:
        if batch > 1:
            batch = 1
        place = draw.one(*(i for i in range(4) if sizes[i] > 1))
        sizes[place] = (sizes[place] + draw.one(0, 1)) // 2
    if draw.chance(0.04):
        sizes[draw.between(0, 3)] = 0
    return batch, (sizes[0], sizes[1]), (sizes[2], sizes[3])


def _label_size(draw: Draw, size: tuple[int, int]) -> tuple[int, int]:
    """As large as the features, larger by a whole factor, or any."""
    if size[0] * size[1] == 0 and draw.chance(0.5):
        return draw.one((0, 0), (0, 3), (2, 0))
    kind = draw.random.random()
    if kind < 0.25:
        return max(size[0], 1), max(size[1], 1)
    if kind < 0.5:
        return max(size[0], 1) * draw.between(2, 4), max(size[1], 1) * draw.between(2, 4)
    return draw.size(), draw.size()


def cross_similarity(draw: Draw) -> Case:
    kind = draw.one(*PAIR_KINDS)
    channels = 0 if draw.chance(0.02) else draw.one(1, 2, 3, 5, 16, 64, 65, draw.size(), draw.between(1, 300))
    batch, query_size, guide_size = _few_pairs(draw, channels)
    query = _pair_features(draw, kind, batch, channels, *query_size, guide=False)
    guide = _pair_features(draw, kind, batch, channels, *guide_size, guide=True)
    if kind == "not finite" and draw.chance(0.5):  # one of the two only
        query, guide = draw.one((query.nan_to_num(0, 0, 0), guide), (query, guide.nan_to_num(0, 0, 0)))
    dtype = draw.one(*FLOATS, torch.float32, None, None)
    query, guide = convert(draw, query, dtype), convert(draw, guide, dtype)
    if kind == "tiny":  # squares of less than this vanish in single precision
        query, guide = (
            torch.where(value.double().norm(dim=1, keepdim=True) < 1e-9, 0, value) for value in (query, guide)
        )
    for value in (query, guide):
        if draw.chance(0.2) and value.numel():
            value.movedim(1, -1)[draw.uniform(*value.movedim(1, -1).shape[:-1]) < 0.3] = 0
    if draw.chance(0.15) and guide.numel():  # the same pixels again, further on
        pixels = guide.flatten(2)
        half = pixels.shape[2] // 2
        pixels[:, :, half : 2 * half] = pixels[:, :, :half]
        guide = pixels.view(guide.shape)
    eps = 1e-8 if draw.chance(0.7) else draw.one(1e-3, 0.5, 1, 10.0)
    norms = torch.cat([value.double().norm(dim=1).flatten() for value in (query, guide)])
    while not apart_from(norms, eps):
        eps *= 1.01
    upper = draw.one(1, 1, 2, 2, 3, 3, 5, 21, 300)
    ignore_index = draw.one(*IGNORED)
    size = _label_size(draw, guide_size)
    inputs: dict[str, Any] = {
        "query": query,
        "guide": guide,
        "guide_labels": draw_labels(draw, (batch, *size), upper, draw.one(ignore_index, None), odd=True),
    }
    if draw.chance(0.6):
        pairs = max(1, batch * query_size[0] * query_size[1] * guide_size[0] * guide_size[1])
        slots = min(draw.slots(), 1 + 1_000_000 // pairs)
        classes = inputs["classes"] = draw_classes(draw, batch, slots, upper, limited=False)
        if slots and draw.chance(0.6):  # one that is there
            present = inputs["guide_labels"][:, :1, -1:].flatten(1).long()
            if present.numel() and 0 <= int(present.min()) <= int(present.max()) < 2**31:
                classes[:, slots // 2 :][:, :1] = present
    else:
        size = _label_size(draw, query_size)
        inputs["query_labels"] = draw_labels(
            draw, (batch, *size), upper, draw.one(ignore_index, None), odd=True
        )
    reduction = draw.one("max", "max", "topk", "topk", "softmax", "mean")
    inputs |= {
        "reduction": reduction,
        "k": draw.one(1, 2, 3, 8, 8, draw.between(1, 40), 10**9, 2**63 - 1),
        "temperature": draw.one(*TEMPERATURES),
        "ignore_index": ignore_index,
        "return_index": draw.chance(0.5),
        "eps": eps,
    }
    if reduction == "topk" and query.numel() and guide.numel():
        settle(draw, inputs)
    # The gradient of "max" hangs on the winners that were chosen.
    more = {"return_index": True} if reduction == "max" else {}
    return Case(0, "cross_similarity", "value", kind, inputs, more=more, finite=kind != "not finite")


def wrong_pairs(draw: Draw, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """What cross_similarity refuses; its features may have no pixels, but labels then have."""
    guide, labels = inputs["guide"], inputs["guide_labels"]
    choices: list[dict[str, Any]] = [
        {"guide": torch.cat([guide, guide.new_zeros(len(guide), 1, *guide.shape[2:])], 1)},
        {"reduction": draw.one("sum", "none", "valid_mean")},
    ]
    for name, features in (("guide_labels", "guide"), ("query_labels", "query")):
        if name in inputs and inputs[features].shape[2] * inputs[features].shape[3]:
            choices.append({name: draw.one(inputs[name][..., :0], inputs[name][:, :0])})
    given, other = ("classes", "query_labels") if "classes" in inputs else ("query_labels", "classes")
    more = labels if other == "query_labels" else torch.zeros(len(labels), 1, dtype=torch.int64)
    return [*choices, {other: more}, {given: None}]
