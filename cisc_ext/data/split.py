"""Partitions of a data set into labeled and unlabeled images: `python -m cisc_ext split`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from cisc_ext.data.datasets import DATASETS, DatasetSpec, Item, list_text, varying_part, write_list
from cisc_ext.data.query import build_class_index
from cisc_ext.data.transforms import sample_rng


def find_items(
    spec: DatasetSpec,
    data_root: Path | str,
    *,
    part: str = "train",
    listed: Path | str | None = None,
) -> list[Item]:
    """The images of `part` ("train" or "val") in order of name, each with its mask where there is one.

    `listed` names a file with one image per line: its path, or the part of it that varies; later fields are
    not looked at. Default: the data set's own list, else every file that fits its template. A data set
    without validation images gives none.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"data root {root}: no such folder")
    images, labels, own_list = (
        (spec.train_images, spec.train_labels, spec.train_list)
        if part == "train"
        else (spec.val_images, spec.val_labels, spec.val_list)
    )
    if images is None:
        return []
    if listed is not None:
        stems = _listed_stems(Path(listed), images)
    elif own_list is not None and (root / own_list).is_file():
        stems = _listed_stems(root / own_list, images)
    elif own_list is not None:
        raise FileNotFoundError(f"{root / own_list}: no such list")
    else:
        stems = _found_stems(root, images)
    items = []
    for stem in sorted(stems):
        name = images.format(stem)
        if not (root / name).is_file():
            raise FileNotFoundError(f"{root / name}: no such image")
        masks = (root / template.format(stem) for template in labels)
        items.append(Item(root / name, next((mask for mask in masks if mask.is_file()), None), name))
    return items


def _listed_stems(path: Path, template: str) -> set[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list")
    names = [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return {varying_part(template, name) or name for name in names}


def _found_stems(root: Path, template: str) -> set[str]:
    folder = root / template.split("{}")[0].rpartition("/")[0]
    suffix = Path(template).suffix
    names = (path.relative_to(root).as_posix() for path in folder.rglob(f"*{suffix}") if path.is_file())
    return {stem for name in names if (stem := varying_part(template, name)) is not None}


def split_order(spec: DatasetSpec, items: Sequence[Item], *, seed: int, workers: int = 0) -> list[int]:
    """Positions of the masked `items`, of which the first n are the labeled images of a split of n.

    A seeded shuffle, but in front those images that bring classes not shown yet: at each step the one that
    brings most, first counting classes that cover 3 % of an image, then any that occur at all.
    """
    masked = [index for index, item in enumerate(items) if item.label is not None]
    rest = [masked[place] for place in sample_rng(seed, "split", 0, 0).permutation(len(masked)).tolist()]
    index = build_class_index(
        replace(spec, background=None), [items[place] for place in masked], workers=workers
    )
    fractions = dict(zip(masked, index.fractions, strict=True))
    order: list[int] = []
    for least in (index.threshold, np.finfo(np.float64).tiny):
        shows = {place: row >= least for place, row in fractions.items()}
        missing = np.ones(spec.num_classes, bool)
        for place in order:
            missing &= ~shows[place]
        while rest:
            gains = [int((shows[place] & missing).sum()) for place in rest]
            if not max(gains):
                break
            best = rest.pop(int(np.argmax(gains)))
            missing &= ~shows[best]
            order.append(best)
    return order + rest


def make_split(
    spec: DatasetSpec,
    data_root: Path | str,
    out: Path | str,
    *,
    number: int | None = None,
    fraction: Fraction | float | None = None,
    seed: int = 0,
    listed: Path | str | None = None,
    workers: int = 0,
    force: bool = False,
) -> tuple[int, int, int]:
    """Write `labeled.txt`, `unlabeled.txt` and, where the data set has one, `val.txt` into the folder `out`.

    Exactly one of `number` (of labeled images) and `fraction` (of all) says how many are labeled; with one
    seed, a smaller split is part of a larger one, and every class is among the labeled images as soon as so
    few can show all. Unlabeled images get no mask path. Gives the three numbers of lines. `FileExistsError`
    if a list is there and differs, unless `force`; then nothing is written.
    """
    if (number is None) == (fraction is None):
        raise ValueError("split: expected exactly one of number and fraction")
    items = find_items(spec, data_root, listed=listed)
    if not items:
        raise ValueError(f"{data_root}: no image of {spec.name} fits {spec.train_images}")
    masked = sum(item.label is not None for item in items)
    wanted = number if number is not None else max(1, round(len(items) * Fraction(fraction or 0)))
    if not 1 <= wanted <= masked:
        raise ValueError(f"split: expected 1 to {masked} labeled images (those with a mask), got {wanted}")
    if wanted == len(items):
        raise ValueError(f"split: expected fewer labeled images than there are, {len(items)}: none is left")

    chosen = split_order(spec, items, seed=seed, workers=workers)[:wanted]
    labeled = set(chosen)
    validation = find_items(spec, data_root, part="val") if _has_validation(spec, Path(data_root)) else []
    lists = {
        "labeled.txt": [items[place] for place in chosen],
        "unlabeled.txt": [
            replace(item, label=None) for place, item in enumerate(items) if place not in labeled
        ],
        "val.txt": [item for item in validation if item.label is not None],
    }
    paths = {Path(out) / name: members for name, members in lists.items() if members}
    for path, members in paths.items():
        if path.is_file() and path.read_text() != list_text(members, data_root) and not force:
            raise FileExistsError(f"{path}: a different list is there already, and is kept unless forced")
    for path, members in paths.items():
        write_list(path, members, data_root)
    return wanted, len(items) - wanted, len(lists["val.txt"])


def _has_validation(spec: DatasetSpec, root: Path) -> bool:
    return spec.val_list is None or (root / spec.val_list).is_file()


def _fraction(text: str) -> Fraction:
    value = Fraction(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `main` to `parser`."""
    parser.add_argument("dataset", choices=sorted(DATASETS), help="data set")
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the lists")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--number", type=int, metavar="N", help="labeled images")
    amount.add_argument(
        "--fraction", type=_fraction, metavar="F", help="labeled share of all, as 1/8 or 0.125"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the shuffle (default: 0)")
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        dest="listed",
        help="images to partition, one per line (default: the data set's training images)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="threads that read masks (default: 0, one per core)",
    )
    parser.add_argument("--force", action="store_true", help="replace lists that are there and differ")


def main(args: argparse.Namespace) -> int:
    """Make the split that the arguments of `add_arguments` ask for, and say what was written."""
    labeled, unlabeled, validation = make_split(
        DATASETS[args.dataset],
        args.data_root,
        args.out,
        number=args.number,
        fraction=args.fraction,
        seed=args.seed,
        listed=args.listed,
        workers=args.workers,
        force=args.force,
    )
    print(f"{args.out}: {labeled} labeled, {unlabeled} unlabeled, {validation} validation images")
    return 0
