"""Data sets, split lists, class index, augmentation, demo data, partitions."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from datacases import (
    CAMVID,
    CITYSCAPES,
    DEMO,
    PASCAL,
    TINY,
    halves,
    tiny,
    write_grey,
    write_image,
    write_lines,
)
from PIL import Image

from cisc_ext.data import query, split, synthetic, transforms
from cisc_ext.data.datasets import (
    DATASETS,
    DatasetSpec,
    Item,
    UInt8Array,
    load_split,
    read_image,
    read_label,
    save_label,
    voc_palette,
)
from cisc_ext.data.transforms import Augment, Strong, sample_rng


def test_specs_hold_the_published_numbers() -> None:
    sizes = {name: (s.num_classes, s.crop_size, s.base_size, s.background) for name, s in DATASETS.items()}
    assert sizes == {
        "pascal": (21, 321, 400, 0),
        "cityscapes": (19, 721, 2048, None),
        "coco": (81, 513, 512, 0),
        "camvid": (11, 321, 480, None),
        "demo": (6, 65, 96, 0),
    }
    assert PASCAL.palette[15] == (192, 128, 128) and PASCAL.palette[20] == (0, 64, 128)
    assert CITYSCAPES.palette[13] == (0, 0, 142) and CITYSCAPES.classes[13] == "car"
    assert all(len(set(spec.classes)) == spec.num_classes for spec in DATASETS.values())
    with pytest.raises(ValueError, match="one colour per class, got 4 classes and 3 colours"):
        replace(TINY, palette=voc_palette(3))
    with pytest.raises(ValueError, match="ignore_index 2 is the number of a class"):
        replace(TINY, ignore_index=2)


@pytest.mark.parametrize("name", DATASETS)
def test_each_data_set_loads_from_its_own_paths(name: str, tmp_path: Path) -> None:
    spec = DATASETS[name]
    last = spec.num_classes - 1
    lines: dict[str, list[str]] = {"labeled": [], "unlabeled": [], "val": []}
    for index, part in enumerate(("labeled", "labeled", "unlabeled", "val")):
        stem = f"town/{part}{index}" if name == "cityscapes" else f"{part}{index}"
        images, labels = spec.train_images, spec.train_labels[0]
        if part == "val" and spec.val_images is not None:
            images, labels = spec.val_images, spec.val_labels[0]
        write_image(tmp_path / images.format(stem), seed=index)
        label_path = labels.format(stem)
        if part == "unlabeled":
            label_path = "nowhere/" + label_path
        else:
            save_label(spec, tmp_path / label_path, halves(0, last, 255))
        lines[part].append(f"{images.format(stem)} {label_path}")
    for part, members in lines.items():
        write_lines(tmp_path / f"{part}.txt", *members)
    found = load_split(spec, tmp_path, tmp_path)
    assert [len(items) for items in (found.labeled, found.unlabeled, found.val)] == [2, 1, 1]
    assert found.unlabeled[0].label is None and found.unlabeled[0].name == lines["unlabeled"][0].split()[0]
    assert found.labeled[0].label is not None
    assert np.array_equal(read_label(spec, found.labeled[0].label), halves(0, last, 255))
    assert query.build_class_index(spec, found.labeled).classes_of(0) == (
        (last,) if spec.background == 0 else (0, last)
    )


def test_cityscapes_official_ids_are_mapped_and_found_in_place_of_train_ids(tmp_path: Path) -> None:
    official = np.array(
        [[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 0, 29, 255]]
    )
    train = np.array([[*range(19), 255, 255, 255]])
    for index in range(3):
        write_image(tmp_path / f"leftImg8bit/train/x/x{index}_leftImg8bit.png", size=(22, 1))
    write_grey(tmp_path / "gtFine/train/x/x0_gtFine_labelIds.png", official.astype(np.uint8))
    write_grey(tmp_path / "gtFine/train/x/x1_gtFine_labelTrainIds.png", train.astype(np.uint8))
    line = "leftImg8bit/train/x/x{0}_leftImg8bit.png gtFine/train/x/x{0}_gtFine_labelTrainIds.png"
    write_lines(tmp_path / "labeled.txt", line.format(0))
    write_lines(tmp_path / "unlabeled.txt", line.format(2))
    write_lines(tmp_path / "val.txt", line.format(1))
    found = load_split(CITYSCAPES, tmp_path, tmp_path)
    for item in (*found.labeled, *found.val):
        assert item.label is not None
        assert np.array_equal(read_label(CITYSCAPES, item.label), train)
    assert found.labeled[0].label is not None and found.labeled[0].label.name == "x0_gtFine_labelIds.png"
    unknown = write_grey(tmp_path / "gtFine/y_gtFine_labelIds.png", np.full((2, 2), 77, np.uint8))
    with pytest.raises(ValueError, match=r"y_gtFine_labelIds\.png: expected labels of cityscapes.*got 77"):
        read_label(CITYSCAPES, unknown)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_val_list_is_found_up_to_two_folders_above(tmp_path: Path, levels: int) -> None:
    tiny(tmp_path)
    deep = tmp_path / "a/b/c/d"
    deep.mkdir(parents=True)
    for name in ("labeled.txt", "unlabeled.txt"):
        (deep / name).write_text((tmp_path / "splits" / name).read_text())
    text = (tmp_path / "splits/val.txt").read_text()
    (deep, *deep.parents)[levels].joinpath("val.txt").write_text(text)
    if levels == 3:
        with pytest.raises(FileNotFoundError, match=r"no val\.txt there or up to 2 folders above"):
            load_split(TINY, tmp_path, deep)
    else:
        assert len(load_split(TINY, tmp_path, deep).val) == 2
    assert len(load_split(TINY, tmp_path, deep, val=tmp_path / "splits/val.txt").val) == 2


def test_lists_may_have_blank_lines_a_mark_and_dots(tmp_path: Path) -> None:
    tiny(tmp_path)
    text = "\ufeff\n  ./images/u0.png   never/there.png \r\n\nimages/u1.png\n"
    (tmp_path / "splits/unlabeled.txt").write_text(text, encoding="utf-8", newline="")
    found = load_split(TINY, tmp_path, tmp_path / "splits")
    assert [item.name for item in found.unlabeled] == ["images/u0.png", "images/u1.png"]
    assert found.unlabeled[0].image == tmp_path / "images/u0.png"


Spoil = Callable[[Path], object]
LABELED = "splits/labeled.txt"
SPOILED: dict[str, tuple[Spoil, str]] = {
    "missing list": (lambda r: (r / LABELED).unlink(), r"labeled\.txt: no such list"),
    "empty list": (lambda r: (r / LABELED).write_text("\n \n"), r"labeled\.txt: the list is empty"),
    "missing image": (lambda r: (r / "images/u3.png").unlink(), r"images/u3\.png: no such image"),
    "missing label": (lambda r: (r / "labels/l1.png").unlink(), r"labels/l1\.png: no such label"),
    "missing val label": (lambda r: (r / "labels/v1.png").unlink(), r"labels/v1\.png: no such label"),
    "three fields": (lambda r: write_lines(r / LABELED, "a b c"), r"labeled\.txt, line 1: .* got 3 fields"),
    "no label path": (
        lambda r: write_lines(r / LABELED, "", "images/l0.png"),
        r"labeled\.txt, line 2: .* got no label path for images/l0\.png",
    ),
    "duplicate": (
        lambda r: write_lines(r / LABELED, *["images/l0.png labels/l0.png"] * 2),
        r"labeled\.txt, line 2: images/l0\.png is listed already in line 1",
    ),
    "labeled and unlabeled": (
        lambda r: write_lines(r / "splits/unlabeled.txt", "images/u0.png", "images/l2.png"),
        r"unlabeled\.txt: images/l2\.png is also in .*splits/labeled\.txt",
    ),
    "train and val": (
        lambda r: write_lines(r / "splits/val.txt", "images/l2.png labels/l2.png"),
        r"val\.txt: images/l2\.png is also in .*labeled\.txt",
    ),
    "sizes differ": (
        lambda r: write_grey(r / "labels/l0.png", halves(0, 1, size=(20, 18))),
        r"labels/l0\.png: expected 24 x 18 pixels, the size of .*images/l0\.png, got 20 x 18",
    ),
    "not an image": (
        lambda r: (r / "images/u0.png").write_text("text"),
        r"images/u0\.png: not a readable image",
    ),
    "path escapes": (
        lambda r: write_lines(r / LABELED, "../images/l0.png labels/l0.png"),
        r"labeled\.txt, line 1: expected a path inside the data root, got \.\./images/l0\.png",
    ),
    "absolute path": (
        lambda r: write_lines(r / LABELED, "images/l0.png /labels/l0.png"),
        r"labeled\.txt, line 1: expected a path inside the data root, got /labels/l0\.png",
    ),
    "not text": (lambda r: (r / LABELED).write_bytes(b"\xff\xfe\x00"), r"labeled\.txt: not a text file"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_bad_input_ends_with_one_line(case: str, tmp_path: Path) -> None:
    tiny(tmp_path)
    spoil, message = SPOILED[case]
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_split(TINY, tmp_path, tmp_path / "splits")
    assert "\n" not in str(caught.value)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data root .*nowhere: no such folder"):
        load_split(TINY, tmp_path / "nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"split folder .*nowhere: no such folder"):
        load_split(TINY, tmp_path, tmp_path / "nowhere")


def test_labels_out_of_range_and_of_other_kinds_are_refused(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    bad = write_grey(tmp_path / "labels/l2.png", halves(0, 4))
    with pytest.raises(ValueError, match=r"l2\.png: expected labels of tiny, 0 to 3 or 255, got 4$"):
        read_label(TINY, bad)
    with pytest.raises(ValueError, match=r"l2\.png: expected labels"):
        query.build_class_index(TINY, found.labeled)
    colour = write_image(tmp_path / "colour.png")
    with pytest.raises(
        ValueError, match=r"colour\.png: expected a label image of 8 bits, palette or grey, got mode RGB"
    ):
        read_label(TINY, colour)
    cut = tmp_path / "cut.png"
    cut.write_bytes(colour.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.png: not a readable image \(OSError\)"):
        read_image(cut)


def test_labels_are_saved_as_palette_files_and_read_back(tmp_path: Path) -> None:
    labels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    labels[labels > 20] = 255
    path = tmp_path / "new/folder/a.png"
    save_label(PASCAL, path, labels)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]
    with Image.open(path) as image:
        assert image.mode == "P"
        assert tuple(np.asarray(image.convert("RGB"))[2, 3]) == PASCAL.palette[15]
    assert np.array_equal(read_label(PASCAL, path), labels)
    with pytest.raises(ValueError, match=r"labels: expected uint8 \[H,W\], got int64 \[4, 6\]"):
        save_label(PASCAL, path, labels.astype(np.int64))


def test_load_size_resizes_on_reading(tmp_path: Path) -> None:
    labels = halves(0, 1, 2, 255)
    path = write_grey(tmp_path / "a.png", labels)
    assert np.array_equal(read_label(TINY, path, (12, 9)), labels[1::2, 1::2])
    assert read_image(write_image(tmp_path / "b.png"), (12, 9)).shape == (9, 12, 3)
    grey = tmp_path / "grey.png"
    Image.fromarray(labels).save(grey)
    assert read_image(grey).shape == (18, 24, 3)


def test_class_index_counts_all_pixels_and_leaves_the_background_out(tmp_path: Path) -> None:
    labels = np.full((10, 10), 255, np.uint8)
    labels[0, :3], labels[1, :2], labels[2:6] = 1, 2, 0
    items = [Item(tmp_path, write_grey(tmp_path / "a.png", labels), "a")]
    items.append(Item(tmp_path, write_grey(tmp_path / "b.png", np.full((4, 4), 1, np.uint8)), "b"))
    index = query.build_class_index(TINY, items)
    assert index.classes_of(0) == (0, 1) and index.images_of(1) == (0, 1) and index.images_of(2) == ()
    assert index.guides_for(0) == (1,) and index.guides_for(1) == (0,)
    assert index.fractions[0].tolist() == [0.4, 0.03, 0.02, 0]
    assert index.pools() == {0: (0,), 1: (0, 1)}
    masked = query.build_class_index(replace(TINY, background=0), items, threshold=0.02)
    assert masked.classes_of(0) == (1, 2) and masked.fractions[0, 0] == 0.4
    with pytest.raises(ValueError, match="threshold"):
        query.build_class_index(TINY, items, threshold=0)
    with pytest.raises(ValueError, match="expected a labeled image"):
        query.build_class_index(TINY, [Item(tmp_path / "x.png", None, "x.png")])


def test_class_index_is_cached_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = tiny(tmp_path).labeled
    reads: list[Path] = []
    real = read_label

    def counted(spec: DatasetSpec, path: Path) -> UInt8Array:
        reads.append(path)
        return real(spec, path)

    monkeypatch.setattr(query, "read_label", counted)
    first = query.build_class_index(TINY, items, workers=2)
    assert len(reads) == 4
    again = query.build_class_index(TINY, items)
    assert len(reads) == 4 and np.array_equal(first.fractions, again.fractions)
    query.build_class_index(TINY, items, cache=False)
    assert len(reads) == 8

    label = items[3].label
    assert label is not None
    before = label.stat()
    write_grey(label, halves(2, 2))
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert query.build_class_index(TINY, items).classes_of(3) == (2,)
    assert len(reads) == 12
    assert len(query.build_class_index(replace(TINY, name="other"), items)) == 4 and len(reads) == 16


@pytest.mark.parametrize("content", ["{", "{}", '{"counts": [[1, 2]]}', '{"counts": [[0,0,0,0,0]]}', "[1]"])
def test_corrupt_class_index_is_rebuilt_with_a_warning(tmp_path: Path, content: str) -> None:
    items = tiny(tmp_path).labeled
    good = query.build_class_index(TINY, items)
    path = query.cache_path(TINY, [item.label for item in items if item.label is not None])
    assert path.is_file()
    path.write_text(content)
    with pytest.warns(UserWarning, match="cannot be used and is rebuilt"):
        rebuilt = query.build_class_index(TINY, items)
    assert np.array_equal(rebuilt.fractions, good.fractions)
    assert json.loads(path.read_text())["counts"][0] == [216, 216, 0, 0, 0]


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = tiny(tmp_path).labeled
    monkeypatch.setenv("XDG_CACHE_HOME", str(write_lines(tmp_path / "file", "not a folder")))
    with pytest.warns(UserWarning, match="class index is not cached"):
        assert len(query.build_class_index(TINY, items)) == 4


def test_choose_guide_never_gives_the_image_itself() -> None:
    pools = {0: (0, 1, 2), 1: (3,), 2: (), 3: (3, 4)}
    rng = np.random.default_rng(0)
    drawn = [query.choose_guide(rng, (0, 1, 2, 3, 9), pools, exclude=3) for _ in range(500)]
    assert set(drawn) == {0, 1, 2, 4}
    assert query.choose_guide(rng, (1, 2), pools, exclude=3) is None
    assert query.choose_guide(rng, (), pools) is None
    counts = np.bincount([query.choose_guide(rng, (0,), pools, exclude=1) or 0 for _ in range(2000)])
    assert counts[1] == 0 and abs(counts[0] - 1000) < 150


def test_shared_classes_cover_both_crops() -> None:
    a, b = np.full((10, 10), 255, np.uint8), np.full((10, 10), 3, np.uint8)
    a[0, :3], a[1, :2], a[2:8] = 1, 2, 0
    b[0, :3], b[1, :3], b[2:5] = 1, 2, 0
    spec = replace(TINY, background=0)
    assert query.shown_classes(TINY, a) == [0, 1]
    assert query.shared_classes(a, b, TINY).tolist() == [0, 1, -1, -1]
    assert query.shared_classes(a, b, spec).tolist() == [1, -1, -1, -1]
    rng = np.random.default_rng(0)
    assert {query.shared_class(rng, a, b, TINY) for _ in range(50)} == {0, 1}
    assert query.shared_class(rng, a, np.full_like(b, 3), TINY) == -1
    assert query.shared_class(rng, np.full_like(a, 255), np.full_like(b, 255), TINY) == -1


@pytest.mark.parametrize("size", [(37, 23), (50, 91), (8, 8)])
def test_crop_equals_resizing_everything_first(size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    labels = np.random.default_rng(2).integers(0, 4, (size[1], size[0]), dtype=np.uint8)
    for draw in range(30):
        crop, crop_labels = Augment(40, 33)(np.random.default_rng(draw), image, labels)
        rng = np.random.default_rng(draw)
        long_side = int(rng.integers(20, 81))
        new = [max(1, int(side * long_side / max(size) + 0.5)) for side in size]
        top, left = (int(rng.integers(max(0, side - 33) + 1)) for side in (new[1], new[0]))
        whole = Image.fromarray(image).resize((new[0], new[1]), Image.Resampling.BILINEAR)
        ys, xs = (
            [math.floor(Fraction(2 * place + 1, 2) * side / length) for place in range(length)]
            for side, length in ((size[1], new[1]), (size[0], new[0]))
        )
        whole_labels = labels[np.ix_(ys, xs)]
        expected = np.zeros((33, 33, 3), np.uint8)
        expected_labels = np.full((33, 33), 255, np.uint8)
        part = np.asarray(whole)[top : top + 33, left : left + 33]
        part_labels = whole_labels[top : top + 33, left : left + 33]
        expected[: part.shape[0], : part.shape[1]] = part
        expected_labels[: part.shape[0], : part.shape[1]] = part_labels
        if rng.random() < 0.5:
            expected, expected_labels = expected[:, ::-1], expected_labels[:, ::-1]
        assert np.abs(crop.astype(int) - expected).max() <= 1
        assert np.array_equal(crop_labels, expected_labels)


def test_strong_augmentation_keeps_geometry_and_labels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    labels = np.full((20, 30), 2, np.uint8)
    before = image.copy()
    same, _ = Strong(jitter=0, grey=0, blur=0)(np.random.default_rng(0), image, labels)
    assert np.array_equal(same, image)
    grey, _ = Strong(jitter=0, grey=1, blur=0)(np.random.default_rng(0), image, labels)
    assert (grey[..., :1] == grey).all()
    seen = [Strong()(np.random.default_rng(seed), image, labels) for seed in range(20)]
    assert all(np.array_equal(result[1], labels) for result in seen)
    assert len({result[0].tobytes() for result in seen}) >= 15
    assert np.array_equal(image, before)


def test_cutout_is_bounded_and_ignored() -> None:
    image, labels = np.zeros((20, 60, 3), np.uint8), np.zeros((20, 60), np.uint8)
    cut = Strong(jitter=0, grey=0, blur=0, cutout=1)
    for seed in range(100):
        pixels, cut_labels = cut(np.random.default_rng(seed), image, labels)
        ignored = cut_labels == 255
        assert 0.01 < ignored.mean() <= 0.42
        assert not pixels[~ignored].any() and pixels[ignored].mean() > 90
    assert not labels.any()
    half = Strong(jitter=0, grey=0, blur=0, cutout=0.5)
    hits = sum((half(np.random.default_rng(s), image, labels)[1] == 255).any() for s in range(200))
    assert 70 < hits < 130


def test_hue_turns_full_circle() -> None:
    image = Image.fromarray(np.full((2, 2, 3), (200, 40, 40), np.uint8))
    third = np.asarray(transforms.shift_hue(image, 1 / 3))[0, 0].astype(int)
    assert np.abs(third - (40, 200, 40)).max() <= 4
    assert np.abs(np.asarray(transforms.shift_hue(image, 1.0)).astype(int) - np.asarray(image)).max() <= 2


def test_to_tensor_normalises() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    mean, std = np.array(transforms.IMAGENET_MEAN), np.array(transforms.IMAGENET_STD)
    expected = ((image / 255 - mean) / std).transpose(2, 0, 1)
    tensor = transforms.to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert np.abs(tensor.numpy() - expected).max() < 1e-5


def test_sample_rng_tells_everything_apart() -> None:
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    assert len({sample_rng(*key).random() for key in keys}) == len(keys)
    assert sample_rng(*keys[0]).random() == sample_rng(*keys[0]).random()


def test_demo_is_deterministic_complete_and_left_alone(tmp_path: Path) -> None:
    lists = synthetic.generate(tmp_path / "a", labeled=5, unlabeled=3, val=4)
    synthetic.generate(tmp_path / "b", labeled=5, unlabeled=3, val=4)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 12 + 9 + 3 + 1
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    found = load_split(DEMO, tmp_path / "a", lists)
    assert [len(items) for items in (found.labeled, found.unlabeled, found.val)] == [5, 3, 4]
    assert (lists / "unlabeled.txt").read_text().split() == [item.name for item in found.unlabeled]
    index = query.build_class_index(DEMO, found.labeled)
    assert all(index.images_of(label) for label in range(1, DEMO.num_classes))

    image = found.unlabeled[0].image
    before = image.stat().st_mtime_ns
    synthetic.generate(tmp_path / "a", labeled=5, unlabeled=3, val=4)
    assert image.stat().st_mtime_ns == before
    pixels = image.read_bytes()
    image.unlink()
    synthetic.generate(tmp_path / "a", labeled=5, unlabeled=3, val=4)
    assert image.read_bytes() == pixels
    synthetic.generate(tmp_path / "a", seed=1, labeled=5, unlabeled=3, val=4)
    assert image.read_bytes() != pixels


@pytest.mark.parametrize("size", [(96, 96), (64, 48), (40, 70)])
def test_demo_classes_cover_three_percent_where_they_are(size: tuple[int, int]) -> None:
    for index in range(40):
        image, labels = synthetic.scene(np.random.default_rng(index), size, first=index)
        assert image.shape == (size[1], size[0], 3) and labels.shape == (size[1], size[0])
        shown = query.shown_classes(replace(DEMO, background=None), labels)
        assert shown == np.unique(labels).tolist() and 1 + index % 5 in shown


def test_demo_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image of each kind"):
        synthetic.generate(tmp_path, val=0)
    with pytest.raises(ValueError, match="expected sides of 32 pixels or more"):
        synthetic.generate(tmp_path, size=(200, 90))


def camvid_like(root: Path) -> None:
    """Twelve training images, of which one alone shows class 7 and one has a few pixels of class 2."""
    for index in range(12):
        labels = halves(0, 3, index % 2 + 4)
        if index == 8:
            labels[:] = 7
        if index == 5:
            labels[0, 0] = 2
        write_image(root / f"images/train/i{index:02d}.jpg", seed=index)
        write_grey(root / f"labels/train/i{index:02d}.png", labels)
    write_image(root / "images/val/v.jpg")
    write_grey(root / "labels/val/v.png", halves(0, 1))


def test_splits_are_nested_seeded_and_show_every_class(tmp_path: Path) -> None:
    camvid_like(tmp_path)
    names: dict[int, list[str]] = {}
    for number in (1, 4, 6, 11):
        out = tmp_path / f"splits/{number}"
        assert split.make_split(CAMVID, tmp_path, out, number=number) == (number, 12 - number, 1)
        found = load_split(CAMVID, tmp_path, out)
        names[number] = [item.name for item in found.labeled]
        everything = {item.name for item in (*found.labeled, *found.unlabeled)}
        assert len(names[number]) == number and len(everything) == 12
        assert all(" " not in line for line in (out / "unlabeled.txt").read_text().splitlines())
    assert names[11][:6] == names[6] and names[6][:4] == names[4] and names[4][:1] == names[1]
    assert {"images/train/i08.jpg", "images/train/i05.jpg"} <= set(names[4])
    split.make_split(CAMVID, tmp_path, tmp_path / "other", number=11, seed=1)
    other = [item.name for item in load_split(CAMVID, tmp_path, tmp_path / "other").labeled]
    assert other != names[11]
    assert split.make_split(CAMVID, tmp_path, tmp_path / "part", fraction=Fraction(1, 4))[0] == 3


def test_split_keeps_lists_that_differ(tmp_path: Path) -> None:
    camvid_like(tmp_path)
    out = tmp_path / "out"
    split.make_split(CAMVID, tmp_path, out, number=3)
    split.make_split(CAMVID, tmp_path, out, number=3)
    before = {path.name: path.read_text() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match=r"labeled\.txt: a different list is there already"):
        split.make_split(CAMVID, tmp_path, out, number=4)
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    assert split.make_split(CAMVID, tmp_path, out, number=4, force=True)[0] == 4
    assert len((out / "labeled.txt").read_text().splitlines()) == 4


def test_split_takes_images_without_masks_and_lists(tmp_path: Path) -> None:
    camvid_like(tmp_path)
    (tmp_path / "labels/train/i03.png").unlink()
    with pytest.raises(ValueError, match="expected 1 to 11 labeled images"):
        split.make_split(CAMVID, tmp_path, tmp_path / "out", number=12)
    split.make_split(CAMVID, tmp_path, tmp_path / "out", number=11)
    assert (tmp_path / "out/unlabeled.txt").read_text() == "images/train/i03.jpg\n"
    listed = write_lines(tmp_path / "list.txt", "images/train/i01.jpg labels/x.png", "i02", "i04")
    assert split.make_split(CAMVID, tmp_path, tmp_path / "few", number=1, listed=listed) == (1, 2, 1)
    with pytest.raises(FileNotFoundError, match=r"i77\.jpg: no such image"):
        split.make_split(CAMVID, tmp_path, tmp_path / "x", number=1, listed=write_lines(listed, "i77"))
    with pytest.raises(ValueError, match="none is left"):
        split.make_split(CAMVID, tmp_path, tmp_path / "x", number=1, listed=write_lines(listed, "i01"))
    with pytest.raises(ValueError, match="exactly one of number and fraction"):
        split.make_split(CAMVID, tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="no image of demo fits"):
        split.make_split(DEMO, tmp_path, tmp_path / "x", number=1)


def test_split_follows_the_lists_of_pascal_and_the_folders_of_cityscapes(tmp_path: Path) -> None:
    for index in range(4):
        write_image(tmp_path / f"JPEGImages/p{index}.jpg")
        save_label(PASCAL, tmp_path / f"SegmentationClass/p{index}.png", halves(0, index + 1))
        town = f"x/x{index}"
        write_image(tmp_path / f"leftImg8bit/train/{town}_leftImg8bit.png")
        write_grey(tmp_path / f"gtFine/train/{town}_gtFine_labelIds.png", halves(7, 26))
    with pytest.raises(FileNotFoundError, match=r"ImageSets/Segmentation/train\.txt: no such list"):
        split.make_split(PASCAL, tmp_path, tmp_path / "out", number=1)
    write_lines(tmp_path / "ImageSets/Segmentation/train.txt", "p0", "p2", "p3")
    write_lines(tmp_path / "ImageSets/Segmentation/val.txt", "p1")
    assert split.make_split(PASCAL, tmp_path, tmp_path / "out", number=1) == (1, 2, 1)
    assert (tmp_path / "out/val.txt").read_text() == "JPEGImages/p1.jpg SegmentationClass/p1.png\n"
    assert split.make_split(CITYSCAPES, tmp_path, tmp_path / "city", number=1) == (1, 3, 0)
    assert "_labelIds.png" in (tmp_path / "city/labeled.txt").read_text()


def test_split_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    camvid_like(tmp_path)
    parser = argparse.ArgumentParser()
    split.add_arguments(parser)
    where = ["camvid", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert split.main(parser.parse_args([*where, "--fraction", "1/4"])) == 0
    assert "3 labeled, 9 unlabeled, 1 validation images" in capsys.readouterr().out
    for bad in ([], ["--fraction", "2"], ["--number", "1", "--fraction", "1/2"]):
        with pytest.raises(SystemExit):
            parser.parse_args([*where, *bad])
