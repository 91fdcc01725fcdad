"""Data sets, split lists, and reading and writing of images and labels.

The only file that names a data set: a new one is one more entry in `DATASETS`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from cisc_ext.files import atomic_write

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
RGB: TypeAlias = tuple[int, int, int]
Size: TypeAlias = tuple[int, int]  # width, height in pixels
T = TypeVar("T")

LABEL_VALUES = 256
IGNORE_INDEX = 255
IGNORE_COLOUR: RGB = (224, 224, 192)
VAL_LEVELS_UP = 2


@dataclass(frozen=True)
class DatasetSpec:
    """What has to be known about a data set.

    Paths are POSIX templates relative to the data root; `{}` is the varying part (it may contain `/`). Labels
    have one template for each kind of mask they are published as; when the mask that a list names is absent,
    the other kinds are tried.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    base_size: int  # pixels, long side around which training images are resized
    crop_size: int  # pixels, side of the square training crop
    train_images: str
    train_labels: tuple[str, ...]
    val_images: str | None = None
    val_labels: tuple[str, ...] = ()
    train_list: str | None = None  # file with one varying part per line; None: all that fits
    val_list: str | None = None
    ignore_index: int = IGNORE_INDEX
    background: int | None = None  # class left out of the class index
    label_map: Mapping[int, int] | None = field(default=None, hash=False)  # official id -> train id
    mapped_suffix: str | None = None  # masks whose name ends so hold official ids; all others hold train ids

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.palette):
            raise ValueError(
                f"{self.name}: expected one colour per class, got {len(self.classes)} classes "
                f"and {len(self.palette)} colours"
            )
        if not 0 < self.num_classes <= LABEL_VALUES or not 0 <= self.ignore_index < LABEL_VALUES:
            raise ValueError(f"{self.name}: classes and ignore_index must fit into 8 bits")
        if self.ignore_index < self.num_classes:
            raise ValueError(f"{self.name}: ignore_index {self.ignore_index} is the number of a class")

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes)


@dataclass(frozen=True)
class Item:
    """An image of a split list; `name` is its path as in the list, relative and POSIX."""

    image: Path
    label: Path | None
    name: str


@dataclass(frozen=True)
class Split:
    """The three lists of a semi-supervised experiment; only `unlabeled` has items without label."""

    labeled: tuple[Item, ...]
    unlabeled: tuple[Item, ...]
    val: tuple[Item, ...]

    def fingerprint(self) -> str:
        """Changes with the lists, and with the size of any file that they name."""
        files = [
            (part, i.name, i.image.stat().st_size, i.label and i.label.stat().st_size)
            for part in ("labeled", "unlabeled", "val")
            for i in getattr(self, part)
        ]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def voc_palette(count: int) -> tuple[RGB, ...]:
    """The first `count` colours of the Pascal VOC colour map: bits of the class spread over the channels."""
    colours = []
    for value in range(count):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= (value >> (3 * bit + channel) & 1) << (7 - bit)
        colours.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colours)


_PASCAL_NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)

_COCO_NAMES = (
    "background,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,"
    "umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,"
    "skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,"
    "sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,"
    "dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)

# name, colour, official id; the train id is the position
_CITYSCAPES_CLASSES: tuple[tuple[str, RGB, int], ...] = (
    ("road", (128, 64, 128), 7),
    ("sidewalk", (244, 35, 232), 8),
    ("building", (70, 70, 70), 11),
    ("wall", (102, 102, 156), 12),
    ("fence", (190, 153, 153), 13),
    ("pole", (153, 153, 153), 17),
    ("traffic light", (250, 170, 30), 19),
    ("traffic sign", (220, 220, 0), 20),
    ("vegetation", (107, 142, 35), 21),
    ("terrain", (152, 251, 152), 22),
    ("sky", (70, 130, 180), 23),
    ("person", (220, 20, 60), 24),
    ("rider", (255, 0, 0), 25),
    ("car", (0, 0, 142), 26),
    ("truck", (0, 0, 70), 27),
    ("bus", (0, 60, 100), 28),
    ("train", (0, 80, 100), 31),
    ("motorcycle", (0, 0, 230), 32),
    ("bicycle", (119, 11, 32), 33),
)
_CITYSCAPES_IDS = 34  # official ids 0..33; -1, the licence plate, is stored as 255

_CAMVID_CLASSES: tuple[tuple[str, RGB], ...] = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)

