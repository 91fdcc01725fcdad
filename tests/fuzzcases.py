"""Calls of the operators drawn at random, each a pure function of its seed.

A case whose result hangs on a rounding (a probability beside the threshold of hard pixels, a map beside 0 or
1, a norm beside eps) is moved away from there before it is run: tolerances stay what they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from numerics import NAIVE_SHARE, ROUNDINGS
from torch import Tensor

from benchmarks import naive

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SINGLE = torch.finfo(torch.float32).eps
NEAR = 8 * SINGLE
"""Of the magnitude of what is rounded: closer to a border than this, two right results may differ."""
NAN, INF = float("nan"), float("inf")
FILL = {True: NAN, False: 77}
"""What lies between the elements of a sliced tensor, of floating-point and of integer type."""
IGNORED = (255, 255, 255, -1, -100, 300, 0, 2, -(2**31), 2**31 - 1, 2**40, -(2**63))


@dataclass
class Case:
    """One call, and what is expected of it."""

    seed: int
    operator: str
    kind: str  # "value", "bad argument" or "raw"
    what: str  # values or wrong argument, in words
    inputs: dict[str, Any]
    threads: int = 1
    more: dict[str, Any] = field(default_factory=dict)  # of a second run: they only add outputs
    error: type[Exception] | None = None
    kept: Tensor | None = None  # hard pixels, [B,H,W] bool
    exact: bool = False  # single precision rounds nothing in upsampling
    finite: bool = True


class Draw:
    """Random choices of one case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def size(self, least: int = 1) -> int:
        """0 now and then, 1, small, around multiples of what vectors hold, or some more."""
        kind = self.random.random()
        if kind < 0.02 and least == 0:
            return 0
        if kind < 0.12:
            return 1
        if kind < 0.55:
            return self.between(2, 9)
        if kind < 0.8:
            return max(1, self.one(8, 16, 32, 64) * self.between(1, 2) + self.between(-1, 1))
        return self.between(10, 40) if kind < 0.97 else self.between(66, 140)

    def batch(self) -> int:
        return 0 if self.chance(0.02) else self.one(1, 1, 2, 2, 3)

    def slots(self) -> int:
        return 0 if self.chance(0.03) else self.one(1, 1, 2, 2, 3, 4, self.between(5, 20))

    def num_classes(self, most: int) -> int:
        return min(
            most,
            self.one(1, 2, self.between(2, 9), self.between(10, 40), 19, 21, self.between(60, 300), most),
        )

    def pair(self, align_corners: bool) -> tuple[int, int]:
        """Input and output size along one dimension: alike, in a ratio of a power of two, or any."""
        n = self.size()
        relation = self.random.random()
        if relation < 0.15:
            return n, n
        if relation < 0.4:
            factor = 2 ** self.between(1, 3)
            n = min(n, 24)
            return n, (n - 1) * factor + 1 if align_corners else n * factor
        return n, self.size(0)

    def grids(self, align_corners: bool, per_pixel: int = 1) -> tuple[int, int, int, int, int]:
        """B, h, w, H, W; a bounded number of pixels, now and then more."""
        most = (300_000 if self.chance(0.005) else 20_000) // max(1, per_pixel)
        batch = self.batch()
        (h, height), (w, width) = self.pair(align_corners), self.pair(align_corners)
        while max(batch, 1) * max(h * w, height * width) > most and max(h, w, height, width) > 1:
            if batch > 1:
                batch = 1
            elif max(h, height) >= max(w, width):
                h, height = (h + 1) // 2, (height + 1) // 2
            else:
                w, width = (w + 1) // 2, (width + 1) // 2
        return batch, h, w, height, width

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.torch)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """In [low, high)."""
        return torch.randint(low, high, shape, generator=self.torch)

    def place(self, value: Tensor) -> tuple[int, ...]:
        return tuple(self.between(0, n - 1) for n in value.shape)


def fits(value: int, dtype: torch.dtype) -> bool:
    limits = torch.iinfo(dtype)
    return limits.min <= value <= limits.max


