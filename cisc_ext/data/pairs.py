"""Training and evaluation sets, and the loader that turns them into batches.

A training set is asked for `(epoch, index)` and answers with a batch of one. All of a sample's random draws
come from (seed, stream, epoch, index), so neither the number of workers nor a restart changes the data.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from cisc_ext.data.datasets import (
    DatasetSpec,
    Item,
    Size,
    UInt8Array,
    pseudo_path,
    read_image,
    read_label,
)
from cisc_ext.data.query import (
    NO_CLASS,
    THRESHOLD,
    ClassIndex,
    Int64Array,
    choose_guide,
    shared_class,
    shared_classes,
    shown_classes,
)
from cisc_ext.data.transforms import Augment, Strong, sample_rng, to_tensor

SharedClasses: TypeAlias = Literal["one", "all", "own"]
Key: TypeAlias = tuple[int, int]  # epoch, index
Crop: TypeAlias = tuple[UInt8Array, UInt8Array]  # image [H,W,3], labels [H,W]

CACHE_MIB = 256  # a set whose decoded images take more is decoded anew each time
PAIR_TRIES = 5


class _Tensors:
    """What every batch can do; its fields are tensors or None."""

    def to(
        self: AnyBatch,
        device: torch.device | str,
        *,
        memory_format: torch.memory_format | None = None,
        non_blocking: bool = False,
    ) -> AnyBatch:
        """The batch on `device`, its images in `memory_format`."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if memory_format is None or tensor.ndim != 4:
                return tensor.to(device, non_blocking=non_blocking)
            return tensor.to(device, non_blocking=non_blocking, memory_format=memory_format)

        return type(self)(**{name: None if t is None else move(t) for name, t in vars(self).items()})

    def pin_memory(self: AnyBatch) -> AnyBatch:
        """The batch in page-locked memory."""
        return type(self)(**{name: None if t is None else t.pin_memory() for name, t in vars(self).items()})


AnyBatch = TypeVar("AnyBatch", bound=_Tensors)


@dataclass(frozen=True, eq=False)
class Batch(_Tensors):
    """Images and their labels."""

    image: torch.Tensor  # [B,3,H,W] float32, normalised
    labels: torch.Tensor  # [B,H,W] uint8


@dataclass(frozen=True, eq=False)
class PairBatch(_Tensors):
    """Query images, each with its guide and the classes in which the two are compared."""

    image: torch.Tensor  # [B,3,H,W] float32, normalised; the student's view
    labels: torch.Tensor  # [B,H,W] uint8
    guide_image: torch.Tensor  # [B,3,H,W] float32, normalised
    guide_labels: torch.Tensor  # [B,H,W] uint8
    classes: torch.Tensor | None  # [B,S] int64, -1 = none; None: each pixel against its own label
    weak_image: torch.Tensor | None = None  # [B,3,H,W] float32, `image` before strong augmentation


class EvalSample(NamedTuple):
    """One whole image."""

    image: torch.Tensor  # [3,H,W] float32, normalised
    labels: torch.Tensor | None  # [H,W] uint8
    name: str


class _Reader:
    """Reads images and labels; keeps them decoded where all of `items` together fit into `cache_mib`."""

    def __init__(
        self, spec: DatasetSpec, items: Sequence[Item], load_size: Size | None, cache_mib: float
    ) -> None:
        if load_size is not None and (len(load_size) != 2 or min(load_size) < 1):
            raise ValueError(f"load_size: expected (width, height) in pixels, got {load_size}")
        self.spec, self.load_size = spec, load_size
        self.kept: dict[Path, UInt8Array] | None = None
        if items and cache_mib > 0:
            width, height = load_size or _image_size(items[0].image)
            if len(items) * width * height * 4 <= cache_mib * 2**20:
                self.kept = {}

    def image(self, item: Item) -> UInt8Array:
        """uint8 [H,W,3]."""
        pixels = self._get(item.image)
        return self._keep(item.image, read_image(item.image, self.load_size)) if pixels is None else pixels

    def labeled(self, item: Item) -> Crop:
        """Image and its label, of one size."""
        if item.label is None:
            raise ValueError(f"{item.image}: expected a labeled image, got one without label")
        labels = self._get(item.label)
        if labels is None:
            labels = self._keep(item.label, read_label(self.spec, item.label, self.load_size))
        return self._matched(item.label, self.image(item), labels)

    def pseudo_labeled(self, item: Item, path: Path) -> Crop:
        """Image and its pseudo label, which is stored at the size at which images are read."""
        labels = self._get(path)
        if labels is None:
            labels = self._keep(path, read_label(self.spec, path))
        return self._matched(path, self.image(item), labels)

    def _matched(self, path: Path, image: UInt8Array, labels: UInt8Array) -> Crop:
        if image.shape[:2] != labels.shape:
            (height, width), got = image.shape[:2], labels.shape
            raise ValueError(f"{path}: expected {width} x {height} pixels, got {got[1]} x {got[0]}")
        return image, labels

    def _get(self, path: Path) -> UInt8Array | None:
        return None if self.kept is None else self.kept.get(path)

    def _keep(self, path: Path, pixels: UInt8Array) -> UInt8Array:
        if self.kept is not None:
            self.kept[path] = pixels
        return pixels