_DEMO_CLASSES: tuple[tuple[str, RGB], ...] = (
    ("backdrop", (40, 40, 40)),
    ("disc", (230, 60, 60)),
    ("square", (60, 160, 240)),
    ("triangle", (250, 200, 50)),
    ("ring", (90, 200, 100)),
    ("stripes", (190, 90, 220)),
)

_SPECS = (
    DatasetSpec(
        name="pascal",
        classes=tuple(_PASCAL_NAMES.split()),
        palette=voc_palette(21),
        base_size=400,
        crop_size=321,
        train_images="JPEGImages/{}.jpg",
        train_labels=("SegmentationClass/{}.png",),
        val_images="JPEGImages/{}.jpg",
        val_labels=("SegmentationClass/{}.png",),
        train_list="ImageSets/Segmentation/train.txt",
        val_list="ImageSets/Segmentation/val.txt",
        background=0,
    ),
    DatasetSpec(
        name="cityscapes",
        classes=tuple(name for name, _, _ in _CITYSCAPES_CLASSES),
        palette=tuple(colour for _, colour, _ in _CITYSCAPES_CLASSES),
        base_size=2048,
        crop_size=721,
        train_images="leftImg8bit/train/{}_leftImg8bit.png",
        train_labels=("gtFine/train/{}_gtFine_labelTrainIds.png", "gtFine/train/{}_gtFine_labelIds.png"),
        val_images="leftImg8bit/val/{}_leftImg8bit.png",
        val_labels=("gtFine/val/{}_gtFine_labelTrainIds.png", "gtFine/val/{}_gtFine_labelIds.png"),
        label_map=dict.fromkeys((*range(_CITYSCAPES_IDS), IGNORE_INDEX), IGNORE_INDEX)
        | {official: train for train, (_, _, official) in enumerate(_CITYSCAPES_CLASSES)},
        mapped_suffix="_labelIds.png",
    ),
    DatasetSpec(
        name="coco",
        classes=tuple(_COCO_NAMES.split(",")),
        palette=voc_palette(81),
        base_size=512,
        crop_size=513,
        train_images="train2017/{}.jpg",
        train_labels=("masks/{}.png",),
        val_images="val2017/{}.jpg",
        val_labels=("masks/{}.png",),
        background=0,
    ),
    DatasetSpec(
        name="camvid",
        classes=tuple(name for name, _ in _CAMVID_CLASSES),
        palette=tuple(colour for _, colour in _CAMVID_CLASSES),
        base_size=480,
        crop_size=321,
        train_images="images/train/{}.jpg",
        train_labels=("labels/train/{}.png",),
        val_images="images/val/{}.jpg",
        val_labels=("labels/val/{}.png",),
    ),
    DatasetSpec(
        name="demo",
        classes=tuple(name for name, _ in _DEMO_CLASSES),
        palette=tuple(colour for _, colour in _DEMO_CLASSES),
        base_size=96,
        crop_size=65,
        train_images="images/train/{}.png",
        train_labels=("labels/train/{}.png",),
        val_images="images/val/{}.png",
        val_labels=("labels/val/{}.png",),
        background=0,
    ),
)
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}


def varying_part(template: str, path: str) -> str | None:
    """What `{}` of `template` stands for in `path`; None if the path does not fit."""
    before, after = template.split("{}")
    fits = path.startswith(before) and path.endswith(after) and len(path) > len(before) + len(after)
    return path[len(before) : len(path) - len(after)] if fits else None


def pseudo_path(folder: Path | str, name: str) -> Path:
    """Where the pseudo label of image `name` lies: the same relative path under `folder`, as PNG."""
    return Path(folder) / PurePosixPath(name).with_suffix(".png")