def lay_out(draw: Draw, value: Tensor) -> Tensor:
    """The same values in other strides, 0 where they repeat."""
    kind = draw.random.random()
    if value.numel() and draw.chance(0.7):
        known = value.nan_to_num() if value.is_floating_point() else value
        for few in (value[(slice(0, 1),) * value.dim()], value[:1]):
            if few.numel() < value.numel() and torch.equal(
                known, known[tuple(map(slice, few.shape))].expand_as(value)
            ):
                return few.clone().expand(value.shape)
    if kind < 0.4:
        return value.contiguous()
    if kind < 0.45:  # a dimension of one element may have any stride
        strides = [
            draw.one(0, 1, 7, 10**9) if n == 1 else s
            for n, s in zip(value.shape, value.stride(), strict=True)
        ]
        return value.contiguous().as_strided(value.shape, strides) if value.is_contiguous() else value
    if kind < 0.55 and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if kind < 0.65:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind < 0.7:
        order = draw.random.sample(range(value.dim()), value.dim())
        inverse = [order.index(dim) for dim in range(value.dim())]
        return value.permute(order).contiguous().permute(inverse)
    if kind < 0.85:
        return _sliced(draw, value)
    ahead = draw.between(1, 9)
    flat = value.new_full((ahead + value.numel() + draw.between(0, 3),), FILL[value.is_floating_point()])
    flat[ahead : ahead + value.numel()] = value.flatten()
    return flat[ahead : ahead + value.numel()].view(value.shape)


def _sliced(draw: Draw, value: Tensor) -> Tensor:
    """Every n-th element of a larger tensor, from somewhere on, in one dimension or more."""
    steps = [draw.one(1, 1, 2, 3) for _ in value.shape]
    ahead = [draw.one(0, 0, 1, 2) for _ in value.shape]
    shape = [a + n * step + draw.one(0, 1) for a, n, step in zip(ahead, value.shape, steps, strict=True)]
    wide = value.new_full(shape, FILL[value.is_floating_point()])
    where = tuple(slice(a, a + n * step, step) for a, n, step in zip(ahead, value.shape, steps, strict=True))
    wide[where] = value
    return wide[where]


