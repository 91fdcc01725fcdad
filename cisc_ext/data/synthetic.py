"""The demo's data: textured scenes with shapes, generated in code and the same everywhere.

A class is an outline with a texture and a hue that scatters around its own. Size, turn, shades, backdrop,
clutter, light, blur and noise vary, so a handful of labels covers too little of it and unlabeled images help.
"""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from cisc_ext.data.datasets import DATASETS, Item, Size, UInt8Array, save_label, write_list
from cisc_ext.data.transforms import sample_rng
from cisc_ext.files import atomic_write, write_json

Float32Array: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Pattern: TypeAlias = Callable[[Float32Array, Float32Array], BoolArray]

SPEC = DATASETS["demo"]
FORMAT = 2  # raised when the same parameters give other files
MARKER = "demo.json"
MIN_SIDE = 32
RADIUS = (0.17, 0.24)  # smallest, of the root of the area; largest, of the short side (a quadrant holds it)
PERIOD = (0.35, 0.55)  # of a texture, in radii
TILT = 0.1  # of a texture, radians, deviation
HUE_SPREAD = 0.06  # of a class, turns, deviation
BACKDROP_SATURATION = (0.0, 0.3)
CLUTTER = (2, 6)  # lines and specks, least and below
LIGHT = (0.65, 1.15)
SENSOR_NOISE = (2.0, 10.0)  # grey levels, deviation

# A class: is the point inside, in radii of the circumscribed circle? is it in the darker shade, in periods of
# the texture?
_SHAPES: dict[str, tuple[Pattern, Pattern]] = {
    "disc": (lambda x, y: x * x + y * y <= 0.85**2, lambda x, y: x > math.inf),
    "square": (
        lambda x, y: np.maximum(abs(x), abs(y)) <= math.sqrt(0.5),
        lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5),
    ),
    "triangle": (
        lambda x, y: np.maximum(y, abs(x) * math.sqrt(0.75) - y / 2) <= 0.5,
        lambda x, y: y % 1 < 0.5,
    ),
    "ring": (
        lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.4**2),
        lambda x, y: (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.32**2,
    ),
    "stripes": (lambda x, y: x * x + (y / 0.75) ** 2 <= 1, lambda x, y: x % 1 < 0.5),
}


def generate(
    folder: Path | str,
    *,
    seed: int = 0,
    labeled: int = 12,
    unlabeled: int = 300,
    val: int = 40,
    size: Size = (96, 96),
) -> Path:
    """Write the demo's images, labels and split lists under `folder`; gives the folder of the lists.

    `labeled`, `unlabeled`, `val` are numbers of images, `size` is (width, height) in pixels. Unlabeled images
    get no masks. Files that are there already with the same parameters are left as they are.
    """
    root = Path(folder)
    width, height = size
    if min(labeled, unlabeled, val) < 1:
        raise ValueError(f"demo: expected at least one image of each kind, got {labeled}, {unlabeled}, {val}")
    if min(size) < MIN_SIDE or RADIUS[0] * math.sqrt(width * height) > RADIUS[1] * min(size):
        raise ValueError(f"demo: expected sides of {MIN_SIDE} pixels or more, at most 1.9 to 1, got {size}")

    parts = {
        "labeled": [f"train/{index:04d}" for index in range(labeled)],
        "unlabeled": [f"train/{index:04d}" for index in range(labeled, labeled + unlabeled)],
        "val": [f"val/{index:04d}" for index in range(val)],
    }
    images = {name: root / "images" / f"{name}.png" for names in parts.values() for name in names}
    masks = {name: root / "labels" / f"{name}.png" for name in (*parts["labeled"], *parts["val"])}
    lists = {part: root / "splits" / f"{part}.txt" for part in parts}
    settings = {
        "format": FORMAT,
        "seed": seed,
        "labeled": labeled,
        "unlabeled": unlabeled,
        "val": val,
        "size": list(size),
    }
    marker = root / MARKER
    if _is_current(marker, settings, (*images.values(), *masks.values(), *lists.values())):
        return root / "splits"

    marker.unlink(missing_ok=True)
    for name, path in images.items():
        part, index = name.split("/")
        image, labels = scene(sample_rng(seed, part, 0, int(index)), size, first=int(index))
        _save_image(path, image)
        if name in masks:
            save_label(SPEC, masks[name], labels)
    for part, path in lists.items():
        items = [Item(images[name], masks.get(name), f"images/{name}.png") for name in parts[part]]
        write_list(path, items, root)
    write_json(marker, settings)
    return root / "splits"


