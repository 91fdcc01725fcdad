"""Augmentation of images and labels; every random draw comes from the generator that is passed in."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from cisc_ext.data.datasets import IGNORE_INDEX, UInt8Array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def sample_rng(seed: int, stream: str, epoch: int, index: int) -> np.random.Generator:
    """Random numbers of one sample, the same in whatever process and order it is made."""
    entropy = (seed, zlib.crc32(stream.encode()), epoch, index)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def to_tensor(image: UInt8Array) -> torch.Tensor:
    """uint8 [H,W,3] -> float32 [3,H,W], normalised with ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    return pixels.mul_(1 / (255 * std)).sub_(mean / std)


@dataclass(frozen=True)
class Augment:
    """Random resize, pad, crop and flip of an image together with its labels.

    The long side is resized to a random length in `scale` times `base_size` (pixels, ratio kept; image
    bilinear, labels the pixel at the same centre), the rest of the crop padded at the right and below (image
    0, labels `ignore_index`), a square of `crop_size` pixels cut out and flipped with probability `flip`.
    Only the pixels of the crop are resized.
    """

    base_size: int
    crop_size: int
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    ignore_index: int = IGNORE_INDEX

    def __call__(
        self, rng: np.random.Generator, image: UInt8Array, labels: UInt8Array
    ) -> tuple[UInt8Array, UInt8Array]:
        """`image` [H,W,3], `labels` [H,W] -> [crop,crop,3], [crop,crop]."""
        height, width = labels.shape
        low, high = (max(1, int(self.base_size * factor)) for factor in self.scale)
        factor = int(rng.integers(low, high + 1)) / max(height, width)
        new_height, new_width = (max(1, int(side * factor + 0.5)) for side in (height, width))
        top, bottom = self._interval(rng, new_height)
        left, right = self._interval(rng, new_width)
        flipped = bool(rng.random() < self.flip)

        size = (right - left, bottom - top)
        window = (
            left * width / new_width,
            top * height / new_height,
            right * width / new_width,
            bottom * height / new_height,
        )
        crop = np.zeros((self.crop_size, self.crop_size, 3), np.uint8)
        crop[: size[1], : size[0]] = _resize_window(image, size, window)
        rows = (2 * np.arange(top, bottom) + 1) * height // (2 * new_height)
        columns = (2 * np.arange(left, right) + 1) * width // (2 * new_width)
        crop_labels = np.full((self.crop_size, self.crop_size), self.ignore_index, np.uint8)
        crop_labels[: size[1], : size[0]] = labels[rows[:, None], columns]
        if flipped:
            return np.ascontiguousarray(crop[:, ::-1]), np.ascontiguousarray(crop_labels[:, ::-1])
        return crop, crop_labels

    def _interval(self, rng: np.random.Generator, side: int) -> tuple[int, int]:
        start = int(rng.integers(max(0, side - self.crop_size) + 1))
        return start, min(side, start + self.crop_size)


def _resize_window(
    pixels: UInt8Array, size: tuple[int, int], window: tuple[float, float, float, float]
) -> UInt8Array:
    """Cut `window` (left, top, right, bottom) out and resize it to `size` (width, height), bilinear.

    The same pixels as resizing all and then cropping: the filter sees its whole support around the window.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = window
    margin_x = math.ceil(max(1.0, (right - left) / size[0])) + 1
    margin_y = math.ceil(max(1.0, (bottom - top) / size[1])) + 1
    x, y = max(0, math.floor(left) - margin_x), max(0, math.floor(top) - margin_y)
    x_end, y_end = min(width, math.ceil(right) + margin_x), min(height, math.ceil(bottom) + margin_y)
    part = Image.fromarray(np.ascontiguousarray(pixels[y:y_end, x:x_end]))
    box = (left - x, top - y, min(right - x, x_end - x), min(bottom - y, y_end - y))
    return np.asarray(part.resize(size, Image.Resampling.BILINEAR, box=box))


@dataclass(frozen=True)
class Strong:
    """Colour jitter, grey, blur and cutout of a crop, as strong augmentation of unlabeled images.

    Jitter factors are drawn from 1 +- the setting (hue: a shift of +- `hue` turns) and applied in random
    order; blur's sigma is in pixels. `cutout` is its probability, 0 for none; it replaces a rectangle of
    `cutout_area` of the crop, of width / height in `cutout_ratio`, with noise, and ignores its labels.
    """

    jitter: float = 0.8
    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.25
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    cutout: float = 0.0
    cutout_area: tuple[float, float] = (0.02, 0.4)
    cutout_ratio: tuple[float, float] = (0.3, 1 / 0.3)
    ignore_index: int = IGNORE_INDEX

    def __call__(
        self, rng: np.random.Generator, image: UInt8Array, labels: UInt8Array
    ) -> tuple[UInt8Array, UInt8Array]:
        """`image` [H,W,3], `labels` [H,W] -> the same shapes; the arguments stay as they are."""
        picture = Image.fromarray(image)
        if rng.random() < self.jitter:
            picture = self._jittered(rng, picture)
        if rng.random() < self.grey:
            picture = picture.convert("L").convert("RGB")
        if rng.random() < self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(*self.blur_sigma))))
        pixels = np.array(picture)
        if self.cutout and rng.random() < self.cutout:
            return self._cut(rng, pixels, labels.copy())
        return pixels, labels

    def _jittered(self, rng: np.random.Generator, picture: Image.Image) -> Image.Image:
        brightness, contrast, saturation = (
            float(rng.uniform(max(0.0, 1 - amount), 1 + amount))
            for amount in (self.brightness, self.contrast, self.saturation)
        )
        turns = float(rng.uniform(-self.hue, self.hue))
        steps: tuple[Callable[[Image.Image], Image.Image], ...] = (
            lambda image: ImageEnhance.Brightness(image).enhance(brightness),
            lambda image: ImageEnhance.Contrast(image).enhance(contrast),
            lambda image: ImageEnhance.Color(image).enhance(saturation),
            lambda image: shift_hue(image, turns),
        )
        for step in rng.permutation(len(steps)).tolist():
            picture = steps[step](picture)
        return picture

    def _cut(
        self, rng: np.random.Generator, pixels: UInt8Array, labels: UInt8Array
    ) -> tuple[UInt8Array, UInt8Array]:
        height, width = labels.shape
        area = float(rng.uniform(*self.cutout_area)) * height * width
        ratio = float(rng.uniform(*self.cutout_ratio))
        cut_width = min(width, max(1, round(math.sqrt(area * ratio))))
        cut_height = min(height, max(1, round(math.sqrt(area / ratio))))
        x = int(rng.integers(width - cut_width + 1))
        y = int(rng.integers(height - cut_height + 1))
        noise = rng.integers(0, 256, (cut_height, cut_width, 3), dtype=np.uint8)
        pixels[y : y + cut_height, x : x + cut_width] = noise
        labels[y : y + cut_height, x : x + cut_width] = self.ignore_index
        return pixels, labels


def shift_hue(picture: Image.Image, turns: float) -> Image.Image:
    """Turn the hue of an RGB image by a share of the colour circle."""
    hue, saturation, value = picture.convert("HSV").split()
    shift = round(turns * 256)
    turned = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