def load_split(
    spec: DatasetSpec, data_root: Path | str, split_dir: Path | str, val: Path | str | None = None
) -> Split:
    """Read `labeled.txt`, `unlabeled.txt` and the validation list, and check every file that they name.

    A line is `image-path label-path`, relative to `data_root`, or just `image-path` in `unlabeled.txt`, where
    a label path is neither needed nor looked at. Without `val` the list is `val.txt` in `split_dir` or up to
    two folders above. `FileNotFoundError` or `ValueError`, one line naming file and reason, for a list that
    is missing, empty or malformed; an image that is missing, unreadable, listed twice or in two lists; a
    label that is missing or of another size than its image. Label values are checked when labels are read.
    """
    root, folder = Path(data_root), Path(split_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"data root {root}: no such folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"split folder {folder}: no such folder")
    lists = (folder / "labeled.txt", folder / "unlabeled.txt", _val_list(folder, val))
    labeled = _read_list(spec, root, lists[0], with_labels=True)
    unlabeled = _read_list(spec, root, lists[1], with_labels=False)
    validation = _read_list(spec, root, lists[2], with_labels=True)
    _check_disjoint(zip(lists, (labeled, unlabeled, validation), strict=True))
    _check_files((*labeled, *unlabeled, *validation))
    return Split(labeled, unlabeled, validation)


def load_list(spec: DatasetSpec, data_root: Path | str, path: Path | str) -> tuple[Item, ...]:
    """Read one list of labeled images, and check every file that it names, as `load_split` does."""
    items = _read_list(spec, Path(data_root), Path(path), with_labels=True)
    _check_files(items)
    return items


def write_list(path: Path | str, items: Iterable[Item], data_root: Path | str) -> None:
    """Write a list as `load_split` reads it, atomically; items without label get no label path."""
    text = list_text(items, data_root)

    def write(stream: BinaryIO) -> None:
        stream.write(text.encode())

    atomic_write(path, write)


def list_text(items: Iterable[Item], data_root: Path | str) -> str:
    """What `write_list` writes."""
    lines = []
    for item in items:
        fields = [item.name]
        if item.label is not None:
            fields.append(item.label.relative_to(data_root).as_posix())
        if any(len(path.split()) != 1 for path in fields):
            raise ValueError(f"{item.image}: a list cannot hold paths with blanks")
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)


def _val_list(folder: Path, val: Path | str | None) -> Path:
    if val is not None:
        return Path(val)
    above = folder.resolve()
    for place in (above, *above.parents[:VAL_LEVELS_UP]):
        if (place / "val.txt").is_file():
            return place / "val.txt"
    raise FileNotFoundError(f"{folder}: no val.txt there or up to {VAL_LEVELS_UP} folders above")


