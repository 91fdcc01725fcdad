"""Training and evaluation sets, the loader, and real street scenes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from datacases import (
    CAMVID,
    CROP,
    TINY,
    halves,
    pseudo_labels,
    tiny,
    write_grey,
)
from PIL import Image

from cisc_ext.data import query, split, transforms
from cisc_ext.data.datasets import (
    Item,
    load_split,
    pseudo_path,
    read_image,
    save_label,
)
from cisc_ext.data.pairs import (
    Batch,
    EvalSet,
    GuidedUnlabeled,
    LabeledPairs,
    LabeledSet,
    PairBatch,
    PseudoLabeled,
    SharedClasses,
    eval_loader,
    loader,
    merge,
)
from cisc_ext.data.transforms import Augment, Strong


def same(a: Batch | PairBatch, b: Batch | PairBatch) -> bool:
    ours, theirs = vars(a), vars(b)
    return ours.keys() == theirs.keys() and all(
        theirs[name] is None if value is None else torch.equal(value, theirs[name])
        for name, value in ours.items()
    )


@pytest.mark.parametrize("mode", ["one", "all", "own"])
def test_labeled_pairs_never_pair_an_image_with_itself(tmp_path: Path, mode: SharedClasses) -> None:
    """Each image's pixels all have its own number, so that a pair shows where it came from."""
    items = tiny(tmp_path).labeled
    for place, item in enumerate(items):
        Image.fromarray(np.full((18, 24, 3), 50 * (place + 1), np.uint8)).save(item.image)
    index = query.build_class_index(TINY, items)
    pairs = LabeledPairs(TINY, items, index, CROP, seed=3, shared_classes=mode)
    partners: dict[int, set[int]] = {place: set() for place in range(4)}
    for epoch in range(60):
        for place in range(4):
            batch = pairs[epoch, place]
            values = [
                image * torch.tensor(transforms.IMAGENET_STD).view(3, 1, 1)
                + torch.tensor(transforms.IMAGENET_MEAN).view(3, 1, 1)
                for image in (batch.image[0], batch.guide_image[0])
            ]
            own, guide = (round(float(value.max()) * 255 / 50) - 1 for value in values)
            assert own == place and guide != place
            partners[place].add(guide)
            if mode == "own":
                assert batch.classes is None
                continue
            assert batch.classes is not None and batch.classes.shape == (1, 1 if mode == "one" else 4)
            for label in batch.classes[batch.classes >= 0].tolist():
                assert (batch.labels == label).float().mean() >= 0.03
                assert (batch.guide_labels == label).float().mean() >= 0.03
            if place == 3:
                assert (batch.classes == -1).all()
    assert partners[0] >= {1, 2} and partners[3] == {0, 1, 2}


def test_most_pairs_share_a_class(tmp_path: Path) -> None:
    items = tiny(tmp_path).labeled
    pairs = LabeledPairs(TINY, items, query.build_class_index(TINY, items), CROP, seed=0)
    found = [pairs[epoch, place].classes for epoch in range(30) for place in range(3)]
    assert sum(classes is not None and int(classes) >= 0 for classes in found) >= 85


def test_labeled_pairs_check_their_arguments(tmp_path: Path) -> None:
    items = tiny(tmp_path).labeled
    index = query.build_class_index(TINY, items)
    with pytest.raises(ValueError, match="at least two labeled images, got 1"):
        LabeledPairs(TINY, items[:1], index, CROP, seed=0)
    with pytest.raises(ValueError, match="index: expected one of 3 images, got one of 4"):
        LabeledPairs(TINY, items[:3], index, CROP, seed=0)
    with pytest.raises(ValueError, match=r"shared_classes: expected one of .*, got 'some'"):
        LabeledPairs(TINY, items, index, CROP, seed=0, shared_classes="some")  # type: ignore[arg-type]


