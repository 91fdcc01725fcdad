"""Class -> guides: which labeled images show which class, and what a query and its guide have in common."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cisc_ext.data.datasets import LABEL_VALUES, DatasetSpec, Item, UInt8Array, read_label
from cisc_ext.files import write_json

Int64Array: TypeAlias = npt.NDArray[np.int64]
Float64Array: TypeAlias = npt.NDArray[np.float64]

THRESHOLD = 0.03  # share of an image's or crop's pixels from which a class counts as shown
NO_CLASS = -1


@dataclass(frozen=True, eq=False)
class ClassIndex:
    """Which image of a list shows which class, in at least `threshold` of all its pixels.

    `fractions` [images, classes] is the share of each image's pixels; the background counts there, but is
    shown by no image.
    """

    fractions: Float64Array
    threshold: float
    background: int | None
    _by_image: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    _by_class: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shown = self.fractions >= self.threshold
        if self.background is not None:
            shown[:, self.background] = False
        by_image = tuple(tuple(np.flatnonzero(row).tolist()) for row in shown)
        by_class = tuple(tuple(np.flatnonzero(column).tolist()) for column in shown.T)
        object.__setattr__(self, "_by_image", by_image)
        object.__setattr__(self, "_by_class", by_class)

    def __len__(self) -> int:
        return len(self.fractions)

    def classes_of(self, image: int) -> tuple[int, ...]:
        """Classes that an image shows, ascending."""
        return self._by_image[image]

    def images_of(self, label: int) -> tuple[int, ...]:
        """Images that show a class, ascending."""
        return self._by_class[label]

    def guides_for(self, image: int) -> tuple[int, ...]:
        """The other images that show at least one class of this one, ascending."""
        guides = {guide for label in self.classes_of(image) for guide in self.images_of(label)}
        return tuple(sorted(guides - {image}))

    def pools(self) -> dict[int, tuple[int, ...]]:
        """Class -> images that show it, for every class that is shown at all."""
        every = {label: self.images_of(label) for label in range(self.fractions.shape[1])}
        return {label: images for label, images in every.items() if images}


def build_class_index(
    spec: DatasetSpec,
    items: Sequence[Item],
    *,
    threshold: float = THRESHOLD,
    workers: int = 0,
    cache: bool = True,
) -> ClassIndex:
    """Read the labels of `items` and note which classes each shows.

    `workers` threads decode (0: one per core). The pixel counts are kept in `$XDG_CACHE_HOME/cisc_ext` (or
    `~/.cache/cisc_ext`) under a hash of the spec and of each label's path, size and modification time, so a
    changed file is read again; a cache file that cannot be used is rebuilt with a warning.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share in (0, 1], got {threshold}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    labels = [_label_of(item) for item in items]
    path = cache_path(spec, labels) if cache else None
    counts = None if path is None else _read_cache(path, len(labels), spec.num_classes)
    if counts is None:
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            rows = list(pool.map(lambda label: _count(spec, label), labels))
        counts = np.array(rows, np.int64).reshape(len(labels), spec.num_classes + 1)
        if path is not None:
            _write_cache(path, counts)
    return ClassIndex(counts[:, :-1] / counts.sum(1, keepdims=True), threshold, spec.background)


def cache_path(spec: DatasetSpec, labels: Iterable[Path]) -> Path:
    """The cache file of these label files in their present state."""
    files = [(str(label.resolve()), (stat := label.stat()).st_size, stat.st_mtime_ns) for label in labels]
    ids = None if spec.label_map is None else sorted(spec.label_map.items())
    key = json.dumps([spec.name, spec.num_classes, spec.ignore_index, ids, spec.mapped_suffix, files])
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(home) / "cisc_ext" / f"class_index_{spec.name}_{digest}.json"


def _label_of(item: Item) -> Path:
    if item.label is None:
        raise ValueError(f"{item.image}: expected a labeled image, got one without label")
    return item.label


def _count(spec: DatasetSpec, path: Path) -> list[int]:
    """Pixels of each class, and last those that are ignored."""
    histogram = np.bincount(read_label(spec, path).ravel(), minlength=LABEL_VALUES)
    return [*histogram[: spec.num_classes].tolist(), int(histogram[spec.ignore_index])]


def _read_cache(path: Path, images: int, classes: int) -> Int64Array | None:
    if not path.is_file():
        return None
    try:
        counts = np.array(json.loads(path.read_text())["counts"])
        if counts.dtype != np.int64 or counts.shape != (images, classes + 1) or counts.min(initial=0) < 0:
            raise ValueError(
                f"expected counts [{images},{classes + 1}], got {counts.dtype} {list(counts.shape)}"
            )
        if not counts.sum(1).all():
            raise ValueError("an image without pixels")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path}: class index cannot be used and is rebuilt ({error})", stacklevel=3)
        return None
    return counts


def _write_cache(path: Path, counts: Int64Array) -> None:
    try:
        write_json(path, {"counts": counts.tolist()})
    except OSError as error:
        warnings.warn(f"{path}: class index is not cached ({error.strerror})", stacklevel=3)


def choose_guide(
    rng: np.random.Generator,
    classes: Iterable[int],
    pools: Mapping[int, Sequence[int]],
    exclude: int | None = None,
) -> int | None:
    """A random image from the pool of a random one of `classes`, never `exclude`; None if there is none."""
    for label in rng.permutation(list(classes)).tolist():
        candidates = [image for image in pools.get(label, ()) if image != exclude]
        if candidates:
            return candidates[int(rng.integers(len(candidates)))]
    return None


def shown_classes(spec: DatasetSpec, labels: UInt8Array, threshold: float = THRESHOLD) -> list[int]:
    """Classes that cover at least `threshold` of all pixels of `labels` [H,W], background left out."""
    counts = np.bincount(labels.ravel(), minlength=LABEL_VALUES)[: spec.num_classes]
    shown = np.flatnonzero(counts / labels.size >= threshold).tolist()
    return [label for label in shown if label != spec.background]


def shared_classes(
    labels_a: UInt8Array, labels_b: UInt8Array, spec: DatasetSpec, threshold: float = THRESHOLD
) -> Int64Array:
    """Every class that both crops [H,W] show, ascending, then -1, [num_classes]."""
    shown = set(shown_classes(spec, labels_b, threshold))
    both = [label for label in shown_classes(spec, labels_a, threshold) if label in shown]
    return np.array(both + [NO_CLASS] * (spec.num_classes - len(both)), np.int64)


def shared_class(
    rng: np.random.Generator,
    labels_a: UInt8Array,
    labels_b: UInt8Array,
    spec: DatasetSpec,
    threshold: float = THRESHOLD,
) -> int:
    """A random class that both crops [H,W] show, -1 if none."""
    both = shared_classes(labels_a, labels_b, spec, threshold)
    both = both[both != NO_CLASS]
    return int(both[rng.integers(len(both))]) if len(both) else NO_CLASS