def _read_list(spec: DatasetSpec, root: Path, path: Path, *, with_labels: bool) -> tuple[Item, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
    items: list[Item] = []
    seen: dict[Path, int] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{path}, line {number}"
        if len(fields) > 2:
            raise ValueError(
                f"{where}: expected `image-path label-path` without blanks in paths, got {len(fields)} fields"
            )
        if with_labels and len(fields) == 1:
            raise ValueError(f"{where}: expected `image-path label-path`, got no label path for {fields[0]}")
        name = _relative(fields[0], where)
        label = _find_label(spec, root, _relative(fields[1], where)) if with_labels else None
        key = pseudo_path("", name)
        if key in seen:
            raise ValueError(f"{where}: {name} is listed already in line {seen[key]} (suffix apart)")
        seen[key] = number
        items.append(Item(root / name, label, name))
    if not items:
        raise ValueError(f"{path}: the list is empty")
    return tuple(items)


def _relative(path: str, where: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{where}: expected a path inside the data root, got {path}")
    return pure.as_posix()


def _find_label(spec: DatasetSpec, root: Path, name: str) -> Path:
    """The listed mask or, if that is absent, the same mask as the data set publishes it otherwise."""
    if not (root / name).is_file():
        for templates in (spec.train_labels, spec.val_labels):
            parts = {part for template in templates if (part := varying_part(template, name)) is not None}
            for template in templates:
                for other in (root / template.format(part) for part in sorted(parts)):
                    if other.is_file():
                        return other
    return root / name


def _check_disjoint(lists: Iterable[tuple[Path, tuple[Item, ...]]]) -> None:
    home: dict[str, Path] = {}
    for path, items in lists:
        for item in items:
            if item.name in home:
                raise ValueError(f"{path}: {item.name} is also in {home[item.name]}")
        home.update({item.name: path for item in items})


def _check_files(items: tuple[Item, ...]) -> None:
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        deque(pool.map(_check_item, items), maxlen=0)


def _check_item(item: Item) -> None:
    size = _header(item.image, "image")
    if item.label is not None and (label_size := _header(item.label, "label")) != size:
        raise ValueError(
            f"{item.label}: expected {size[0]} x {size[1]} pixels, the size of {item.image}, "
            f"got {label_size[0]} x {label_size[1]}"
        )


def _header(path: Path, kind: str) -> Size:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind}")
    return _with_image(path, lambda image: image.size)


def _with_image(path: Path, use: Callable[[Image.Image], T]) -> T:
    """Open `path`, apply `use`, and turn Pillow's errors into one line with the file's name."""
    try:
        with Image.open(path) as image:
            return use(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({type(error).__name__})") from error


def read_image(path: Path | str, load_size: Size | None = None) -> UInt8Array:
    """RGB [H,W,3]; with `load_size` (width, height) in pixels, resized to it (bilinear, antialiased)."""

    def decode(image: Image.Image) -> Image.Image:
        rgb = image.convert("RGB")
        if load_size is None or rgb.size == load_size:
            return rgb
        return rgb.resize(load_size, Image.Resampling.BILINEAR)

    return np.array(_with_image(Path(path), decode))


def read_label(spec: DatasetSpec, path: Path | str, load_size: Size | None = None) -> UInt8Array:
    """Train ids [H,W] of a palette or grey PNG, official ids mapped; `load_size` (width, height): nearest.

    `ValueError` naming the file for a mask of another kind, or a value that is neither a class nor ignored.
    """
    path = Path(path)

    def decode(image: Image.Image) -> Image.Image:
        if image.mode not in ("P", "L"):
            raise ValueError(
                f"{path}: expected a label image of 8 bits, palette or grey, got mode {image.mode}"
            )
        image.load()
        table = _label_table(spec, path.name)
        used = np.flatnonzero(image.histogram())
        wrong = used[table[used] < 0]
        if wrong.size:
            raise ValueError(
                f"{path}: expected labels of {spec.name}, {_label_values(spec, path.name)}, got {wrong[0]}"
            )
        if load_size is None or image.size == load_size:
            return image.copy()
        return image.resize(load_size, Image.Resampling.NEAREST)

    labels = np.array(_with_image(path, decode))
    if _holds_official_ids(spec, path.name):
        return _label_table(spec, path.name).astype(np.uint8)[labels]
    return labels


def save_label(spec: DatasetSpec, path: Path | str, labels: UInt8Array) -> None:
    """Write `labels` [H,W] as a palette PNG in the colours of `spec`, atomically."""
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise ValueError(f"labels: expected uint8 [H,W], got {labels.dtype} {list(labels.shape)}")
    colours = np.zeros((LABEL_VALUES, 3), np.uint8)
    colours[: spec.num_classes] = spec.palette
    colours[spec.ignore_index] = IGNORE_COLOUR
    image = Image.fromarray(labels)
    image.putpalette(colours.tobytes())
    atomic_write(path, lambda stream: image.save(stream, format="PNG"))


def _holds_official_ids(spec: DatasetSpec, file_name: str) -> bool:
    return spec.mapped_suffix is not None and file_name.endswith(spec.mapped_suffix)


def _label_values(spec: DatasetSpec, file_name: str) -> str:
    if _holds_official_ids(spec, file_name):
        return "official ids that its label_map knows"
    return f"0 to {spec.num_classes - 1} or {spec.ignore_index}"


def _label_table(spec: DatasetSpec, file_name: str) -> npt.NDArray[np.int16]:
    """Stored value -> train id [256], -1 where the value must not occur."""
    table = np.full(LABEL_VALUES, -1, np.int16)
    if spec.label_map is not None and _holds_official_ids(spec, file_name):
        table[list(spec.label_map)] = list(spec.label_map.values())
    else:
        table[: spec.num_classes] = np.arange(spec.num_classes)
        table[spec.ignore_index] = spec.ignore_index
    return table