def test_guides_of_unlabeled_images_come_from_the_pools(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    folder = pseudo_labels(tmp_path / "pseudo", found.unlabeled)
    pools = {0: (0,), 1: (0, 1), 2: (1,)}
    guided = GuidedUnlabeled(
        TINY, found.unlabeled, folder, found.labeled, pools, CROP, Strong(), seed=0, weak_view=True
    )
    for place in range(len(guided)):
        for epoch in range(20):
            batch = guided[epoch, place]
            shown = set(batch.guide_labels.unique().tolist()) - {255}
            assert batch.classes is not None and batch.weak_image is not None
            label = int(batch.classes)
            if label in pools:
                assert shown <= ({0, 1}, {0, 1, 2}, {1, 2})[label]
                assert (batch.labels == label).float().mean() >= 0.03
                assert (batch.guide_labels == label).float().mean() >= 0.03
            if place == 3:  # no pool for class 3: any labeled image
                assert label in (-1, 3)
            if place == 4:  # everything ignored
                assert label == -1
    plain = GuidedUnlabeled(TINY, found.unlabeled, folder, found.labeled, pools, CROP, None, seed=0)
    weak = GuidedUnlabeled(
        TINY, found.unlabeled, folder, found.labeled, pools, CROP, Strong(), seed=0, weak_view=True
    )
    a, b = plain[0, 0], weak[0, 0]
    assert a.weak_image is None and b.weak_image is not None
    assert torch.equal(a.image, b.weak_image) and torch.equal(a.labels, b.labels)
    assert torch.equal(a.guide_image, b.guide_image)
    assert any(not torch.equal(weak[e, 0].image, plain[e, 0].image) for e in range(5))


def test_guided_unlabeled_checks_its_arguments(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    folder = pseudo_labels(tmp_path / "pseudo", found.unlabeled)

    def make(pools: dict[int, tuple[int, ...]], labeled: tuple[Item, ...] = found.labeled) -> GuidedUnlabeled:
        return GuidedUnlabeled(TINY, found.unlabeled, folder, labeled, pools, CROP, None, seed=0)

    with pytest.raises(ValueError, match="pools: expected classes 0 to 3, got 4"):
        make({4: (0,)})
    with pytest.raises(ValueError, match="pools: class 1 names an image outside 0 to 3"):
        make({1: (4,)})
    with pytest.raises(ValueError, match="labeled_items: expected at least one guide"):
        make({}, ())
    pseudo_path(folder, "images/u5.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"images/u5\.png: no such pseudo label"):
        make({})
    save_label(TINY, pseudo_path(folder, "images/u5.png"), halves(0, 1, size=(12, 9)))
    with pytest.raises(ValueError, match=r"u5\.png: expected 24 x 18 pixels, got 12 x 9"):
        make({})[0, 5]


def test_pseudo_labeled_and_labeled_sets(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    folder = pseudo_labels(tmp_path / "pseudo", found.unlabeled)
    cutout = Strong(jitter=0, grey=0, blur=0, cutout=1)
    fill = Augment(24, 12, scale=(1, 1))
    pseudo = PseudoLabeled(TINY, found.unlabeled, folder, fill, cutout, seed=0)
    sample = pseudo[0, 1]
    assert sample.image.shape == (1, 3, 12, 12) and sample.labels.dtype == torch.uint8
    assert set(sample.labels.unique().tolist()) == {1, 255}
    labeled = LabeledSet(TINY, found.labeled, fill, seed=0)
    assert labeled[0, 3].labels.unique().tolist() == [3]
    with pytest.raises(ValueError, match="labeled: expected at least one image"):
        LabeledSet(TINY, (), CROP, seed=0)


def test_cache_and_load_size_do_not_change_meaning(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    kept = LabeledSet(TINY, found.labeled, CROP, seed=0)
    fresh = LabeledSet(TINY, found.labeled, CROP, seed=0, cache_mib=0)
    tight = LabeledSet(TINY, found.labeled, CROP, seed=0, cache_mib=4 * 24 * 18 * 4 / 2**20 - 1e-4)
    assert kept.reader.kept is not None and fresh.reader.kept is None and tight.reader.kept is None
    for key in [(0, 1), (0, 1), (1, 2)]:
        assert same(kept[key], fresh[key])
    assert len(kept.reader.kept) == 4
    whole = EvalSet(TINY, found.val, load_size=(12, 9))
    image, labels, name = whole[1]
    assert image.shape == (3, 9, 12) and name == "images/v1.png"
    assert labels is not None and torch.equal(labels, torch.from_numpy(halves(0, 3, size=(12, 9))))
    assert [sample.labels for sample in eval_loader(EvalSet(TINY, found.unlabeled))] == [None] * 6
    with pytest.raises(ValueError, match="load_size: expected"):
        EvalSet(TINY, found.val, load_size=(0, 9))


def test_eval_loader_gives_whole_images_in_order(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    whole = EvalSet(TINY, found.unlabeled)
    assert [sample.name for sample in eval_loader(whole, indices=[4, 1], workers=1)] == [
        "images/u4.png",
        "images/u1.png",
    ]
    assert torch.equal(
        next(eval_loader(whole)).image, transforms.to_tensor(read_image(found.unlabeled[0].image))
    )


def guided_set(root: Path) -> GuidedUnlabeled:
    found = tiny(root)
    folder = pseudo_labels(root / "pseudo", found.unlabeled)
    pools = query.build_class_index(TINY, found.labeled).pools()
    return GuidedUnlabeled(
        TINY, found.unlabeled, folder, found.labeled, pools, CROP, Strong(cutout=0.5), seed=7, weak_view=True
    )


def test_workers_and_restarts_do_not_change_the_data(tmp_path: Path) -> None:
    guided = guided_set(tmp_path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    alone = list(loader(guided, 4, 7, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(alone) == 7
    for workers in (1, 2):
        others = list(loader(guided, 4, 7, seed=1, workers=workers))
        assert all(same(a, b) for a, b in zip(alone, others, strict=True))
    np.random.seed(99)
    resumed = list(loader(guided, 4, 7, seed=1, first_step=5))
    assert len(resumed) == 2 and same(resumed[0], alone[5]) and same(resumed[1], alone[6])
    assert not same(next(loader(guided, 4, 7, seed=2)), alone[0])
    assert list(loader(guided, 4, 7, seed=1, first_step=7)) == []


def test_every_epoch_is_a_permutation_and_small_sets_are_repeated(tmp_path: Path) -> None:
    items = tiny(tmp_path).labeled
    for place, item in enumerate(items):
        assert item.label is not None
        write_grey(item.label, np.full((18, 24), place, np.uint8))
    labeled = LabeledSet(TINY, items, Augment(24, 9, scale=(1, 1)), seed=0)
    batches = list(loader(labeled, 6, 6, seed=0))
    assert all(batch.image.shape == (6, 3, 9, 9) for batch in batches)
    order = torch.cat([batch.labels[:, 0, 0] for batch in batches]).view(-1, 4)
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) > 1


def test_processes_share_the_batches_out(tmp_path: Path) -> None:
    guided = guided_set(tmp_path)
    together = list(loader(guided, 4, 3, seed=1))
    parts = [list(loader(guided, 2, 3, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert all(
        same(merge(pair), whole) for pair, whole in zip(zip(*parts, strict=True), together, strict=True)
    )
    with pytest.raises(ValueError, match="loader: expected batch_size"):
        loader(guided, 0, 3, seed=1)


def test_batches_move_whole(tmp_path: Path) -> None:
    batch = next(loader(guided_set(tmp_path), 2, 1, seed=0)).to("cpu", memory_format=torch.channels_last)
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert batch.weak_image is not None and batch.weak_image.is_contiguous(memory_format=torch.channels_last)
    assert batch.classes is not None and batch.classes.dtype == torch.int64 and batch.classes.shape == (2, 1)
    meta = batch.to("meta")
    assert meta.labels.device.type == "meta" and meta.guide_labels.shape == (2, 17, 17)


def test_camvid_lists_work_as_they_are(shared: Path, tmp_path: Path) -> None:
    root = shared / "data/camvid"
    for part, labeled in (("1_16", 23), ("1_8", 46), ("1_4", 92)):
        found = load_split(CAMVID, root, root / f"splits/{part}/split_0")
        assert (len(found.labeled), len(found.unlabeled), len(found.val)) == (labeled, 367 - labeled, 101)
    index = query.build_class_index(CAMVID, found.labeled)
    assert {0, 1, 3, 4, 5, 8} <= set(index.pools())
    pairs = LabeledPairs(CAMVID, found.labeled, index, Augment(240, 129), seed=0, load_size=(240, 180))
    batch = next(loader(pairs, 8, 1, seed=0))
    assert batch.image.shape == (8, 3, 129, 129) and batch.classes is not None
    assert (batch.classes >= 0).all()
    whole = EvalSet(CAMVID, found.val, load_size=(240, 180))[0]
    assert whole.labels is not None and whole.labels.shape == (180, 240)
    assert split.make_split(CAMVID, root, tmp_path / "new", fraction=Fraction(1, 8)) == (46, 321, 101)
    chosen = load_split(CAMVID, root, tmp_path / "new").labeled
    assert (query.build_class_index(CAMVID, chosen).fractions > 0).any(0).all()
