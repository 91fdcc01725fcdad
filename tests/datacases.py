"""Small data sets on disk for the tests of data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from cisc_ext.data.datasets import (
    DATASETS,
    Item,
    Split,
    UInt8Array,
    load_split,
    pseudo_path,
    save_label,
    voc_palette,
)
from cisc_ext.data.transforms import Augment

PASCAL, CITYSCAPES, CAMVID, DEMO = (DATASETS[name] for name in ("pascal", "cityscapes", "camvid", "demo"))
TINY = replace(CAMVID, name="tiny", classes=("a", "b", "c", "d"), palette=voc_palette(4))
CROP = Augment(base_size=24, crop_size=17)


def write_image(path: Path, size: tuple[int, int] = (24, 18), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_grey(path: Path, labels: UInt8Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)
    return path


def halves(*values: int, size: tuple[int, int] = (24, 18)) -> UInt8Array:
    """Labels in vertical bands of equal width."""
    columns = np.repeat(np.array(values, np.uint8), size[0] // len(values))
    return np.ascontiguousarray(np.broadcast_to(columns, (size[1], len(columns))))


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def tiny(root: Path) -> Split:
    """Four labeled images (classes 0+1, 1+2, 2+0, 3 alone), six unlabeled, two to validate."""
    bands = [(0, 1), (1, 2), (2, 0), (3, 3)]
    for index, values in enumerate(bands):
        write_image(root / f"images/l{index}.png", seed=index)
        write_grey(root / f"labels/l{index}.png", halves(*values))
    for index in range(6):
        write_image(root / f"images/u{index}.png", seed=10 + index)
    for index in range(2):
        write_image(root / f"images/v{index}.png", seed=20 + index)
        write_grey(root / f"labels/v{index}.png", halves(0, 3))
    write_lines(root / "splits/labeled.txt", *(f"images/l{i}.png labels/l{i}.png" for i in range(4)))
    write_lines(root / "splits/unlabeled.txt", *(f"images/u{i}.png" for i in range(6)))
    write_lines(root / "splits/val.txt", *(f"images/v{i}.png labels/v{i}.png" for i in range(2)))
    return load_split(TINY, root, root / "splits")


def pseudo_labels(folder: Path, items: tuple[Item, ...]) -> Path:
    for index, item in enumerate(items):
        values = [(0, 1), (1, 1), (2, 2), (3, 3), (255, 255), (0, 2)][index % 6]
        save_label(TINY, pseudo_path(folder, item.name), halves(*values))
    return folder
