"""Cases of the fuzzing and what they are drawn from: sizes, layouts, features, labels, classes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SINGLE = torch.finfo(torch.float32).eps
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


def convert(draw: Draw, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In one of the dtypes, where what is finite stays so; now and then all images are the first."""
    dtype = dtype or draw.one(*FLOATS)
    most = torch.finfo(dtype).max
    value = torch.where(value.isfinite(), value.clamp(-most, most), value).to(dtype)
    return value[:1].repeat(len(value), *[1] * (value.dim() - 1)) if draw.chance(0.15) else value


def spoil(draw: Draw, value: Tensor, values: tuple[float, ...]) -> Tensor:
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


def draw_features(draw: Draw, kind: str, *shape: int, huge: float = 1e30) -> Tensor:
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
        return spoil(draw, value, (NAN, INF, -INF))
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


def draw_labels(
    draw: Draw, shape: tuple[int, ...], upper: int, ignore_index: int | None, odd: bool
) -> Tensor:
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


def draw_classes(draw: Draw, batch: int, slots: int, upper: int, limited: bool) -> Tensor:
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


def apart_from(norms: Tensor, eps: float) -> bool:
    """No norm is within rounding of eps."""
    return not bool(((norms / eps - 1).abs() < 1e-3).any())