def _to(draw: Draw, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In one of the dtypes, where what is finite stays so; now and then all images are the first."""
    dtype = dtype or draw.one(*FLOATS)
    most = torch.finfo(dtype).max
    value = torch.where(value.isfinite(), value.clamp(-most, most), value).to(dtype)
    return value[:1].repeat(len(value), *[1] * (value.dim() - 1)) if draw.chance(0.15) else value


def _spoil(draw: Draw, value: Tensor, values: tuple[float, ...]) -> Tensor:
    """A few elements, or one in five, that are not finite."""
    if value.numel() == 0:
        return value
    value = value.clone()
    if draw.chance(0.5):
        for _ in range(draw.between(1, 3)):
            value[draw.place(value)] = draw.one(*values)
        return value
    which = draw.uniform(*value.shape) < 0.2
    return torch.where(which, draw.one(*values), value)


def _features(draw: Draw, kind: str, *shape: int, huge: float = 1e30) -> Tensor:
    """Values of a kind; `huge` is as far as single precision does not overflow in the operator."""
    value = draw.normal(*shape)
    if kind == "integers":
        return draw.integers(-2, 3, *shape).float()
    if kind == "constant":
        return torch.full(shape, draw.one(0.0, 1.0, -3.0))
    if kind == "huge":
        return value * huge
    if kind == "tiny":
        return value * draw.one(1e-40, 1e-30, 1e-12, 1e-7, 1e-5)
    if kind == "mixed sizes":
        return value * 10 ** (6 * draw.uniform(*shape) - 3)
    if kind == "not finite":
        return _spoil(draw, value, (NAN, INF, -INF))
    return value * draw.one(1.0, 1.0, 0.05, 20.0)


FEATURE_KINDS = ("normal",) * 5 + (
    "integers",
    "integers",
    "constant",
    "huge",
    "tiny",
    "mixed sizes",
    "not finite",
)


def _labels(draw: Draw, shape: tuple[int, ...], upper: int, ignore_index: int | None, odd: bool) -> Tensor:
    """Labels in [0, upper) in one of three dtypes, in patches or not, some ignored; any values if `odd`."""
    dtype = draw.one(torch.uint8, torch.uint8, torch.int32, torch.int64)
    low, high = 0, min(upper, 256) if dtype == torch.uint8 else upper
    if draw.chance(0.4) and min(shape, default=0) > 0:
        patch = draw.one(2, 5, 16)
        small = draw.integers(low, high, shape[0], -(-shape[1] // patch), -(-shape[2] // patch))
        labels = small.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, : shape[1], : shape[2]]
    elif draw.chance(0.1):
        labels = torch.full(shape, draw.between(low, high - 1))
    else:
        labels = draw.integers(low, high, *shape)
    if odd and dtype != torch.uint8 and draw.chance(0.3):
        limits = torch.iinfo(dtype)
        strange = torch.tensor([-1, -2, 256, 65536, limits.min, limits.max])
        chosen = strange[draw.integers(0, len(strange), *shape)]
        labels = torch.where(draw.uniform(*shape) < 0.3, chosen, labels)
    if ignore_index is not None and fits(ignore_index, dtype):
        share = draw.one(0.0, 0.2, 0.2, 0.9, 1.0)
        labels = torch.where(draw.uniform(*shape) < share, ignore_index, labels)
    return (labels[:1].expand(shape) if draw.chance(0.15) else labels).to(dtype).contiguous()


def _classes(draw: Draw, batch: int, slots: int, upper: int, limited: bool) -> Tensor:
    """-1, present, absent and repeated classes; beyond `upper` too unless `limited`."""
    dtype = draw.one(torch.int32, torch.int64)
    classes = draw.integers(-1, upper, batch, slots)
    if draw.chance(0.15):
        classes = torch.full((batch, slots), draw.one(-1, upper - 1))
    if not limited and draw.chance(0.3):
        strange = torch.tensor(
            [255, 256, 300, 65536, 2**31 - 1, 2**31 - 1 if dtype == torch.int32 else 2**40]
        )
        chosen = strange[draw.integers(0, len(strange), batch, slots)]
        classes = torch.where(draw.uniform(batch, slots) < 0.5, chosen, classes)
    return classes.to(dtype)


def dyadic(n: int, m: int, align_corners: bool) -> bool:
    """All weights that bring n pixels to m are multiples of 1/16: single precision holds them exactly."""
    if n == m or n == 1 or (m == 1 and align_corners):
        return True
    small, large = (n - 1, m - 1) if align_corners else (n, m)
    return any(small * 2**k == large for k in range(4))


def _masked_average_pool(draw: Draw) -> Case:
    kind = draw.one(*FEATURE_KINDS)
    channels = 0 if draw.chance(0.02) else draw.one(1, 2, 3, 5, 16, draw.size())
    batch, h, w, height, width = draw.grids(False, channels)
    upper = draw.one(1, 2, 5, 21, 300)
    inputs = {
        "features": _to(draw, _features(draw, kind, batch, channels, h, w)),
        "labels": _labels(draw, (batch, height, width), upper, None, odd=True),
        "classes": _classes(draw, batch, draw.slots(), upper, limited=False),
        "eps": draw.one(5e-4, 5e-4, 1e-8, 0.5, 1, 1000.0),
    }
    return Case(0, "masked_average_pool", "value", kind, inputs, finite=kind != "not finite")


def _apart_from(norms: Tensor, eps: float) -> bool:
    """No norm is within rounding of eps."""
    return not bool(((norms / eps - 1).abs() < 1e-3).any())


def _prototype_similarity(draw: Draw) -> Case:
    kind = draw.one(*FEATURE_KINDS)
    channels = 0 if draw.chance(0.02) else draw.one(1, 2, 3, 5, 16, 64, draw.size(), 256)
    batch, h, w, _, _ = draw.grids(False, channels)
    if draw.chance(0.03):
        h, w = draw.one((0, w), (h, 0))
    slots = draw.slots()
    query, prototypes = (
        _to(draw, _features(draw, kind, *shape, huge=1e15))
        for shape in ((batch, channels, h, w), (batch, slots, channels))
    )
    if kind == "tiny":  # squares of less than this vanish in single precision
        query, prototypes = (
            torch.where(value.double().norm(dim=dim, keepdim=True) < 1e-9, 0, value)
            for value, dim in ((query, 1), (prototypes, 2))
        )
    for value, dim in ((query, 1), (prototypes, 2)):
        if draw.chance(0.2) and value.numel():
            value.movedim(dim, -1)[draw.uniform(*value.movedim(dim, -1).shape[:-1]) < 0.3] = 0
    eps = draw.one(1e-8, 1e-8, 1e-8, 1e-3, 0.5, 1, 10.0)
    norms = torch.cat([query.double().norm(dim=1).flatten(), prototypes.double().norm(dim=2).flatten()])
    while not _apart_from(norms, eps):
        eps *= 1.01
    inputs = {"query": query, "prototypes": prototypes, "eps": eps}
    return Case(0, "prototype_similarity", "value", kind, inputs, finite=kind != "not finite")


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
    return _features(draw, kind, *shape, huge=1e15)


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


def _cross_similarity(draw: Draw) -> Case:
    kind = draw.one(*PAIR_KINDS)
    channels = 0 if draw.chance(0.02) else draw.one(1, 2, 3, 5, 16, 64, 65, draw.size(), draw.between(1, 300))
    batch, query_size, guide_size = _few_pairs(draw, channels)
    query = _pair_features(draw, kind, batch, channels, *query_size, guide=False)
    guide = _pair_features(draw, kind, batch, channels, *guide_size, guide=True)
    if kind == "not finite" and draw.chance(0.5):  # one of the two only
        query, guide = draw.one((query.nan_to_num(0, 0, 0), guide), (query, guide.nan_to_num(0, 0, 0)))
    dtype = draw.one(*FLOATS, torch.float32, None, None)
    query, guide = _to(draw, query, dtype), _to(draw, guide, dtype)
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
    while not _apart_from(norms, eps):
        eps *= 1.01
    upper = draw.one(1, 1, 2, 2, 3, 3, 5, 21, 300)
    ignore_index = draw.one(*IGNORED)
    size = _label_size(draw, guide_size)
    inputs: dict[str, Any] = {
        "query": query,
        "guide": guide,
        "guide_labels": _labels(draw, (batch, *size), upper, draw.one(ignore_index, None), odd=True),
    }
    if draw.chance(0.6):
        pairs = max(1, batch * query_size[0] * query_size[1] * guide_size[0] * guide_size[1])
        slots = min(draw.slots(), 1 + 1_000_000 // pairs)
        classes = inputs["classes"] = _classes(draw, batch, slots, upper, limited=False)
        if slots and draw.chance(0.6):  # one that is there
            present = inputs["guide_labels"][:, :1, -1:].flatten(1).long()
            if present.numel() and 0 <= int(present.min()) <= int(present.max()) < 2**31:
                classes[:, slots // 2 :][:, :1] = present
    else:
        size = _label_size(draw, query_size)
        inputs["query_labels"] = _labels(draw, (batch, *size), upper, draw.one(ignore_index, None), odd=True)
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


MAP_KINDS = ("uniform",) * 3 + ("around", "around", "quarters", "quarters", "constant", "tiny", "not finite")


def _maps(draw: Draw, kind: str, *shape: int) -> Tensor:
    if kind == "around":
        return draw.normal(*shape) * draw.one(0.2, 0.5, 3.0) + 0.4
    if kind == "quarters":
        return draw.integers(-2, 7, *shape) / 4
    if kind == "constant":
        return torch.full(shape, draw.one(0.0, 0.25, 1.0, -1.0, 2.0))
    if kind == "tiny":
        return draw.uniform(*shape) * draw.one(1e-3, 1e-6, 1e-12, 1e-30)
    value = draw.uniform(*shape)
    return _spoil(draw, value, (NAN, NAN, INF, -INF)) if kind == "not finite" else value


def _map_consistency(draw: Draw) -> Case:
    kind = draw.one(*MAP_KINDS)
    slots = draw.slots()
    batch, h, w, height, width = draw.grids(False, slots)
    upper = draw.one(1, 2, 5, 21, 300)
    ignore_index = draw.one(*IGNORED)
    similarity = _to(draw, _maps(draw, kind, batch, slots, h, w))
    labels = _labels(draw, (batch, height, width), upper, ignore_index, odd=True)
    classes = _classes(draw, batch, slots, upper, limited=False)
    exact = dyadic(h, height, False) and dyadic(w, width, False) and kind in ("quarters", "constant")
    exact = exact or (h, w) == (height, width)
    if not exact and similarity.numel() and labels.numel():
        labels, ignore_index = _without_borders(similarity, labels, classes, ignore_index)
    inputs = {"similarity": similarity, "labels": labels, "classes": classes, "ignore_index": ignore_index}
    return Case(0, "map_consistency", "value", kind, inputs, exact=exact, finite=kind != "not finite")


def _without_borders(
    similarity: Tensor, labels: Tensor, classes: Tensor, ignore_index: int
) -> tuple[Tensor, int]:
    """Ignore the pixels at which an upsampled map may fall on either side of 0 or 1."""
    size = (labels.shape[1], labels.shape[2])
    p = naive.upsample(similarity.double(), size, False)
    rounded = NEAR * naive.upsample(similarity.double().abs(), size, False)
    near = ((p.abs() <= rounded) & (rounded > 0)) | ((1 - p).abs() <= NEAR + rounded)
    near = (near & (classes >= 0)[..., None, None]).any(1)
    if not bool(near.any()):
        return labels, ignore_index
    if not fits(ignore_index, labels.dtype):
        ignore_index = 255
    return torch.where(near, ignore_index, labels.long()).to(labels.dtype), ignore_index


LOGIT_KINDS = ("normal",) * 6 + ("integers", "integers", "constant", "large", "huge", "tiny", "not finite")


def _logits(draw: Draw, kind: str, *shape: int, values: tuple[float, ...] = (NAN, INF, -INF)) -> Tensor:
    if kind == "large":
        return draw.normal(*shape) * 60
    if kind == "not finite":
        return _spoil(draw, draw.normal(*shape), values)
    return _features(draw, kind, *shape)


def _rectified_cross_entropy(draw: Draw) -> Case:
    kind = draw.one(*LOGIT_KINDS)
    num_classes = draw.num_classes(300)
    batch, h, w, height, width = draw.grids(True, max(1, num_classes // 4))
    ignore_index = draw.one(*IGNORED)
    with_maps = draw.one("none", "classes", "classes", "own")
    # Infinite losses times weights that round to 0 or not: NaN alone there.
    values = (NAN, INF, -INF) if with_maps == "none" else (NAN,)
    logits = _to(draw, _logits(draw, kind, batch, num_classes, h, w, values=values))
    labels = _labels(draw, (batch, height, width), num_classes, ignore_index, odd=False)
    inputs: dict[str, Any] = {"logits": logits, "labels": labels, "ignore_index": ignore_index}
    if with_maps != "none":
        slots = draw.slots() if with_maps == "classes" else 1
        map_kind = draw.one(*MAP_KINDS[:-1])
        shape = (h, w) if draw.chance(0.5) else (draw.size(), draw.size())
        inputs["similarity"] = _to(draw, _maps(draw, map_kind, batch, slots, *shape))
        if with_maps == "classes":
            inputs["classes"] = _classes(draw, batch, slots, num_classes, limited=True)
    if draw.chance(0.7):
        inputs["reduction"] = draw.one("mean", "valid_mean", "sum", "none", "none")
    exact = dyadic(h, height, True) and dyadic(w, width, True) and kind in ("integers", "constant")
    exact = exact or (h, w) == (height, width)
    finite = kind != "not finite"
    case = Case(0, "rectified_cross_entropy", "value", kind, inputs, exact=exact, finite=finite)
    if draw.chance(0.35) and finite and logits.numel() and labels.numel():
        _hard_pixels(draw, case)
    return case


def _hard_pixels(draw: Draw, case: Case) -> None:
    """Choose `ohem_threshold` and `ohem_min_kept` such that no rounding decides which pixels are kept.

    Probabilities of single precision are known to `near` in their logarithms; equal logits tie exactly.
    """
    logits, labels = case.inputs["logits"].double(), case.inputs["labels"].long()
    up = naive.upsample(logits, (labels.shape[1], labels.shape[2]), True)
    valid = labels != case.inputs["ignore_index"]
    log = up.log_softmax(1).gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    near = 64 * SINGLE * (1 + 2 * float(logits.abs().max()) + torch.tensor(logits.shape[1]).log().item())
    ordered = log[valid].sort().values
    count = len(ordered)

    def apart(limit: float) -> bool:
        return not bool(((ordered - limit).abs() < near).any()) and limit > -60

    threshold = draw.one(0.0, 0.05, 0.3, 0.7, 0.99, 2.0, draw.random.random())
    if threshold == 0.0:
        if bool((ordered < -60).any()):
            threshold = 2.0
    elif threshold <= 1 and not apart(torch.tensor(threshold).double().log().item()):
        # Between two probabilities that are well apart, else above all.
        gaps = ((ordered[1:] - ordered[:-1] > 4 * near) & (ordered[:-1] > -60)).nonzero().flatten().tolist()
        place = draw.one(*gaps) if gaps else None
        threshold = 2.0 if place is None else float(((ordered[place] + ordered[place + 1]) / 2).exp())
    # The min_kept-th smallest keeps itself and what ties with it; the next one must be well above. Of three
    # classes and more, the same logits in another order may give another sum of their exponentials.
    tie = 1e-9
    ties = case.exact and (logits.shape[1] <= 2 or case.what == "constant")
    ranks = [
        k for k in {1, 2, count // 3, count // 2, count - 1, draw.between(0, max(count, 1))} if 0 < k < count
    ]
    settled = [k for k in ranks if _settled(ordered, k, 4 * near, tie if ties else None)]
    min_kept = draw.one(0, count, count + 1, 100000, *settled, *settled, *settled)
    case.inputs |= {"ohem_threshold": threshold, "ohem_min_kept": min_kept}
    if count < min_kept:
        case.kept = valid
        return
    limit = -INF if threshold == 0.0 else torch.tensor(threshold).double().log().item()
    if min_kept > 0 and float(ordered[min_kept - 1]) + near > limit:
        limit = float(ordered[min_kept - 1]) + 2 * tie
        if min_kept == count:
            limit = INF
    case.kept = valid & (log <= limit)


def _settled(ordered: Tensor, k: int, near: float, tie: float | None) -> bool:
    """The next probability is well above the k-th smallest; or it ties, and no other is close to them."""
    if float(ordered[k]) < -80:  # single precision has no such probability but 0
        return False
    if float(ordered[k] - ordered[k - 1]) > near:
        return True
    distance = (ordered - ordered[k - 1]).abs()
    return tie is not None and not bool(((distance > tie) & (distance < near)).any())


def _predict(draw: Draw) -> Case:
    kind = draw.one(*LOGIT_KINDS)
    num_classes = draw.num_classes(256)
    batch, h, w, height, width = draw.grids(True, max(1, num_classes // 4))
    ignore_index = draw.one(*IGNORED)
    inputs: dict[str, Any] = {
        "logits": _to(draw, _logits(draw, kind, batch, num_classes, h, w)),
        "size": draw.one((height, width), torch.Size((height, width)), [height, width]),
        "ignore_index": ignore_index,
    }
    if draw.chance(0.7):
        inputs["labels"] = _labels(draw, (batch, height, width), num_classes, ignore_index, odd=False)
    exact = dyadic(h, height, True) and dyadic(w, width, True) and kind in ("integers", "constant")
    exact = exact or (h, w) == (height, width)
    return Case(0, "predict", "value", kind, inputs, exact=exact, finite=kind != "not finite")


VALUES: dict[str, Callable[[Draw], Case]] = {
    "masked_average_pool": _masked_average_pool,
    "prototype_similarity": _prototype_similarity,
    "cross_similarity": _cross_similarity,
    "map_consistency": _map_consistency,
    "rectified_cross_entropy": _rectified_cross_entropy,
    "predict": _predict,
}


def _tensors(inputs: dict[str, Any]) -> list[str]:
    return [name for name, value in inputs.items() if isinstance(value, Tensor)]


def _wrong_tensor(draw: Draw, inputs: dict[str, Any]) -> tuple[str, Any, type[Exception]]:
    """A tensor of another rank, dtype, device or batch, or none at all."""
    names = _tensors(inputs)
    name = draw.one(*names)
    value = inputs[name]
    kind = draw.one("rank", "rank", "dtype", "type", "device", "batch")
    if kind == "rank":
        return name, value[None] if draw.chance(0.5) or len(value) == 0 else value[0], ValueError
    if kind == "type":
        return name, draw.one(3, "x", [[1]], value.numpy() if value.dtype != torch.bfloat16 else 3), TypeError
    if kind == "dtype":
        if value.is_floating_point():
            return name, value.to(draw.one(torch.int64, torch.complex64, torch.uint8)), TypeError
        wrong = [torch.float32, torch.bool, torch.int16, *([torch.uint8] if name == "classes" else [])]
        return name, value.to(draw.one(*wrong)), TypeError
    if kind == "device" and name != names[0]:
        return name, value.to("meta"), ValueError
    if len(names) == 1:
        return name, value[..., None], ValueError
    return (
        name,
        torch.cat([value, value[:1] if len(value) else value.new_zeros(1, *value.shape[1:])]),
        ValueError,
    )


def _set(draw: Draw, value: Tensor, wrong: int) -> Tensor:
    """One element replaced; int64 where the number needs it."""
    value = value.clone() if fits(wrong, value.dtype) else value.long()
    value[draw.place(value)] = wrong
    return value


_INT_WRONG = ((2.5, TypeError), (None, TypeError), ("255", TypeError), (True, TypeError))
_NUMBER_WRONG = (
    ("1", TypeError),
    (None, TypeError),
    (False, TypeError),
    (NAN, ValueError),
    (-1.0, ValueError),
)
_SCALARS: dict[str, tuple[tuple[Any, type[Exception]], ...]] = {
    "eps": (*_NUMBER_WRONG, (0, ValueError), (-INF, ValueError)),
    "ignore_index": _INT_WRONG,
    "reduction": (("min", ValueError), ("", ValueError), (None, ValueError), (3, ValueError)),
    "k": ((0, ValueError), (-1, ValueError), (2**63, ValueError), (8.0, TypeError), *_INT_WRONG[1:]),
    "temperature": (*_NUMBER_WRONG, (0, ValueError), (1e-39, ValueError), (-INF, ValueError)),
    "ohem_threshold": (("0.7", TypeError), (True, TypeError), (NAN, ValueError), (-0.1, ValueError)),
    "ohem_min_kept": ((-1, ValueError), (1.0, TypeError), (None, TypeError), (-(2**63), ValueError)),
    "size": (
        (9, TypeError),
        (None, TypeError),
        ((9,), ValueError),
        ((1, 2, 3), ValueError),
        ((2.0, 3), TypeError),
        ((3, True), TypeError),
        ((-1, 3), ValueError),
    ),
    "impl": (("cuda", ValueError), ("", ValueError), (3, ValueError)),
}
_TAKES = {
    "masked_average_pool": ("eps",),
    "prototype_similarity": ("eps",),
    "cross_similarity": ("reduction", "k", "temperature", "ignore_index", "eps"),
    "map_consistency": ("ignore_index",),
    "rectified_cross_entropy": ("ignore_index", "reduction", "ohem_threshold", "ohem_min_kept"),
    "predict": ("ignore_index", "size"),
}


def _wrong_values(draw: Draw, operator: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Right in type, wrong in what the numbers or sizes say; empty where this call has no such thing."""
    choices: list[dict[str, Any]] = []
    classes, labels = inputs.get("classes"), inputs.get("labels")
    features = next(iter(inputs.values()))
    if classes is not None and classes.numel():
        below = draw.one(-2, -3, -(2**31), -(2**63))
        choices.append({"classes": _set(draw, classes, below)})
        if operator not in ("masked_average_pool", "cross_similarity"):
            choices.append({"classes": torch.cat([classes, classes[:, :1]], 1)})
    if operator in ("rectified_cross_entropy", "predict"):
        limit, ignored = features.shape[1], inputs["ignore_index"]
        if classes is not None and classes.numel() and operator == "rectified_cross_entropy":
            choices.append({"classes": _set(draw, classes, draw.one(limit, limit + 255, 2**31 - 1, 2**62))})
        if labels is not None and labels.numel():
            wrong = draw.one(
                limit, limit + 255, limit + 256, -1, -256, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)
            )
            if wrong != ignored:
                choices += [{"labels": _set(draw, labels, wrong)}] * 2
        choices.append({next(iter(inputs)): features[:, :0]})
    if operator == "rectified_cross_entropy":
        choices.append({"reduction": draw.one("max", "topk")})
    if operator == "cross_similarity":
        choices += _wrong_pairs(draw, inputs)
    elif operator != "prototype_similarity":
        choices.append({next(iter(inputs)): draw.one(features[..., :0], features[:, :, :0])})
    if inputs.get("similarity") is not None and operator == "rectified_cross_entropy":
        maps = inputs["similarity"]
        choices += [{"similarity": torch.cat([maps, maps, maps.new_zeros(len(maps), 1, *maps.shape[2:])], 1)}]
        choices += [{"similarity": maps[..., :0]}, {"similarity": None}] if classes is not None else []
    if operator == "predict" and labels is not None:
        choices.append({"size": (inputs["size"][0] + 1, inputs["size"][1])})
    if operator == "predict":
        choices.append({"logits": features.new_zeros(1, 257, 2, 2)})
    if operator == "prototype_similarity":
        prototypes = inputs["prototypes"]
        choices.append(
            {"prototypes": torch.cat([prototypes, prototypes.new_zeros(*prototypes.shape[:2], 1)], 2)}
        )
    return draw.one(*choices) if choices else {}