def _image_size(path: Path) -> Size:
    with Image.open(path) as image:
        return image.size


class TrainingSet(Dataset[AnyBatch], Generic[AnyBatch], ABC):
    """A set of `len()` samples, keyed by (epoch, index); each is a batch of one."""

    def __init__(self, items: Sequence[Item], seed: int, stream: str) -> None:
        if not items:
            raise ValueError(f"{stream}: expected at least one image, got none")
        self.items, self.seed, self.stream = tuple(items), seed, stream

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> AnyBatch:
        epoch, index = key
        return self.sample(sample_rng(self.seed, self.stream, epoch, index), index)

    @abstractmethod
    def sample(self, rng: np.random.Generator, index: int) -> AnyBatch:
        """The sample of one item, with all random draws from `rng`."""


class LabeledSet(TrainingSet[Batch]):
    """Labeled images, weakly augmented."""

    def __init__(
        self,
        spec: DatasetSpec,
        items: Sequence[Item],
        augment: Augment,
        *,
        seed: int,
        stream: str = "labeled",
        load_size: Size | None = None,
        cache_mib: float = CACHE_MIB,
    ) -> None:
        super().__init__(items, seed, stream)
        self.augment = augment
        self.reader = _Reader(spec, items, load_size, cache_mib)

    def sample(self, rng: np.random.Generator, index: int) -> Batch:
        """One labeled crop."""
        image, labels = self.augment(rng, *self.reader.labeled(self.items[index]))
        return Batch(_image(image), _labels(labels))


class LabeledPairs(TrainingSet[PairBatch]):
    """Stage 1: each labeled image with a random other one that shows a class of the first one's crop.

    `index` belongs to `items`. Where no class can be shared, the guide is any other image. Without
    a common class the class is -1.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        items: Sequence[Item],
        index: ClassIndex,
        augment: Augment,
        *,
        seed: int,
        shared_classes: SharedClasses = "one",
        stream: str = "labeled pairs",
        load_size: Size | None = None,
        cache_mib: float = CACHE_MIB,
    ) -> None:
        super().__init__(items, seed, stream)
        if len(items) < 2:
            raise ValueError(f"{stream}: expected at least two labeled images, got {len(items)}")
        if len(index) != len(items):
            raise ValueError(f"index: expected one of {len(items)} images, got one of {len(index)}")
        reader = _Reader(spec, items, load_size, cache_mib)
        self.finder = _GuideFinder(
            spec, self.items, index.pools(), augment, reader, shared_classes, index.threshold
        )

    def sample(self, rng: np.random.Generator, index: int) -> PairBatch:
        """One pair of labeled crops."""
        pixels = self.finder.reader.labeled(self.items[index])
        (image, labels), (guide, guide_labels) = self.finder.pair(rng, pixels, exclude=index)
        classes = self.finder.classes(rng, labels, guide_labels)
        return PairBatch(_image(image), _labels(labels), _image(guide), _labels(guide_labels), classes)


class GuidedUnlabeled(TrainingSet[PairBatch]):
    """Stages 4 and 6: pseudo-labeled images, strongly augmented, each with a guide from the pools.

    `pools` holds, for each class, positions in `labeled_items`. The guide is drawn from the pools of the
    classes that cover `threshold` of the query's crop, in a few tries until both crops show a class; if there
    is no such guide, it is any labeled image. Without a common class the class is -1. Strong augmentation is
    on `image` only; with `weak_view` the same crop without it is there too.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        unlabeled_items: Sequence[Item],
        pseudo_dir: Path | str,
        labeled_items: Sequence[Item],
        pools: Mapping[int, Sequence[int]],
        augment: Augment,
        strong: Strong | None,
        *,
        seed: int,
        shared_classes: SharedClasses = "one",
        weak_view: bool = False,
        threshold: float = THRESHOLD,
        stream: str = "unlabeled",
        load_size: Size | None = None,
        cache_mib: float = CACHE_MIB,
    ) -> None:
        super().__init__(unlabeled_items, seed, stream)
        if not labeled_items:
            raise ValueError("labeled_items: expected at least one guide, got none")
        self.pseudo = _pseudo_paths(unlabeled_items, pseudo_dir)
        self.strong, self.weak_view = strong, weak_view
        reader = _Reader(spec, (*unlabeled_items, *labeled_items), load_size, cache_mib)
        self.finder = _GuideFinder(
            spec, tuple(labeled_items), pools, augment, reader, shared_classes, threshold
        )

    def sample(self, rng: np.random.Generator, index: int) -> PairBatch:
        """One pseudo-labeled crop and its guide."""
        pixels = self.finder.reader.pseudo_labeled(self.items[index], self.pseudo[index])
        (weak, labels), (guide, guide_labels) = self.finder.pair(rng, pixels)
        image = weak
        if self.strong is not None:
            image, labels = self.strong(rng, weak, labels)
        return PairBatch(
            _image(image),
            _labels(labels),
            _image(guide),
            _labels(guide_labels),
            self.finder.classes(rng, labels, guide_labels),
            _image(weak) if self.weak_view else None,
        )