def scene(rng: np.random.Generator, size: Size, first: int = 0) -> tuple[UInt8Array, UInt8Array]:
    """One image [H,W,3] and its labels [H,W]; one of its shapes is of class `first` modulo the shapes."""
    width, height = size
    image = _backdrop(rng, size)
    labels = np.zeros((height, width), np.uint8)
    count = int(rng.integers(1, 4))
    kinds = [first % len(_SHAPES), *rng.integers(len(_SHAPES), size=count - 1).tolist()]
    for quadrant, kind in zip(rng.permutation(4).tolist(), kinds, strict=False):
        radius = float(rng.uniform(RADIUS[0] * math.sqrt(width * height), RADIUS[1] * min(size)))
        centre_x = (quadrant % 2 + 0.5) * width / 2 + float(rng.uniform(-1, 1)) * (width / 4 - radius)
        centre_y = (quadrant // 2 + 0.5) * height / 2 + float(rng.uniform(-1, 1)) * (height / 4 - radius)
        x, y = _coordinates(size, centre_x, centre_y, radius, float(rng.uniform(0, 2 * math.pi)))
        name = tuple(_SHAPES)[kind]
        label = SPEC.classes.index(name)
        outline, texture = _SHAPES[name]
        inside = outline(x, y)
        period = float(rng.uniform(*PERIOD))
        x, y = _coordinates(size, centre_x, centre_y, radius * period, float(rng.normal(0, TILT)))
        image[inside] = _fill(rng, size, label, texture(x, y))[inside]
        labels[inside] = label
    return _photographed(rng, image), labels


def _coordinates(
    size: Size, centre_x: float, centre_y: float, radius: float, angle: float
) -> tuple[Float32Array, Float32Array]:
    """Coordinates of every pixel in a frame that is moved, turned and scaled, [H,W] each."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32) + 0.5
    x, y = (x - centre_x) / radius, (y - centre_y) / radius
    return math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x


def _noise(rng: np.random.Generator, size: Size, cells: int) -> Float32Array:
    """Smooth noise of mean 0 and deviation about 1, `cells` patches across, [H,W,1]."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32)[..., None]


def _colour(rng: np.random.Generator, hue: float, saturation: tuple[float, float]) -> Float32Array:
    """A colour [3] of 0 to 255 with a given hue in turns."""
    rgb = colorsys.hsv_to_rgb(hue % 1, float(rng.uniform(*saturation)), float(rng.uniform(0.4, 0.95)))
    return np.array(rgb, np.float32) * 255


def _backdrop(rng: np.random.Generator, size: Size) -> Float32Array:
    """Two blended colours, texture, lines and specks, [H,W,3]."""
    blend = 1 / (1 + np.exp(-2 * _noise(rng, size, int(rng.integers(2, 5)))))
    colours = [_colour(rng, float(rng.random()), BACKDROP_SATURATION) for _ in range(2)]
    image = blend * colours[0] + (1 - blend) * colours[1]
    image += float(rng.uniform(4, 14)) * _noise(rng, size, int(rng.integers(12, 32)))
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(*CLUTTER))):
        x, y, x_end, y_end = (float(rng.uniform(0, side)) for side in (*size, *size))
        colour = _colour(rng, float(rng.random()), (0.2, 0.9)).astype(int).tolist()
        if rng.random() < 0.5:
            draw.line((x, y, x_end, y_end), fill=tuple(colour), width=int(rng.integers(1, 3)))
        else:
            speck = float(rng.uniform(1, 3))
            draw.ellipse((x - speck, y - speck, x + speck, y + speck), fill=tuple(colour))
    return np.array(picture, np.float32)


def _fill(rng: np.random.Generator, size: Size, label: int, second: BoolArray) -> Float32Array:
    """What a shape is filled with, [H,W,3]: two shades of one hue, the darker where `second` [H,W] is set."""
    hue = (label - 1) / len(_SHAPES) + float(rng.normal(0, HUE_SPREAD))
    fill = np.zeros((size[1], size[0], 3), np.float32) + _colour(rng, hue, (0.4, 0.8))
    fill[second] *= float(rng.uniform(0.3, 0.5))
    return fill + float(rng.uniform(3, 14)) * _noise(rng, size, int(rng.integers(4, 24)))


def _photographed(rng: np.random.Generator, image: Float32Array) -> UInt8Array:
    """The scene under uneven light, a little out of focus, with the noise of a sensor."""
    height, width = image.shape[:2]
    x, _ = _coordinates((width, height), width / 2, height / 2, width / 2, float(rng.uniform(0, 2 * math.pi)))
    light = float(rng.uniform(*LIGHT)) * (1 + float(rng.uniform(0, 0.35)) * x[..., None])
    picture = Image.fromarray(np.clip(image * light, 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.9))))
    noise = rng.normal(0, float(rng.uniform(*SENSOR_NOISE)), image.shape)
    return np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)


def _is_current(marker: Path, settings: dict[str, object], files: Iterable[Path]) -> bool:
    if not marker.is_file():
        return False
    try:
        if json.loads(marker.read_text()) != settings:
            return False
    except ValueError:
        return False
    return all(path.is_file() for path in files)


def _save_image(path: Path, image: UInt8Array) -> None:
    picture = Image.fromarray(image)
    atomic_write(path, lambda stream: picture.save(stream, format="PNG", compress_level=1))
