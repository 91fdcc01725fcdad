"""Sizes at which operators are measured, and inputs of these sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CHANNELS = 256
STRIDE = 4
IGNORE_INDEX = 255
_REGION = 48  # pixels of a region's side
_IGNORED = 0.1  # share of regions


@dataclass(frozen=True)
class Size:
    """Images of a data set as the operators meet them: labels [B,H,W], features at a quarter of that."""

    name: str
    batch: int
    classes: int
    height: int
    width: int

    @property
    def low(self) -> tuple[int, int]:
        """Feature resolution."""
        return -(-self.height // STRIDE), -(-self.width // STRIDE)

    def shape(self, *, channels: bool = False, labels: bool = True) -> dict[str, int]:
        """The sizes by their letters."""
        depth = {"C": CHANNELS} if channels else {"K": self.classes}
        full = {"H": self.height, "W": self.width} if labels else {}
        return {"B": self.batch, **depth, "h": self.low[0], "w": self.low[1], **full}

    def features(self, generator: torch.Generator) -> Tensor:
        """[B,C,h,w], as after a ReLU."""
        return torch.randn(self.batch, CHANNELS, *self.low, generator=generator).relu_()

    def logits(self, generator: torch.Generator) -> Tensor:
        """[B,K,h,w]."""
        return torch.randn(self.batch, self.classes, *self.low, generator=generator)

    def labels(self, generator: torch.Generator) -> Tensor:
        """[B,H,W] uint8."""
        return regions(self.batch, self.height, self.width, self.classes, generator)


CROPS = (Size("pascal", 2, 21, 321, 321), Size("cityscapes", 2, 19, 721, 721))
IMAGES = tuple(Size(f"image_{h}x{2 * h}", 1, 19, h, 2 * h) for h in (128, 256, 512, 1024))


def sizes() -> Iterator[tuple[Size, bool]]:
    """The crops of the published runs, then images up to Cityscapes' own, which are a ladder."""
    for size in CROPS:
        yield size, False
    for size in IMAGES:
        yield size, True


def regions(
    batch: int,
    height: int,
    width: int,
    classes: int,
    generator: torch.Generator,
    *,
    crop: bool = True,
    shares: Sequence[float] | None = None,
) -> Tensor:
    """Labels [B,H,W] uint8 in square regions, each class alike, or as frequent as its share of `shares` says;
    as a crop, with class 0 in the first quarter of each image and a tenth of the other regions ignored."""
    shape = (batch, -(-height // _REGION) + 1, -(-width // _REGION) + 1)
    rows, columns = shape[1:]
    if shares is None:
        low = torch.randint(0, classes, shape, generator=generator)
    else:
        count = batch * rows * columns
        drawn = torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator)
        low = drawn.view(shape)
    if crop:
        low[torch.rand(low.shape, generator=generator) < _IGNORED] = IGNORE_INDEX
        low[:, : rows // 2, : columns // 2] = 0
    full = functional.interpolate(low[:, None].float(), (height, width), mode="nearest")
    return full[:, 0].to(torch.uint8)