def _wrong_pairs(draw: Draw, inputs: dict[str, Any]) -> list[dict[str, Any]]:
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


def _spoil_arguments(draw: Draw, case: Case) -> Case:
    """The same call with one argument wrong."""
    changed: dict[str, Any] = {}
    error: type[Exception] = ValueError
    kind = draw.one("tensor", "tensor", "scalar", "values", "values", "double")
    if kind == "values":
        changed = _wrong_values(draw, case.operator, case.inputs)
    elif kind == "double":
        name = next(iter(case.inputs))
        changed = {name: case.inputs[name].double(), "impl": "cpp"}
    elif kind == "scalar":
        name = draw.one(*_TAKES[case.operator], "impl")
        value, error = draw.one(*_SCALARS[name])
        changed = {name: value}
    if not changed:
        name, value, error = _wrong_tensor(draw, case.inputs)
        changed = {name: value}
    what = ", ".join(changed)
    return Case(case.seed, case.operator, "bad argument", what, case.inputs | changed, error=error)


def make(seed: int, operators: tuple[str, ...]) -> Case:
    """The case of a seed: its operator is one of `operators`."""
    draw = Draw(seed)
    case = VALUES[draw.one(*operators)](draw)
    case.seed = seed
    kind = draw.random.random()
    case.threads = draw.one(1, 1, 1, 1, 1, 2, 3)
    if kind < 0.7:
        for name in _tensors(case.inputs):
            case.inputs[name] = lay_out(draw, case.inputs[name])
        return case
    if kind < 0.85:
        return _spoil_arguments(draw, case)
    case.kind = "raw"
    return case