class PseudoLabeled(TrainingSet[Batch]):
    """Pseudo-labeled images, strongly augmented, without guides."""

    def __init__(
        self,
        spec: DatasetSpec,
        items: Sequence[Item],
        pseudo_dir: Path | str,
        augment: Augment,
        strong: Strong | None,
        *,
        seed: int,
        stream: str = "unlabeled",
        load_size: Size | None = None,
        cache_mib: float = CACHE_MIB,
    ) -> None:
        super().__init__(items, seed, stream)
        self.pseudo = _pseudo_paths(items, pseudo_dir)
        self.augment, self.strong = augment, strong
        self.reader = _Reader(spec, items, load_size, cache_mib)

    def sample(self, rng: np.random.Generator, index: int) -> Batch:
        """One pseudo-labeled crop."""
        pixels = self.reader.pseudo_labeled(self.items[index], self.pseudo[index])
        image, labels = self.augment(rng, *pixels)
        if self.strong is not None:
            image, labels = self.strong(rng, image, labels)
        return Batch(_image(image), _labels(labels))


class EvalSet(Dataset[EvalSample]):
    """Whole images, not augmented, with their labels where there are any."""

    def __init__(
        self,
        spec: DatasetSpec,
        items: Sequence[Item],
        *,
        load_size: Size | None = None,
        cache_mib: float = CACHE_MIB,
    ) -> None:
        self.items = tuple(items)
        self.reader = _Reader(spec, items, load_size, cache_mib)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> EvalSample:
        item = self.items[index]
        if item.label is None:
            return EvalSample(to_tensor(self.reader.image(item)), None, item.name)
        image, labels = self.reader.labeled(item)
        return EvalSample(to_tensor(image), torch.from_numpy(labels.copy()), item.name)


class _GuideFinder:
    """Crops a query image and a guide that shares a class with it."""

    def __init__(
        self,
        spec: DatasetSpec,
        guides: tuple[Item, ...],
        pools: Mapping[int, Sequence[int]],
        augment: Augment,
        reader: _Reader,
        mode: SharedClasses,
        threshold: float,
    ) -> None:
        if mode not in get_args(SharedClasses):
            raise ValueError(f"shared_classes: expected one of {get_args(SharedClasses)}, got {mode!r}")
        for label, pool in pools.items():
            if not 0 <= label < spec.num_classes:
                raise ValueError(f"pools: expected classes 0 to {spec.num_classes - 1}, got {label}")
            if any(not 0 <= guide < len(guides) for guide in pool):
                raise ValueError(f"pools: class {label} names an image outside 0 to {len(guides) - 1}")
        self.spec, self.guides, self.pools, self.augment = spec, guides, pools, augment
        self.reader, self.mode, self.threshold = reader, mode, threshold

    def pair(self, rng: np.random.Generator, pixels: Crop, exclude: int | None = None) -> tuple[Crop, Crop]:
        """Crop of the query and of a guide other than `exclude`, sharing a class if a few tries find one."""
        query, classes = self._crop(rng, pixels)
        guide = None
        for _ in range(PAIR_TRIES):
            chosen = choose_guide(rng, classes, self.pools, exclude)
            if chosen is None:
                query, classes = self._crop(rng, pixels)
                continue
            guide = self.augment(rng, *self.reader.labeled(self.guides[chosen]))
            if self._all_shared(query[1], guide[1])[0] != NO_CLASS:
                return query, guide
        if guide is None:
            others = [index for index in range(len(self.guides)) if index != exclude]
            chosen = others[int(rng.integers(len(others)))]
            guide = self.augment(rng, *self.reader.labeled(self.guides[chosen]))
        return query, guide

    def _crop(self, rng: np.random.Generator, pixels: Crop) -> tuple[Crop, list[int]]:
        crop = self.augment(rng, *pixels)
        return crop, shown_classes(self.spec, crop[1], self.threshold)

    def classes(
        self, rng: np.random.Generator, labels: UInt8Array, guide_labels: UInt8Array
    ) -> torch.Tensor | None:
        """The classes to compare, [1,S] int64: one at random, all, or None in own-label mode."""
        if self.mode == "own":
            return None
        if self.mode == "all":
            return torch.from_numpy(self._all_shared(labels, guide_labels)).unsqueeze(0)
        return torch.tensor([[shared_class(rng, labels, guide_labels, self.spec, self.threshold)]])

    def _all_shared(self, labels: UInt8Array, guide_labels: UInt8Array) -> Int64Array:
        return shared_classes(labels, guide_labels, self.spec, self.threshold)


def _pseudo_paths(items: Sequence[Item], folder: Path | str) -> list[Path]:
    paths = [pseudo_path(folder, item.name) for item in items]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such pseudo label")
    return paths


def _image(pixels: UInt8Array) -> torch.Tensor:
    return to_tensor(pixels).unsqueeze(0)


def _labels(labels: UInt8Array) -> torch.Tensor:
    return torch.from_numpy(labels).unsqueeze(0)


def merge(batches: Sequence[AnyBatch]) -> AnyBatch:
    """Batches of the same kind, one after the other, as one."""
    first = batches[0]
    merged = {}
    for name in (field.name for field in dataclasses.fields(first)):  # type: ignore[arg-type]
        parts = [getattr(batch, name) for batch in batches]
        merged[name] = None if parts[0] is None else torch.cat(parts)
    return type(first)(**merged)


class _Positions(Sampler[list[Key]]):
    """Keys of each step's batch: position p of all is place p mod n of shuffled epoch p // n."""

    def __init__(
        self, length: int, batch_size: int, steps: range, seed: int, rank: int, world_size: int
    ) -> None:
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Key]]:
        orders: dict[int, list[int]] = {}
        for step in self.steps:
            first = (step * self.world_size + self.rank) * self.batch_size
            places = [divmod(position, self.length) for position in range(first, first + self.batch_size)]
            epochs = {epoch for epoch, _ in places}
            orders = {epoch: orders.get(epoch) or self._order(epoch) for epoch in epochs}
            yield [(epoch, orders[epoch][place]) for epoch, place in places]

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = sample_rng(self.seed, "order", epoch, 0).permutation(self.length).tolist()
        return order


def loader(
    dataset: TrainingSet[AnyBatch],
    batch_size: int,
    steps: int,
    *,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[AnyBatch]:
    """The batches of steps `first_step` to `steps` - 1: shuffled epochs without end, cut into batches.

    A set smaller than a batch is repeated to fill it, shuffled anew each time. The batch of a step depends on
    `seed`, `batch_size` and `world_size` alone: not on `workers`, not on where one starts. `batch_size` is
    that of one process; together the processes get consecutive batches.
    """
    if batch_size < 1 or steps < 0 or first_step < 0 or workers < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"loader: expected batch_size >= 1, steps, first_step, workers >= 0, 0 <= rank < world_size, got "
            f"{batch_size}, {steps}, {first_step}, {workers}, {rank}, {world_size}"
        )
    positions = _Positions(len(dataset), batch_size, range(first_step, steps), seed, rank, world_size)
    batches: DataLoader[AnyBatch] = DataLoader(
        dataset,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=merge,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
    return iter(batches)


def eval_loader(
    dataset: EvalSet, *, indices: Sequence[int] | None = None, workers: int = 0
) -> Iterator[EvalSample]:
    """The samples at `indices` (default: all) one by one in order, decoded ahead by `workers` processes."""
    samples: DataLoader[EvalSample] = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(len(dataset)) if indices is None else list(indices),
        num_workers=workers,
        generator=torch.Generator(),
    )
    return iter(samples)
